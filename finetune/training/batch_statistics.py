"""Batch statistics that survive small batches: those of pretraining kept, or recomputed over many batches; equal on all ranks."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.recipe import FinetuneRecipe
from resunet.errors import InputError


def refuse_without_batch_norm(recipe: FinetuneRecipe) -> None:
    """Raises InputError where the recipe's statistics need a batch norm that the network does not have."""
    kind, norm = recipe.model.statistics, recipe.model.norm
    if kind != "running" and norm != "batch":
        raise InputError(
            f"model.statistics={kind!r}: model.norm={norm!r} keeps no batch statistics. Leave model.statistics out, or use "
            "model.norm='batch' (with an encoder: one that was pretrained so)."
        )


def batch_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}


def moving(network: nn.Module) -> set[str]:
    """Names of the batch-norm layers whose statistics move as the network trains now: those in training mode."""
    return {name for name, layer in batch_norms(network).items() if layer.training}


@torch.no_grad()
def share_statistics(network: nn.Module, accelerator: Accelerator) -> None:
    """The mean over the ranks of every running statistic: else each rank has those of its own patches, and is judged by them."""
    layers = batch_norms(network).values()
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
    if accelerator.num_processes == 1 or not buffers:
        return
    mean = accelerator.reduce(torch.cat(buffers), reduction="mean")
    for buffer, values in zip(buffers, mean.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(values)


@torch.no_grad()
def recompute_statistics(
    network: nn.Module, names: Collection[str], batches: Iterable[Tensor], accelerator: Accelerator
) -> None:
    """Population statistics of the named layers from batches that the network sees as in training (Wu & Johnson 2021,
    arXiv 2105.07576, section 3; `torch.optim.swa_utils.update_bn` is its kin).

    Mean and variance of all values of all batches of all ranks: unlike the mean of the batches' variances, that of small batches of
    whole images too, whose means differ. Modes and every other buffer are left as they are.

    Args:
        batches: this rank's share, (N, C, *size) each.
    """
    layers = [layer for name, layer in batch_norms(network).items() if name in names]
    sums = [torch.zeros(3, layer.num_features, dtype=torch.float64) for layer in layers]  # number, Σ x, Σ x²

    def look(into: Tensor, x: Tensor) -> None:
        variance, mean = torch.var_mean(x.float(), dim=(0, *range(2, x.ndim)), correction=0)
        variance, mean = variance.cpu().double(), mean.cpu().double()
        into += x.numel() // x.shape[1] * torch.stack([torch.ones_like(mean), mean, variance + mean**2])

    hooks = [
        layer.register_forward_pre_hook(lambda layer, given, into=into: look(into, given[0]))
        for layer, into in zip(layers, sums, strict=True)
    ]
    try:
        with _normalising_by_batch(network, layers):
            for images in batches:
                with accelerator.autocast():
                    network(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        return
    every = torch.cat(sums, dim=1)
    if accelerator.num_processes > 1:
        every = accelerator.reduce(every.to(accelerator.device), reduction="sum").cpu()
    for layer, (count, first, second) in zip(layers, every.split([one.shape[1] for one in sums], dim=1), strict=True):
        mean = first / count
        variance = (second / count - mean**2).clamp_min(0) * count / (count - 1)  # unbiased, as torch keeps it
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)


@contextmanager
def _normalising_by_batch(network: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Those layers in training mode, but with no memory; everything else in evaluation mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        for layer in layers:
            layer.train()
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for module, mode in modes:
            module.training = mode
