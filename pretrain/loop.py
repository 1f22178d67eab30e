"""Pretraining: archive → encoder. Build, prepare, resume, loop, save, report; one function reads top to bottom."""

import math
from pathlib import Path

import torch

from pretrain.archive import Archive, read_archive
from pretrain.example_views import example_views
from pretrain.loader import ContrastiveSets, reading
from pretrain.network import build_network, build_optimizer
from pretrain.non_finite import NonFinite
from pretrain.objective import build_loss, loss_state, restore_loss
from pretrain.recipe import PretrainRecipe
from pretrain.report import write_report
from pretrain.save import save_encoder
from pretrain.step import add_gradients, fault_of, gradient_norm
from resunet.errors import InputError
from resunet.gradients import GradientRecord
from resunet.progress import progress, say
from resunet.runs import Run, check_out, is_done
from resunet.training import (
    StepClock,
    any_rank,
    failing_as,
    learning_rate,
    mean_over_ranks,
    restore_training,
    start_ranks,
    stop_on_sigterm,
    training_state,
)

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
    network = build_network(recipe, accelerator)
    optimizer = build_optimizer(recipe, network)
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
                metrics, rows = add_gradients(recipe, archive, reader, step, wrapped, criterion, accelerator)
                metrics["gradient_norm"] = gradient_norm(network, optimizer, accelerator)
                fault = fault_of(metrics, network, accelerator)
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
            save_encoder(recipe, network.encoder, archive)
            write_report(recipe, archive, example_views(recipe, sets))
        run.finish("done", step=recipe.steps, seconds=round(clock.seconds(), 1), seconds_per_step=clock.seconds_per_step())
    accelerator.wait_for_everyone()
    return recipe.out


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
