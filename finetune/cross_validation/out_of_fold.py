"""What the networks of a cross-validation say of the cases that they were not trained on, and what that chooses for all."""

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from finetune.choices import Choices
from finetune.evaluation.alarms import choose_threshold, refuse_val_without_clean
from finetune.evaluation.outputs import Measured
from finetune.inference.postprocess import ValCase, choose_postprocessing, predicted_objects
from finetune.inference.predict import predict_case
from finetune.judging import measure
from finetune.labelled import FoldedData
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import ModelConfig
from resunet.ensemble import Ensemble
from resunet.progress import progress

SPLIT = "out-of-fold"
OPTIMISTIC = (
    "Out-of-fold figures are of networks that were not trained on the case. What val chose was chosen by it, though: the "
    "checkpoint, unless the recipe says checkpoint=last, post-processing and a threshold; so far they are optimistic. Networks of "
    "different folds share training cases, which the intervals over groups do not know of."
)
OF_SINGLE_NETWORKS = (
    "The threshold was chosen on probabilities of single networks, out of fold; their mean has lower peaks, so that the ensemble "
    "tends to raise fewer alarms than the budget allows, and to find less."
)


def refuse_impossible_folds(recipe: FinetuneRecipe, data: FoldedData) -> None:
    """Raises InputError, before anything is trained, if a fold's val cannot choose what the recipe asks for."""
    if (budget := recipe.false_alarms_per_1000) is not None:
        for fold in range(len(data.folds)):
            refuse_val_without_clean(data.val(fold), f"false_alarms_per_1000={budget:g}, fold {fold}")


def predict_left_out(
    ensemble: Ensemble, data: FoldedData, recipe: FinetuneRecipe, accelerator: Accelerator
) -> list[list[Measured]]:
    """The val cases of each fold, as its own network predicts them; nothing is post-processed."""
    return [measure(member, data.val(fold), recipe, accelerator) for fold, member in enumerate(ensemble.members)]


def in_order(data: FoldedData, left_out: Sequence[Sequence[Measured]]) -> list[Measured]:
    """The cases of all folds in the order of `data.cases`."""
    pairs = [pair for places, its in zip(data.folds, left_out, strict=True) for pair in zip(places, its, strict=True)]
    return [one for _, one in sorted(pairs, key=lambda pair: pair[0])]


def choose_out_of_fold(
    ensemble: Ensemble,
    data: FoldedData,
    left_out: Sequence[Sequence[Measured]],
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
) -> Choices:
    """Post-processing and an operating point for the ensemble, if the recipe asks for them, as val chooses them for a network.

    nnU-Net chooses its post-processing so: by the predictions of all folds together.
    """
    postprocessing, point = None, None
    if recipe.postprocess == "validate":
        names = list(recipe.data.classes.values())
        postprocessing = choose_postprocessing(data.cases, _objects(ensemble, data, recipe, accelerator), names)
    if (budget := recipe.false_alarms_per_1000) is not None:
        clean = [one.probabilities for its in left_out for one in its if one.measures.without_target]
        point = choose_threshold([kept.peak for kept in clean if kept is not None], budget)
    return Choices(postprocessing, point)


def described(config: ModelConfig) -> list[str]:
    """What was chosen out of fold beside the checkpoints, for a page."""
    said = []
    if config.postprocessing is not None:
        said.append(f"Post-processing, chosen out of fold: {config.postprocessing.described()}")
    if (point := config.operating_point) is not None:
        said.append(
            f"Operating point: probability {point.threshold:.6g}, for at most {point.budget:g} false alarms in 1,000 cases without "
            f"target; out of fold {point.alarmed} of {point.clean}. {OF_SINGLE_NETWORKS}"
        )
    return said


def _objects(ensemble: Ensemble, data: FoldedData, recipe: FinetuneRecipe, accelerator: Accelerator) -> list[ValCase]:
    """What post-processing is chosen by; each rank takes its share of the cases and all get the whole."""
    member_of = {i: ensemble.members[fold] for fold, places in enumerate(data.folds) for i in places}
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = range(rank, len(data.cases), ranks)
    seen: list[tuple[int, ValCase]] = []
    for i in progress(share, len(share), "choose out of fold", quiet=not accelerator.is_main_process):
        case = data.cases[i]
        assert case.labels is not None
        predicted = predict_case(member_of[i], case, accelerator.device, recipe.precision_of_test, recipe.inference)
        seen.append((i, predicted_objects(case.case.group, case.labels, predicted, len(recipe.data.classes))))
    if ranks > 1:
        seen = gather_object(seen)
    return [objects for _, objects in sorted(seen, key=lambda pair: pair[0])]
