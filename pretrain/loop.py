"""Pretraining: archive → encoder. Build, prepare, resume, loop, save, report."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from pretrain.archive import Archive, read_archive
from pretrain.archive_map import archive_map
from pretrain.example_views import example_views
from pretrain.loader import ContrastiveSets, reading
from pretrain.network import PretrainingNetwork, build_network, build_optimizer
from pretrain.non_finite import NonFinite
from pretrain.objective import build_loss, loss_state, restore_loss
from pretrain.probe.probe import Probe
from pretrain.recipe import PretrainRecipe
from pretrain.refusals import refuse_impossible
from pretrain.report import write_report
from pretrain.save import mirror_encoder, save_encoder
from pretrain.step import add_gradients, fault_of, gradient_norm
from resunet.gradients import GradientRecord
from resunet.light_weights import weights_input
from resunet.progress import progress
from resunet.ranks import by_main_rank, on_every_rank, refuse_other_steps
from resunet.runs import Run, check_out, is_done
from resunet.step_clock import StepClock
from resunet.stopping import StopRequest, failing_as, stop_on_sigterm
from resunet.training import any_rank, learning_rate, mean_over_ranks, restore_training, start_ranks, take_step, training_state

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
    refuse_impossible(recipe, archive, speaks=main)
    sets = ContrastiveSets(archive.scans, recipe, accelerator.process_index)

    torch.manual_seed(recipe.seed)
    network = build_network(recipe, accelerator)
    optimizer = build_optimizer(recipe, network)
    criterion = build_loss(recipe.objective, recipe.temperature, recipe.head.output).to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(network, optimizer)

    probe = Probe(recipe, archive, accelerator)
    inputs = {"data": archive.digest} | probe.inputs() | weights_input(recipe.model)
    if archive.held_out_digest is not None:
        inputs["data.held_out"] = archive.held_out_digest
    accelerator.wait_for_everyone()  # every rank has seen that `out` is free before the main one makes it
    run = on_every_rank(lambda: Run(recipe, "pretrain", inputs, writes=main), accelerator)
    work = _Work(recipe, accelerator, run, archive, sets, network, optimizer, criterion, wrapped, probe)
    with failing_as(run), stop_on_sigterm() as stop:
        clock = _train(work, stop)
        stop.release()
        _finish(work, clock)
    accelerator.wait_for_everyone()
    return recipe.out


@dataclass(frozen=True)
class _Work:
    """A pretraining that is set up. wrapped: the network as the accelerator prepared it, which a step calls."""

    recipe: PretrainRecipe
    accelerator: Accelerator
    run: Run
    archive: Archive
    sets: ContrastiveSets
    network: PretrainingNetwork
    optimizer: Optimizer
    criterion: nn.Module
    wrapped: nn.Module
    probe: Probe

    def write(self, step: Callable[[], object]) -> None:
        """On the main rank; what fails there fails everywhere."""
        by_main_rank(step, folder=self.run.folder, accelerator=self.accelerator)


def _train(work: _Work, stop: StopRequest) -> StepClock:
    """All steps, from the last checkpoint on; the time they took.

    Raises:
        Stopped: SIGTERM, after its step is saved. CheckFailed: a loss or gradient that is not finite.
    """
    recipe, run, accelerator, probe = work.recipe, work.run, work.accelerator, work.probe
    network, optimizer, criterion = work.network, work.optimizer, work.criterion
    main = accelerator.is_main_process
    first, clock = 0, StepClock()
    non_finite = NonFinite(recipe.out, recipe.on_non_finite == "skip", work.archive.scans.cases, main)
    if (state := run.load_checkpoint("last")) is not None:
        first = restore_training(state, network, optimizer, accelerator)
        restore_loss(criterion, state["loss"])
        clock = StepClock(state)
        probe.restore(state)
        non_finite.in_a_row = state["skipped_in_a_row"]
    refuse_other_steps(first, run.folder, accelerator)
    work.write(partial(run.rewind, first if state is not None else -1))  # the probe's line of step 0 is of a checkpoint only
    work.write(partial(probe.record, run))
    if first == 0 and probe.due(0):
        looked = probe.look(network.encoder, 0)
        work.write(lambda: run.log(0, looked))
    work.write(partial(non_finite.rewind, first))
    gradients = GradientRecord(run.folder, recipe, math.inf, first, main, run.mirror)
    figures: dict[str, float] = {}
    indices = range(first * recipe.accumulate, recipe.steps * recipe.accumulate)
    with reading(work.sets, indices, recipe.data.workers, pin=accelerator.device.type == "cuda") as reader:
        for step in progress(range(first, recipe.steps), recipe.steps, "pretrain", first, not main, figures):
            lr = learning_rate(step, recipe.steps, recipe.warmup, recipe.peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            non_finite.before(network, criterion)
            metrics, rows = add_gradients(recipe, work.archive, reader, step, work.wrapped, criterion, accelerator)
            norm = gradient_norm(network, optimizer, accelerator)
            done = step + 1
            if (fault := fault_of(metrics["loss"], norm, network, accelerator)) is not None:
                non_finite.leave_out(done, fault, rows, accelerator)
                metrics = {"skipped": 1.0}
            else:
                non_finite.passed()
                if gradients.due(done):
                    work.write(partial(gradients.take, done, network, norm))
                figures |= {name: metrics[name] for name in _TOLD if name in metrics}
                metrics |= take_step(optimizer, norm, done, accelerator)
            clock.tick()

            stopping = any_rank(bool(stop), accelerator)
            probing = probe.due(done)
            choosing = probing and probe.chooses
            if done % recipe.log_every == 0 or done == recipe.steps or probing:
                looked = probe.look(network.encoder, done) if probing else {}
                work.write(partial(run.log, done, mean_over_ranks(metrics, accelerator) | {"learning_rate": lr} | looked))
            # not of a network that may be lost: those before stand
            saving = done % recipe.checkpoint_every == 0 and not non_finite.in_a_row
            if saving or done == recipe.steps or stopping or choosing:
                state = training_state(done, network, optimizer, accelerator)
                state |= {"loss": loss_state(criterion), "skipped_in_a_row": non_finite.in_a_row} | clock.state()
                work.write(partial(run.save_checkpoint, done, state | probe.state(), best=choosing and probe.improved))
            if stopping and done < recipe.steps:
                stop.stop(run, done)
    return clock


def _finish(work: _Work, clock: StepClock) -> None:
    """The encoder, of the checkpoint that the recipe says, and the run's pages."""
    recipe, run, archive, network, probe = work.recipe, work.run, work.archive, work.network, work.probe
    spent = clock.record(work.accelerator)

    def save() -> None:
        if probe.chooses and (best := run.load_checkpoint("best")) is not None:
            network.load_state_dict(best["network"])
        save_encoder(recipe, network.encoder, archive, probe.scans, network.decoder)
        mirror_encoder(run, archive)
        shown = example_views(recipe, work.sets, work.accelerator)
        write_report(recipe, archive, shown, archive_map(recipe, archive, network.encoder), probe)
        run.finish("done", step=recipe.steps, **spent)

    work.write(save)
