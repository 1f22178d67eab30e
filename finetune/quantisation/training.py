"""Quantisation-aware training: a prepared network on the run's own data, with its augmentation and its loss."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from finetune.quantisation.settings import QuantiseSettings
from finetune.recipe import FinetuneRecipe
from finetune.step import apply_gradients, forward_backward
from finetune.training.patches import Batches
from resunet.errors import CheckFailed
from resunet.progress import progress
from resunet.training import learning_rate

_CALIBRATION = 6  # name of the random stream of its patches
_METRICS = "metrics.jsonl"


def calibration_batches(recipe: FinetuneRecipe, settings: QuantiseSettings, sampler: Batches) -> list[Tensor]:
    """Training patches as they are, not augmented: (N, C, *patch), N at most the recipe's batch."""
    sizes = [min(recipe.batch, settings.calibration - start) for start in range(0, settings.calibration, recipe.batch)]
    return [sampler.batch(size, (recipe.seed, _CALIBRATION, i)).images for i, size in enumerate(sizes)]


def train(
    network: nn.Module,
    recipe: FinetuneRecipe,
    settings: QuantiseSettings,
    sampler: Batches,
    accelerator: Accelerator,
    folder: Path,
    at: Callable[[int], None],
) -> None:
    """Train in place for `settings.steps`; a line a logged step in folder/metrics.jsonl.

    at: told the number of every step before it, to freeze what is to stand still from there.

    Raises:
        CheckFailed: a loss or a gradient that is not finite.
    """
    decayed = [one for one in network.parameters() if one.requires_grad and one.ndim > 1]
    plain = [one for one in network.parameters() if one.requires_grad and one.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=recipe.optimizer.weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizer = accelerator.prepare(AdamW([group for group in groups if group["params"]], lr=settings.lr))
    figures: dict[str, float] = {}
    for step in progress(range(settings.steps), settings.steps, "quantise", figures=figures):
        at(step)
        lr = learning_rate(step, settings.steps, recipe.warmup, settings.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        try:
            metrics = forward_backward(recipe, network, sampler, step, accelerator)
        except AssertionError as error:  # how torchao's observers say what they saw
            if "nan" not in str(error):
                raise
            raise CheckFailed(
                f"step {step}: activations are not finite. Lower the learning rate, lr={settings.lr:g}."
            ) from error
        metrics |= apply_gradients(recipe, network, optimizer, metrics["loss"], step, accelerator)
        figures["loss"] = metrics["loss"]
        if (done := step + 1) % recipe.log_every == 0 or done == settings.steps:
            line = json.dumps({"step": done, "learning_rate": lr} | metrics)
            with open(folder / _METRICS, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")


@torch.no_grad()
def show(network: nn.Module, batches: list[Tensor], device: torch.device) -> None:
    """Let a prepared network see batches."""
    for images in progress(batches, len(batches), "calibrate"):
        network(images.to(device))
