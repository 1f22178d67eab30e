"""Checks before a long training: which learning rate, and whether the network can learn one batch at all.

Both take the step that training takes, on a network that is thrown away.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch.optim import Optimizer

from finetune.distillation.teacher import Teacher
from finetune.recipe import FinetuneRecipe
from finetune.settings import AugmentSettings, ElasticSettings
from finetune.step import attending, forward_backward, make_optimizer, refresh_statistics, supervise, training_mode
from finetune.training.patches import Batches, Patches, PatchSampler
from resunet.data.cases import IGNORE, LoadedCase
from resunet.errors import InputError
from resunet.losses import dice_loss
from resunet.model import Segmenter
from resunet.progress import progress
from resunet.transfer import Receipt

RATES = (1e-6, 1.0)  # of the sweep
SWEEP_STEPS = 100
_SMOOTH = 3.0  # steps
_DIVERGED = 4.0  # times the lowest loss so far
_FELL = 0.05  # of the first loss: less is noise

OVERFIT_STEPS = 300
OVERFIT_LOSS = 0.1
_STILL = AugmentSettings(rotation=0, elastic=ElasticSettings(probability=0), contrast=(1, 1), flip=0)


@dataclass(frozen=True)
class Sweep:
    """A sweep over learning rates: the loss before each step, as measured and smoothed.

    steepest: the rate at which the smoothed loss falls fastest; None where no rate lowers it.
    lowest: the rate of the lowest smoothed loss; training at it is on the edge.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float | None
    lowest: float


def find_rate(
    recipe: FinetuneRecipe,
    model: Segmenter,
    sampler: Batches,
    accelerator: Accelerator,
    transferred: bool,
    steps: int,
    quiet: bool = False,
    teacher: Teacher | None = None,
    receipt: Receipt | None = None,
) -> Sweep:
    """The learning-rate range test of Smith 2017 (arXiv 1506.01186, section 3.3), with rates that grow exponentially.

    On a copy of the model, with the recipe's batches, augmentation and optimiser; it ends where the loss is no longer finite or
    four times its lowest.
    """
    network = copy.deepcopy(model)
    trained = supervise(recipe, network)
    wrapped, optimizer = accelerator.prepare(attending(recipe, trained), make_optimizer(recipe, trained, receipt))
    training_mode(recipe, network)
    rates, losses = [], []
    for step in progress(range(steps), steps, "find learning rate", quiet=quiet):
        rate = RATES[0] * (RATES[1] / RATES[0]) ** (step / (steps - 1))
        _set_rates(recipe, optimizer, rate, transferred)
        optimizer.zero_grad(set_to_none=True)
        loss = forward_backward(recipe, wrapped, sampler, step, accelerator, teacher)["loss"]
        if not math.isfinite(loss):
            break
        rates.append(rate)
        losses.append(loss)
        if step > steps // 10 and np.mean(losses[-3:]) > _DIVERGED * min(losses):
            break
        accelerator.clip_grad_norm_(trained.parameters(), recipe.optimizer.clip)
        optimizer.step()
    if len(losses) < 3:
        raise InputError(
            f"the loss is not finite after {len(losses)} steps at a rate of {RATES[0]:g}: it is not the rate. Look at the images "
            "and at normalisation with resunet finetune RECIPE --plan."
        )
    return read_sweep(rates, losses)


def read_sweep(rates: Sequence[float], losses: Sequence[float]) -> Sweep:
    """What a sweep says. Smoothed by a symmetric Gaussian: a running average would lag, and suggest too high a rate."""
    smoothed: NDArray[np.float64] = gaussian_filter1d(np.asarray(losses, np.float64), _SMOOTH, mode="nearest")
    lowest = int(smoothed.argmin())
    steepest = None
    if lowest > 0 and smoothed[0] - smoothed[lowest] > _FELL * abs(smoothed[0]):
        slope = np.gradient(smoothed, np.log10(rates))
        steepest = float(rates[int(slope[: lowest + 1].argmin())])
    return Sweep(tuple(rates), tuple(losses), tuple(smoothed.tolist()), steepest, float(rates[lowest]))


