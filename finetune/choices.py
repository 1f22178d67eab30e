"""What val chooses once training is over: post-processing and the threshold of an operating point, each if the recipe asks."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from finetune.evaluation.alarms import choose_threshold, is_without_target, refuse_val_without_clean
from finetune.evaluation.evaluate import case_scores
from finetune.inference.postprocess import ValCase, choose_postprocessing, predicted_objects
from finetune.labelled import LabelledData
from finetune.recipe import FinetuneRecipe
from resunet.decision import OperatingPoint, Postprocessing
from resunet.progress import progress


@dataclass(frozen=True)
class Choices:
    """None of what the recipe does not ask for."""

    postprocessing: Postprocessing | None = None
    operating_point: OperatingPoint | None = None


def refuse_impossible(recipe: FinetuneRecipe, data: LabelledData) -> None:
    """Raises InputError, before anything is trained, if val cannot choose what the recipe asks for."""
    if (budget := recipe.false_alarms_per_1000) is not None:
        refuse_val_without_clean(data.val, f"false_alarms_per_1000={budget:g}")


def choose_on_val(
    model: nn.Module, data: LabelledData, recipe: FinetuneRecipe, accelerator: Accelerator, quiet: bool
) -> Choices:
    """One pass over val; each rank takes its share of the cases and all come to the same."""
    if recipe.postprocess == "none" and recipe.false_alarms_per_1000 is None:
        return Choices()
    names = list(recipe.data.classes.values())
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = range(rank, len(data.val), ranks)
    seen: list[tuple[int, ValCase, float | None]] = []  # with the greatest probability of a case without target
    for i in progress(share, len(share), "choose on val", quiet=quiet):
        case = data.val[i]
        assert case.labels is not None
        labels, foreground = case_scores(model, case, accelerator.device, recipe.precision_of_test, recipe.inference)
        peak = float(foreground[case.labels == 0].max()) if is_without_target(case.labels) else None
        seen.append((i, predicted_objects(case.case.group, case.labels, labels, len(names)), peak))
    if ranks > 1:
        seen = gather_object(seen)
    seen.sort(key=lambda one: one[0])
    postprocessing, point = None, None
    if recipe.postprocess == "validate":
        postprocessing = choose_postprocessing([*data.train, *data.val], [case for _, case, _ in seen], names)
    if recipe.false_alarms_per_1000 is not None:
        point = choose_threshold([peak for _, _, peak in seen if peak is not None], recipe.false_alarms_per_1000)
    return Choices(postprocessing, point)
