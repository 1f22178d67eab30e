"""How a recipe judges its network: by Dice on val while it trains, and by every measure at the end."""

from collections.abc import Sequence

from accelerate import Accelerator
from torch import nn

from finetune.evaluation.evaluate import mean_dice, measure_cases
from finetune.evaluation.outputs import Measured
from finetune.evaluation.targets import targets_of
from finetune.recipe import FinetuneRecipe
from resunet.data.cases import LoadedCase
from resunet.model import Segmenter
from resunet.runtime import ObjectRule


def validate(model: Segmenter, val: Sequence[LoadedCase], recipe: FinetuneRecipe, accelerator: Accelerator) -> float:
    """Dice of the whole val scans, as evaluation counts it; 0 where no case defines one, and every look is then the best."""
    targets = targets_of(recipe.data.classes, recipe.data.regions)
    return mean_dice(model, val, targets, accelerator.device, recipe.precision, accelerator, inference=recipe.inference)


def measure(
    model: nn.Module,
    cases: Sequence[LoadedCase],
    recipe: FinetuneRecipe,
    accelerator: Accelerator | None = None,
    rules: Sequence[ObjectRule] = (),
) -> list[Measured]:
    """`measure_cases` of val or test at the end of a run; with an accelerator each rank takes its share and one tells the progress.

    model: on its device. rules: post-processing.
    """
    targets, device = targets_of(recipe.data.classes, recipe.data.regions), next(model.parameters()).device
    quiet = accelerator is not None and not accelerator.is_main_process
    precision, inference = recipe.precision_of_test, recipe.inference
    return measure_cases(model, cases, targets, device, precision, accelerator, quiet, rules=rules, inference=inference)
