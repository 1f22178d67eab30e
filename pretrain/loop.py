"""Pretraining: archive → encoder. Build, prepare, resume, loop, save, report; one function reads top to bottom."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from lightly.utils.lars import LARS
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pretrain.archive import Archive, read_archive
from pretrain.backward import backward_in_chunks, backward_whole
from pretrain.loader import ContrastiveSet, ContrastiveSets, reading
from pretrain.losses import Items
from pretrain.non_finite import NonFinite, suspects
from pretrain.objective import SimCLR, build_loss, contrast, loss_state, restore_loss
from pretrain.ranks import on_every_rank
from pretrain.recipe import PretrainRecipe
from pretrain.report import write_report
from pretrain.views import make_views
from resunet.checkpoint import ModelConfig, Provenance
from resunet.data.images import channel_count
from resunet.data.leakage import ARCHIVE, write_archive
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.files import folder_aside
from resunet.gradients import GradientRecord
from resunet.progress import progress, say
from resunet.runs import Run, check_out, is_done, versions
from resunet.training import (
    StepClock,
    any_rank,
    failing_as,
    learning_rate,
    mean_over_ranks,
    parameter_groups,
    restore_training,
    start_ranks,
    step_generator,
    stop_on_sigterm,
    training_state,
)
from resunet.transfer import fingerprint

_VIEWS = 1  # names the random stream of the views in step_generator
_SHOWN = 8  # scans on the report's picture of views
_TOLD = ("loss", "projection_std", "embedding_std")  # beside the progress


def pretrain(recipe: PretrainRecipe) -> Path:
    """Run a pretraining recipe; the run directory.

    Raises:
        ResUNetError: input, environment, a leak, a loss that is not finite, or SIGTERM; see `resunet.errors`.
    """
    check_out(recipe)
    if is_done(recipe.out):
        return recipe.out
    accelerator = start_ranks(recipe, recipe.batch, "scans")
    main = accelerator.is_main_process
    archive = read_archive(recipe, accelerator)
    if archive.scans.num_slices < recipe.batch:
        raise InputError(
            f"batch={recipe.batch}: the archive has only {archive.scans.num_slices} slices with any contrast. Set a smaller batch."
        )
    _check_objective(recipe, archive, main)
    sets = ContrastiveSets(archive.scans, recipe, accelerator.process_index)

    torch.manual_seed(recipe.seed)
    network = _network(recipe, accelerator)
    optimizer = _optimizer(recipe, network)
    criterion = build_loss(recipe.objective, recipe.temperature, recipe.head.output).to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(network, optimizer)

    inputs = {"data": archive.digest}
    accelerator.wait_for_everyone()  # every rank has seen that `out` is free before the main one makes it
    run = Run(recipe, "pretrain", inputs, writes=main)
    with failing_as(run), stop_on_sigterm() as stop:
        first, clock = 0, StepClock()
        non_finite = NonFinite(recipe.out, recipe.on_non_finite == "skip", archive.scans.cases, main)
        if (state := run.load_checkpoint("last")) is not None:
            first = restore_training(state, network, optimizer, accelerator)
            restore_loss(criterion, state["loss"])
            clock = StepClock(state["seconds"])
        run.rewind(first)
        non_finite.rewind(first, state["skipped_in_a_row"] if state is not None else 0)
        gradients = GradientRecord(run.folder, math.inf, first, writes=main)
        figures: dict[str, float] = {}
        indices = range(first * recipe.accumulate, recipe.steps * recipe.accumulate)
        with reading(sets, indices, recipe.data.workers, pin=accelerator.device.type == "cuda") as reader:
            for step in progress(range(first, recipe.steps), recipe.steps, "pretrain", first, not main, figures):
                lr = learning_rate(step, recipe.steps, recipe.warmup, recipe.peak_lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                non_finite.before(network, criterion)
                metrics, rows = _add_gradients(recipe, archive, reader, step, wrapped, criterion, accelerator)
                metrics["gradient_norm"] = _gradient_norm(network, optimizer, accelerator)
                fault = _fault(metrics, network, accelerator)
                if fault is not None:
                    non_finite.leave_out(step + 1, fault, rows, accelerator)
                    metrics = {"skipped": 1.0}
                else:
                    non_finite.passed()
                    if step == 0 or (step + 1) % recipe.log_every == 0:
                        gradients.take(step + 1, network, metrics["gradient_norm"])
                    figures |= {name: metrics[name] for name in _TOLD}
                    optimizer.step()
                clock.tick()
                done = step + 1
                if done % recipe.log_every == 0 or done == recipe.steps:
                    run.log(done, mean_over_ranks(metrics, accelerator) | {"learning_rate": lr})
                stopping = any_rank(bool(stop), accelerator)
                if done % recipe.checkpoint_every == 0 or done == recipe.steps or stopping:
                    state = training_state(done, network, optimizer, accelerator)
                    state |= {
                        "loss": loss_state(criterion),
                        "skipped_in_a_row": non_finite.in_a_row,
                        "seconds": clock.seconds(),
                    }
                    run.save_checkpoint(done, state)
                if stopping and done < recipe.steps:
                    stop.stop(run, done)

        stop.release()
        if main:
            _save_encoder(recipe, network.encoder, archive)
            write_report(recipe, archive, _example(recipe, sets))
        run.finish("done", step=recipe.steps, seconds=round(clock.seconds(), 1), seconds_per_step=clock.seconds_per_step())
    accelerator.wait_for_everyone()
    return recipe.out


def _add_gradients(
    recipe: PretrainRecipe,
    archive: Archive,
    reader: Iterator[ContrastiveSet],
    step: int,
    network: nn.Module,
    criterion: nn.Module,
    accelerator: Accelerator,
) -> tuple[dict[str, float], Tensor]:
    """The gradients of one step's contrastive sets; what they say, averaged over the sets, and this rank's `suspects`."""
    metrics: dict[str, float] = {}
    rows: list[Tensor] = []
    backward = backward_whole if recipe.cache_chunk is None else partial(backward_in_chunks, chunk=recipe.cache_chunk)
    for part in range(recipe.accumulate):
        windows = on_every_rank(partial(next, reader), accelerator)
        views = _views(recipe, windows, step * recipe.accumulate + part, accelerator)
        score = partial(contrast, criterion=criterion, items=_items(archive, windows, accelerator.device))
        last = part == recipe.accumulate - 1
        terms, projection = backward(
            network, views, score=score, weight=1 / recipe.accumulate, accelerator=accelerator, synchronise=last
        )
        rows.append(suspects(windows.scan, views, projection))
        for name, value in terms.items():
            metrics[name] = metrics.get(name, 0.0) + float(value) / recipe.accumulate
    return metrics, torch.cat(rows)


def _views(recipe: PretrainRecipe, windows: ContrastiveSet, index: int, accelerator: Accelerator) -> Tensor:
    """The views of this rank's share of the `index`-th contrastive set: (2 · batch / ranks, C, S, S)."""
    device = accelerator.device
    generator = step_generator(device, recipe.seed, _VIEWS, index, rank=0)  # one stream, of which each rank takes its share
    first = accelerator.process_index * len(windows.windows)
    scans = windows.windows.to(device, non_blocking=True)
    views = make_views(scans, windows.sizes, windows.anchors, recipe.views, generator, first, recipe.batch)
    return views.contiguous(memory_format=torch.channels_last)