@dataclass(frozen=True)
class Overfit:
    """How the network did on one batch. dice_training, dice_evaluation: of the batch at the end, in the two modes of norms."""

    passed: bool
    steps: int
    first_loss: float
    last_loss: float
    dice_training: float
    dice_evaluation: float
    classes: tuple[int, ...]


def overfit(
    recipe: FinetuneRecipe,
    model: Segmenter,
    train: Sequence[LoadedCase],
    accelerator: Accelerator,
    transferred: bool,
    steps: int,
    quiet: bool = False,
    receipt: Receipt | None = None,
) -> Overfit:
    """Train on one fixed batch, every patch with a class in it, without augmentation, at the recipe's rate held constant.

    A teacher has no say: whether masks can be learned by heart is the question.

    It passes when the loss falls below `overfit_limit` within the steps.

    Raises:
        InputError: no training case has a pixel of any class.
    """
    batch = _OneBatch(PatchSampler(train, recipe.patch, 1.0).batch(recipe.batch, (recipe.seed, 0)))
    classes = tuple(int(value) for value in batch.patches.labels.unique() if value not in (0, IGNORE))
    still = recipe.model_copy(update={"augment": _STILL, "accumulate": 1})
    trained = supervise(still, model)
    wrapped, optimizer = accelerator.prepare(trained, make_optimizer(still, trained, receipt))
    enough = overfit_limit(recipe)
    losses: list[float] = []
    figures: dict[str, float] = {}
    training_mode(still, model)
    for step in progress(range(steps), steps, "overfit one batch", quiet=quiet, figures=figures):
        _set_rates(still, optimizer, recipe.optimizer.lr, transferred)
        optimizer.zero_grad(set_to_none=True)
        losses.append(forward_backward(still, wrapped, batch, step, accelerator)["loss"])
        figures["loss"] = losses[-1]
        if losses[-1] < enough or not math.isfinite(losses[-1]):
            break
        accelerator.clip_grad_norm_(trained.parameters(), recipe.optimizer.clip)
        optimizer.step()
    refresh_statistics(still, model, model, batch, accelerator)
    return Overfit(
        passed=losses[-1] < enough,
        steps=len(losses),
        first_loss=losses[0],
        last_loss=losses[-1],
        dice_training=_dice(recipe, model, batch, accelerator, training=True),
        dice_evaluation=_dice(recipe, model, batch, accelerator, training=False),
        classes=classes,
    )


def overfit_limit(recipe: FinetuneRecipe) -> float:
    """The loss that counts as learned: `OVERFIT_LOSS` of its heaviest term, which with the Dice is a Dice of about 0.9."""
    return OVERFIT_LOSS * max(recipe.loss.focal_weight, recipe.loss.dice_weight, recipe.loss.component_weight)


class _OneBatch(Batches):
    def __init__(self, patches: Patches) -> None:
        self.patches = patches

    def batch(self, size: int, entropy: Sequence[int]) -> Patches:
        """The patch that the last number names, as `finetune.step` asks for the patches of a batch."""
        assert size == 1
        return Patches(*(values[entropy[-1], None] for values in self.patches))


def _dice(recipe: FinetuneRecipe, model: Segmenter, batch: _OneBatch, accelerator: Accelerator, training: bool) -> float:
    """Soft Dice of the batch, foreground classes or regions averaged, 1 − the loss. Running statistics are left as they are."""
    probe = copy.deepcopy(model).train(training)
    with torch.no_grad(), accelerator.autocast():
        logits = probe(batch.patches.images.to(accelerator.device))
    labels = batch.patches.labels.to(accelerator.device)
    return 1 - float(dice_loss(logits.float(), labels, regions=recipe.data.region_members()))


def _set_rates(recipe: FinetuneRecipe, optimizer: Optimizer, rate: float, transferred: bool) -> None:
    for group in optimizer.param_groups:
        encoder = transferred and group["name"] == "encoder"
        group["lr"] = rate * (recipe.optimizer.encoder_lr_factor if encoder else 1)
