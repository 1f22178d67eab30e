"""The step of fine-tuning: the network, its optimiser, rates, batches and gradients. What the loop does, and what is measured.

`finetune.loop` trains with it; the plan and the checks before training time and try the same code.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from finetune.augment import augment
from finetune.losses import segmentation_loss
from finetune.recipe import FinetuneRecipe
from resunet.data.images import channel_count
from resunet.model import ResUNet, Segmenter, build_model
from resunet.training import learning_rate, parameter_groups, step_generator
from resunet.transfer import Receipt, transfer_encoder

_PATCHES, _AUGMENT = 2, 3  # names of the random streams


class Batches(Protocol):
    """Where batches come from: a `PatchSampler`, or the one batch of a check."""

    def batch(self, size: int, entropy: Sequence[int]) -> tuple[Tensor, Tensor]: ...


def build(recipe: FinetuneRecipe) -> tuple[Segmenter, Receipt | None]:
    """The network, fresh but for what the receipt says. The seed makes the fresh part the same in every arm."""
    torch.manual_seed(recipe.seed)
    assert recipe.model.norm is not None, "resolve() comes first"
    in_channels = channel_count(recipe.data.channels)
    architecture = recipe.model.architecture(in_channels, len(recipe.data.classes), recipe.model.norm)
    model = build_model(architecture)
    assert isinstance(model, Segmenter)
    if recipe.encoder is None:
        return model, None
    assert isinstance(model, ResUNet), "the recipe refuses an encoder for another network"
    return model, transfer_encoder(recipe.encoder, model, "input_channels" in recipe.allow)


def make_optimizer(recipe: FinetuneRecipe, model: Segmenter) -> Optimizer:
    modules: dict[str, nn.Module] = {"network": model}
    if isinstance(model, ResUNet):
        modules = {"encoder": model.encoder, "decoder": model.decoder, "head": model.head}
    return AdamW(parameter_groups(modules, recipe.optimizer.weight_decay), lr=recipe.optimizer.lr)


def start_step(recipe: FinetuneRecipe, model: Segmenter, optimizer: Optimizer, step: int, transferred: bool) -> float:
    """Training mode and learning rates: warm-up and cosine for all, a transferred encoder at its own rate.

    While the decoder goes first, a transferred encoder stands still: neither its weights nor its batch statistics move.
    """
    lr = learning_rate(step, recipe.steps, recipe.warmup, recipe.optimizer.lr)
    still = transferred and step < recipe.optimizer.decoder_first * recipe.steps
    for group in optimizer.param_groups:
        group["lr"] = lr
        if transferred and group["name"] == "encoder":
            group["lr"] = 0.0 if still else lr * recipe.optimizer.encoder_lr_factor
    model.train()
    if still:
        assert isinstance(model, ResUNet)
        model.encoder.eval()
    return lr


def forward_backward(
    recipe: FinetuneRecipe, wrapped: nn.Module, sampler: Batches, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """The gradients of one optimiser step, accumulated; its losses and the rms elastic displacement in pixels."""
    metrics: dict[str, float] = {}
    for part in range(recipe.accumulate):
        images, labels, moved = _batch(recipe, sampler, step * recipe.accumulate + part, accelerator)
        with nullcontext() if part == recipe.accumulate - 1 else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                logits = wrapped(images)
            terms = loss_of(recipe, logits, labels)
            accelerator.backward(terms["loss"] / recipe.accumulate)
        values = {name: float(term.detach()) for name, term in terms.items()} | {"elastic_rms": moved}
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value / recipe.accumulate
    return metrics


def loss_of(recipe: FinetuneRecipe, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The recipe's loss and its terms."""
    loss = recipe.loss
    weights = None
    if loss.class_weights is not None:
        weights = [loss.class_weights.get(name, 1.0) for name in recipe.data.classes.values()]
    return segmentation_loss(
        logits, labels, loss.gamma, loss.focal_weight, loss.dice_weight, loss.component_weight, class_weights=weights
    )


def _batch(recipe: FinetuneRecipe, sampler: Batches, index: int, accelerator: Accelerator) -> tuple[Tensor, Tensor, float]:
    rank = accelerator.process_index
    share = recipe.batch // accelerator.num_processes
    images, labels = sampler.batch(share, (recipe.seed, _PATCHES, index, rank))
    generator = step_generator(accelerator.device, recipe.seed, _AUGMENT, index, rank)
    device = accelerator.device
    images, labels, moved = augment(images.to(device), labels.to(device), recipe.augment, generator)
    return images.contiguous(memory_format=torch.channels_last), labels, moved