def _items(archive: Archive, windows: ContrastiveSet, device: torch.device) -> Items:
    group = torch.from_numpy(archive.groups[windows.scan.numpy()])
    return Items(group.to(device), windows.axis.to(device), windows.position.to(device))


def _gradient_norm(network: nn.Module, optimizer: Optimizer, accelerator: Accelerator) -> float:
    """L2, over all parameters; the same on every rank."""
    accelerator.unscale_gradients(optimizer)
    return float(nn.utils.get_total_norm([one.grad for one in network.parameters() if one.grad is not None]))


def _fault(metrics: dict[str, float], network: nn.Module, accelerator: Accelerator) -> str | None:
    """What is not finite on any rank. With fp16 gradients may overflow: the scaler leaves such steps out and scales less."""
    kept = [buffer.isfinite().all() for buffer in network.buffers()]
    # batch norm makes zeros of scans that are beyond all others: the loss is finite, what it keeps for later is not
    statistics = 0.0 if not kept or torch.stack(kept).all() else math.nan
    gradient = metrics["gradient_norm"] if accelerator.scaler is None else 0.0
    values = torch.tensor([metrics["loss"], statistics, gradient], device=accelerator.device)
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="mean")  # one rank's NaN is everyone's
    loss, statistics, gradient = values.tolist()
    if not math.isfinite(loss):
        return f"the loss is not finite ({loss})"
    if not math.isfinite(statistics):
        return "the running statistics of batch norm are not finite"
    return None if math.isfinite(gradient) else f"the gradient is not finite ({gradient})"


