"""Pretraining: archive → encoder. Build, prepare, resume, loop, save, report; one function reads top to bottom."""

import math
from functools import partial
from pathlib import Path

import torch

from pretrain.archive import read_archive
from pretrain.archive_map import archive_map
from pretrain.example_views import example_views
from pretrain.loader import ContrastiveSets, reading
from pretrain.network import build_network, build_optimizer
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
from resunet.stopping import failing_as, stop_on_sigterm
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
    writing = partial(by_main_rank, folder=run.folder, accelerator=accelerator)
    with failing_as(run), stop_on_sigterm() as stop:
        first, clock = 0, StepClock()
        non_finite = NonFinite(recipe.out, recipe.on_non_finite == "skip", archive.scans.cases, main)
        if (state := run.load_checkpoint("last")) is not None:
            first = restore_training(state, network, optimizer, accelerator)
            restore_loss(criterion, state["loss"])
            clock = StepClock(state)
            probe.restore(state)
        refuse_other_steps(first, run.folder, accelerator)
        writing(partial(run.rewind, first if state is not None else -1))  # the probe's line of step 0 is of a checkpoint only
        writing(partial(probe.record, run))
        if first == 0 and probe.due(0):
            looked = probe.look(network.encoder, 0)
            writing(lambda: run.log(0, looked))
        non_finite.in_a_row = state["skipped_in_a_row"] if state is not None else 0
        writing(partial(non_finite.rewind, first))
        gradients = GradientRecord(run.folder, recipe, math.inf, first, main, run.mirror)
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
                norm = gradient_norm(network, optimizer, accelerator)
                fault = fault_of(metrics["loss"], norm, network, accelerator)
                if fault is not None:
                    non_finite.leave_out(step + 1, fault, rows, accelerator)
                    metrics = {"skipped": 1.0}
                else:
                    non_finite.passed()
                    if gradients.due(step + 1):
                        writing(partial(gradients.take, step + 1, network, norm))
                    figures |= {name: metrics[name] for name in _TOLD if name in metrics}
                    metrics |= take_step(optimizer, norm, step + 1, accelerator)
                clock.tick()
                done = step + 1
                probing = probe.due(done)
                if done % recipe.log_every == 0 or done == recipe.steps or probing:
                    judged = probe.look(network.encoder, done) if probing else {}
                    logged = mean_over_ranks(metrics, accelerator) | {"learning_rate": lr} | judged
                    writing(partial(run.log, done, logged))
                stopping = any_rank(bool(stop), accelerator)
                choosing = probing and probe.chooses
                # not of a network that may be lost: those before stand
                saving = done % recipe.checkpoint_every == 0 and not non_finite.in_a_row
                if saving or done == recipe.steps or stopping or choosing:
                    state = training_state(done, network, optimizer, accelerator)
                    state |= {"loss": loss_state(criterion), "skipped_in_a_row": non_finite.in_a_row} | clock.state()
                    writing(partial(run.save_checkpoint, done, state | probe.state(), best=choosing and probe.improved))
                if stopping and done < recipe.steps:
                    stop.stop(run, done)

        stop.release()
        spent = clock.record(accelerator)

        def save() -> None:
            if probe.chooses and (best := run.load_checkpoint("best")) is not None:
                network.load_state_dict(best["network"])
            save_encoder(recipe, network.encoder, archive, probe.scans, network.decoder)
            mirror_encoder(run, archive)
            shown = example_views(recipe, sets, accelerator)
            write_report(recipe, archive, shown, archive_map(recipe, archive, network.encoder), probe)
            run.finish("done", step=recipe.steps, **spent)

        writing(save)
    accelerator.wait_for_everyone()
    return recipe.out
