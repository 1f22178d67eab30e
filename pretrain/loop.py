"""Pretraining: archive → encoder. Build, prepare, resume, loop, save, report; one function reads top to bottom."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from lightly.utils.lars import LARS
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pretrain.archive import Archive, read_archive
from pretrain.loader import ContrastiveSet, ContrastiveSets, reading
from pretrain.objective import SimCLR, contrast, nt_xent
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
from resunet.progress import progress
from resunet.runs import Run, check_out, is_done, versions
from resunet.training import (
    StepClock,
    any_rank,
    failing_as,
    learning_rate,
    mean_over_ranks,
    parameter_groups,
    refuse_non_finite,
    restore_training,
    start_ranks,
    step_generator,
    stop_on_sigterm,
    training_state,
)
from resunet.transfer import fingerprint

_VIEWS = 1  # names the random stream of the views in step_generator
_SHOWN = 8  # scans on the report's picture of views


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
    sets = ContrastiveSets(archive.scans, recipe, accelerator.process_index)

    torch.manual_seed(recipe.seed)
    architecture = recipe.model.architecture(channel_count(recipe.data.channels))
    encoder = ResidualEncoder(**architecture.model_dump(exclude={"name"}))
    network = SimCLR(encoder, recipe.head)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(recipe, network)
    criterion = nt_xent(recipe.temperature)
    wrapped, optimizer = accelerator.prepare(network, optimizer)

    inputs = {"data": archive.digest}
    accelerator.wait_for_everyone()  # every rank has seen that `out` is free before the main one makes it
    run = Run(recipe, "pretrain", inputs, writes=main)
    with failing_as(run), stop_on_sigterm() as stop:
        first, clock = 0, StepClock()
        if (state := run.load_checkpoint("last")) is not None:
            first = restore_training(state, network, optimizer, accelerator)
        run.rewind(first)
        figures: dict[str, float] = {}
        indices = range(first * recipe.accumulate, recipe.steps * recipe.accumulate)
        with reading(sets, indices, recipe.data.workers, pin=accelerator.device.type == "cuda") as reader:
            for step in progress(range(first, recipe.steps), recipe.steps, "pretrain", first, not main, figures):
                lr = learning_rate(step, recipe.steps, recipe.warmup, recipe.optimizer.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                metrics: dict[str, float] = {}
                for part in range(recipe.accumulate):
                    windows = on_every_rank(partial(next, reader), accelerator)
                    views = _views(recipe, windows, step * recipe.accumulate + part, accelerator)
                    last_part = part == recipe.accumulate - 1
                    with nullcontext() if last_part else accelerator.no_sync(wrapped):
                        with accelerator.autocast():
                            embedding, projection = wrapped(views)
                        terms = contrast(embedding, projection, criterion)
                        accelerator.backward(terms["loss"] / recipe.accumulate)
                    for name, value in terms.items():
                        metrics[name] = metrics.get(name, 0.0) + float(value.detach()) / recipe.accumulate
                refuse_non_finite({"loss": metrics["loss"]}, step, accelerator)
                figures |= metrics
                optimizer.step()
                clock.tick()
                done = step + 1
                if done % recipe.log_every == 0 or done == recipe.steps:
                    run.log(done, mean_over_ranks(metrics, accelerator) | {"learning_rate": lr})
                stopping = any_rank(bool(stop), accelerator)
                if done % recipe.checkpoint_every == 0 or done == recipe.steps or stopping:
                    run.save_checkpoint(done, training_state(done, network, optimizer, accelerator))
                if stopping and done < recipe.steps:
                    stop.stop(run, done)

        stop.release()
        if main:
            _save_encoder(recipe, encoder, archive)
            write_report(recipe, archive, _example(recipe, sets))
        run.finish("done", step=recipe.steps, seconds_per_step=clock.seconds_per_step())
    accelerator.wait_for_everyone()
    return recipe.out


def _views(recipe: PretrainRecipe, windows: ContrastiveSet, index: int, accelerator: Accelerator) -> Tensor:
    """The views of this rank's share of the `index`-th contrastive set: (2 · batch / ranks, C, S, S)."""
    scans, sizes, anchors = windows
    device = accelerator.device
    generator = step_generator(device, recipe.seed, _VIEWS, index, accelerator.process_index)
    views = make_views(scans.to(device, non_blocking=True), sizes, anchors, recipe.views, generator)
    return views.contiguous(memory_format=torch.channels_last)


def _optimizer(recipe: PretrainRecipe, network: SimCLR) -> Optimizer:
    groups = parameter_groups({"network": network}, recipe.optimizer.weight_decay)
    if recipe.optimizer.name == "lars":
        lars: Optimizer = LARS(groups, lr=recipe.optimizer.lr, momentum=0.9)
        return lars
    return AdamW(groups, lr=recipe.optimizer.lr)


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
    scans, sizes, anchors = (part[:_SHOWN] for part in sets.read(0))
    generator = step_generator(torch.device("cpu"), recipe.seed, _VIEWS, 0, 0)
    views = make_views(scans, sizes, anchors, recipe.views, generator).mean(dim=1).chunk(2)
    size = (recipe.views.size, recipe.views.size)
    rows = []
    for i, (height, width) in enumerate(sizes.tolist()):
        scan = scans[i, :, :height, :width]
        whole = torch.nn.functional.interpolate(scan[None], size, mode="area")[0].mean(dim=0)
        row = torch.cat([whole, views[0][i], views[1][i]], dim=1)
        rows.append(((row - whole.min()) / (whole.max() - whole.min())).clamp(0, 1).numpy())
    return rows