def _check_objective(recipe: PretrainRecipe, archive: Archive, main: bool) -> None:
    """What only the archive can tell of the recipe's objective.

    Raises:
        InputError: same_group=ignore where all scans are of one group: nothing would be left to tell apart.
    """
    if recipe.objective.same_group == "ignore" and archive.num_groups == 1:
        raise InputError(
            "objective.same_group=ignore: all scans of the archive are of one group, so that no negatives are left. Set "
            "same_group=negative, or give the groups (groups.csv, or resunet index)."
        )
    bank = recipe.objective.memory_bank
    if main and bank is not None and 2 * bank > archive.scans.num_slices:
        say(
            f"objective.memory_bank={bank}: more than half of the {archive.scans.num_slices:,} slices of the archive; scans are "
            "then repelled by their own earlier projections, and such training has been unstable"
        )


def _network(recipe: PretrainRecipe, accelerator: Accelerator) -> SimCLR:
    architecture = recipe.model.architecture(channel_count(recipe.data.channels))
    network = SimCLR(ResidualEncoder(**architecture.model_dump(exclude={"name"})), recipe.head)
    if accelerator.num_processes > 1:
        if accelerator.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        elif accelerator.is_main_process and (recipe.model.norm == "batch" or recipe.head.batch_norm):
            say(
                "batch norm on CPUs has each rank's own statistics, so that the result depends on the number of ranks; exact are "
                "model.norm=group head.batch_norm=false"
            )
    placed: SimCLR = network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _optimizer(recipe: PretrainRecipe, network: SimCLR) -> Optimizer:
    groups = parameter_groups({"network": network}, recipe.optimizer.weight_decay)
    if recipe.optimizer.name == "lars":
        lars: Optimizer = LARS(groups, lr=recipe.peak_lr, momentum=0.9)
        return lars
    return AdamW(groups, lr=recipe.peak_lr)


def _save_encoder(recipe: PretrainRecipe, encoder: ResidualEncoder, archive: Archive) -> None:
    encoder.config = ModelConfig(
        architecture=encoder.config.architecture,
        input_channels=recipe.data.channels,
        normalisation=recipe.normalisation,
        provenance=Provenance(data_sha256=archive.digest, recipe_sha256=recipe.sha256(), versions=versions()),
        feature_check=fingerprint(encoder),
        allowed=archive.allowed,
    )
    with folder_aside(recipe.out / "model") as aside:
        encoder.save_pretrained(aside)
        write_archive(aside / ARCHIVE, archive.evidence)


def _example(recipe: PretrainRecipe, sets: ContrastiveSets) -> list[NDArray[np.float32]]:
    """A few windows with their two views, one row each side by side, for the report: (S, 3 S) greys in [0, 1]."""
    scans, sizes, anchors = (part[:_SHOWN] for part in sets.read(0)[:3])
    generator = step_generator(torch.device("cpu"), recipe.seed, _VIEWS, 0, rank=0)
    views = make_views(scans, sizes, anchors, recipe.views, generator, 0, recipe.batch).mean(dim=1).chunk(2)
    size = (recipe.views.size, recipe.views.size)
    rows = []
    for i, (height, width) in enumerate(sizes.tolist()):
        scan = scans[i, :, :height, :width]
        whole = torch.nn.functional.interpolate(scan[None], size, mode="area")[0].mean(dim=0)
        row = torch.cat([whole, views[0][i], views[1][i]], dim=1)
        rows.append(((row - whole.min()) / (whole.max() - whole.min())).clamp(0, 1).numpy())
    return rows
