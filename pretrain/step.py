"""One step of pretraining: the gradients of its sets, and whether they can be used."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain.archive import Archive
from pretrain.backward import Score, backward_in_chunks, backward_whole
from pretrain.crop import AffineMap
from pretrain.loader import ContrastiveSet
from pretrain.losses import Items
from pretrain.network import Inputs
from pretrain.non_finite import suspects
from pretrain.objective import score
from pretrain.places import PLACES_STREAM, Matches, matching_places
from pretrain.recipe import PretrainRecipe
from pretrain.views import VIEWS_STREAM, Views, make_views
from resunet.draws import Draws
from resunet.layout import channels_last
from resunet.ranks import on_every_rank
from resunet.training import step_generator


def add_gradients(
    recipe: PretrainRecipe,
    archive: Archive,
    reader: Iterator[ContrastiveSet],
    step: int,
    network: nn.Module,
    criterion: nn.Module,
    accelerator: Accelerator,
) -> tuple[dict[str, float], Tensor]:
    """The gradients of one step's sets; what they say, averaged over the sets, and this rank's `suspects`."""
    metrics: dict[str, float] = {}
    rows: list[Tensor] = []
    backward = backward_whole if recipe.cache_chunk is None else partial(backward_in_chunks, chunk=recipe.cache_chunk)
    for part in range(recipe.accumulate):
        windows = on_every_rank(partial(next, reader), accelerator)
        inputs, scored = objectives_of_set(recipe, archive, windows, step * recipe.accumulate + part, criterion, accelerator)
        last = part == recipe.accumulate - 1
        terms, outputs = backward(
            network, inputs, score=scored, weight=1 / recipe.accumulate, accelerator=accelerator, synchronise=last
        )
        rows.append(suspects(windows.scan, inputs.views, outputs.projection))
        for name, value in terms.items():
            metrics[name] = metrics.get(name, 0.0) + float(value) / recipe.accumulate
    return metrics, torch.cat(rows)


def objectives_of_set(
    recipe: PretrainRecipe,
    archive: Archive,
    windows: ContrastiveSet,
    index: int,
    criterion: nn.Module,
    accelerator: Accelerator,
) -> tuple[Inputs, Score]:
    """What the network is given of this rank's share of the `index`-th set, and the losses of what it makes of it."""
    windows = windows._replace(windows=windows.windows.to(accelerator.device, non_blocking=True))  # once, for all views
    views, where = placed_views_of_set(recipe, windows, index, accelerator)
    inputs, matched = Inputs(views), None
    if recipe.dense is not None:
        matches = matches_of_set(recipe, recipe.dense.points, windows, where, index, accelerator)
        inputs, matched = Inputs(views, matches.places), matches.found
    items = _items(archive, windows, accelerator.device)
    return inputs, partial(score, recipe=recipe, criterion=criterion, items=items, matched=matched)


def views_of_set(recipe: PretrainRecipe, windows: ContrastiveSet, index: int, accelerator: Accelerator) -> Tensor:
    """The views of this rank's share of the `index`-th set: (2 · batch / ranks, C, *size)."""
    return placed_views_of_set(recipe, windows, index, accelerator).values


def placed_views_of_set(recipe: PretrainRecipe, windows: ContrastiveSet, index: int, accelerator: Accelerator) -> Views:
    """The same, and where they are in the windows."""
    draws = _draws(recipe, VIEWS_STREAM, windows, index, accelerator)
    scans = windows.windows.to(accelerator.device, non_blocking=True)
    generator, first, total = draws.generator, draws.places.start, draws.total
    views = make_views(scans, windows.sizes, windows.anchors, recipe.views, generator, first, total, spacing=windows.spacing)
    return views._replace(values=channels_last(views.values))


def matches_of_set(
    recipe: PretrainRecipe,
    count: int,
    windows: ContrastiveSet,
    places: tuple[AffineMap, AffineMap],
    index: int,
    accelerator: Accelerator,
) -> Matches:
    """Up to `count` matching places of every scan in this rank's share of the `index`-th set."""
    return matching_places(places, windows.sizes, count, _draws(recipe, PLACES_STREAM, windows, index, accelerator))


def _draws(recipe: PretrainRecipe, stream: int, windows: ContrastiveSet, index: int, accelerator: Accelerator) -> Draws:
    """One stream of random numbers for the `index`-th set, of which each rank takes its share."""
    generator = step_generator(accelerator.device, recipe.seed, stream, index, place=0)
    share = len(windows.sizes)
    first = accelerator.process_index * share
    return Draws(generator, range(first, first + share), recipe.batch)


def _items(archive: Archive, windows: ContrastiveSet, device: torch.device) -> Items:
    group = torch.from_numpy(archive.groups[windows.scan.numpy()])
    return Items(group.to(device), windows.axis.to(device), windows.position.to(device))


def gradient_norm(network: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> float:
    """L2, over all parameters; the same on every rank."""
    accelerator.unscale_gradients(optimizer)
    return float(nn.utils.get_total_norm([one.grad for one in network.parameters() if one.grad is not None]))


def fault_of(loss: float, norm: float, network: nn.Module, accelerator: Accelerator) -> str | None:
    """What is not finite on any rank. With fp16 gradients may overflow: the scaler leaves such steps out and scales less."""
    kept = [buffer.flatten() for buffer in network.buffers() if buffer.is_floating_point()]
    # batch norm makes zeros of scans that are beyond all others: the loss is finite, what it keeps for later is not
    statistics = 0.0 if not kept or torch.cat(kept).isfinite().all() else math.nan
    values = torch.tensor([loss, statistics, norm if accelerator.scaler is None else 0.0], device=accelerator.device)
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="mean")  # one rank's NaN is everyone's
    loss, statistics, gradient = values.tolist()
    if not math.isfinite(loss):
        return f"the loss is not finite ({loss})"
    if not math.isfinite(statistics):
        return "the running statistics of batch norm are not finite"
    return None if math.isfinite(gradient) else f"the gradient is not finite ({gradient})"
