"""Fine-tuning: labelled cases and an encoder (or none) → segmenter. Build, prepare, resume, loop, save, evaluate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from finetune.beforehand import tell_beforehand, tell_windows
from finetune.choices import Choices, choose_on_val, refuse_impossible
from finetune.distillation.teacher import Teacher, load_teacher
from finetune.evaluation.alarms import notes_of
from finetune.evaluation.evaluate import Measured, predicting, write_evaluation
from finetune.evaluation.targets import targets_of
from finetune.judging import measure, validate
from finetune.labelled import LabelledData, read_labelled, resolve, sampler_of
from finetune.mirrored import mirror_evaluation, mirror_segmenter
from finetune.recipe import FinetuneRecipe
from finetune.report import write_report
from finetune.step import (
    Learner,
    apply_gradients,
    begins_trained,
    build,
    forward_backward,
    prepare,
    refresh_statistics,
    start_step,
    teacher_of,
    told,
)
from finetune.training.batch_statistics import share_statistics
from finetune.training.patches import Batches
from resunet.checkpoint import WEIGHTS, ModelConfig, Provenance, model_folder
from resunet.data.cases import source_digest
from resunet.data.leakage import ARCHIVE, evidence_of_cases, merge_archives, write_archive
from resunet.files import folder_aside, sha256, write_text
from resunet.gradients import GradientRecord
from resunet.light_weights import weights_input
from resunet.machine import versions
from resunet.model import Segmenter
from resunet.progress import progress
from resunet.ranks import by_main_rank, on_every_rank, other_folder, refuse_other_steps
from resunet.runs import Run, check_out, is_done
from resunet.step_clock import StepClock
from resunet.stopping import StopRequest, failing_as, stop_on_sigterm
from resunet.training import any_rank, mean_over_ranks, restore_training, start_ranks, training_state
from resunet.transfer import Receipt


def finetune(recipe: FinetuneRecipe) -> Path:
    """Run a fine-tuning recipe; the run directory.

    Raises:
        ResUNetError: input, environment, a leak, a loss that is not finite, or SIGTERM; see `resunet.errors`.
    """
    assert recipe.data.folds is None or recipe.data.fold is not None, "cross_validation.folds trains them one after another"
    recipe = resolve(recipe)
    check_out(recipe)
    if is_done(recipe.out):
        return recipe.out
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    main, device = accelerator.is_main_process, accelerator.device

    def read() -> tuple[Segmenter, Receipt | None, Teacher | None, LabelledData]:
        network, loaded = build(recipe)
        given = load_teacher(recipe, device), read_labelled(recipe, quiet=not main)
        refuse_impossible(recipe, given[1])
        return network, loaded, *given

    model, receipt, teacher, data = on_every_rank(read, accelerator)
    if main:
        tell_beforehand(recipe, data, accelerator.num_processes)
    learner = prepare(recipe, model, receipt, accelerator)
    on_every_rank(partial(tell_windows, recipe, learner.judged, data, quiet=not main), accelerator)
    sampler = sampler_of(recipe, data)
    accelerator.wait_for_everyone()  # every rank has seen that `out` is free before the main one makes it

    inputs = _inputs(recipe, data, receipt, teacher) | weights_input(recipe.model)
    run = on_every_rank(lambda: Run(recipe, "finetune", inputs, writes=main), accelerator)
    work = _Work(recipe, accelerator, run, learner, data, sampler, teacher, receipt)
    with failing_as(run), stop_on_sigterm() as stop:
        clock = _train(work, stop)
        stop.release()
        _finish(work, clock)
    accelerator.wait_for_everyone()
    return recipe.out


@dataclass(frozen=True)
class _Work:
    """A fine-tuning that is set up."""

    recipe: FinetuneRecipe
    accelerator: Accelerator
    run: Run
    learner: Learner
    data: LabelledData
    sampler: Batches
    teacher: Teacher | None
    receipt: Receipt | None

    def write(self, step: Callable[[], object]) -> None:
        """On the main rank; what fails there fails everywhere."""
        by_main_rank(step, folder=self.run.folder, accelerator=self.accelerator)


def _train(work: _Work, stop: StopRequest) -> StepClock:
    """All steps, from the last checkpoint on; the time they took.

    Raises:
        Stopped: SIGTERM, after its step is saved. CheckFailed: what is not finite.
    """
    recipe, run, learner, accelerator = work.recipe, work.run, work.learner, work.accelerator
    model, average, optimizer, beside = learner.model, learner.average, learner.optimizer, learner.beside()
    sampler, teacher = work.sampler, teacher_of(recipe, learner, work.teacher)
    if work.receipt is not None:
        text = work.receipt.model_dump_json(indent=2) + "\n"
        work.write(lambda: write_text(run.folder / "receipt.json", text))
    first, best, score, clock = 0, -1.0, -1.0, StepClock()
    if (state := run.load_checkpoint("last")) is not None:
        first = restore_training(state, model, optimizer, accelerator, beside)
        best, score, clock = state["best"], state.get("val_dice", state["best"]), StepClock(state)
    refuse_other_steps(first, run.folder, accelerator)
    work.write(partial(run.rewind, first))
    main = accelerator.is_main_process
    gradients = GradientRecord(run.folder, recipe, recipe.optimizer.clip, first, main, run.mirror)
    figures: dict[str, float] = {}
    for step in progress(range(first, recipe.steps), recipe.steps, "finetune", first, not main, figures):
        lr = start_step(recipe, model, optimizer, step, transferred=begins_trained(recipe))
        optimizer.zero_grad(set_to_none=True)
        metrics = forward_backward(recipe, learner.wrapped, sampler, step, accelerator, teacher)
        metrics |= apply_gradients(recipe, learner.trained, optimizer, metrics["loss"], step, accelerator)
        figures["loss"] = metrics["loss"]
        done = step + 1
        if gradients.due(done):
            work.write(partial(gradients.take, done, model, metrics.get("gradient_norm", math.inf)))
        share_statistics(model, accelerator)
        if average is not None and not metrics.get("skipped"):
            average.update_parameters(model)
        clock.tick()

        stopping = any_rank(bool(stop), accelerator)
        validating = done % recipe.validate_every == 0 or done == recipe.steps
        improved = False
        if validating:
            refresh_statistics(recipe, model, learner.judged, sampler, accelerator)
            score = validate(learner.judged, work.data.val, recipe, accelerator)
            improved = score >= best
            best = max(score, best)
            metrics["val_dice"] = figures["val_dice"] = score
        if done % recipe.log_every == 0 or validating:
            work.write(partial(run.log, done, told(mean_over_ranks(metrics, accelerator)) | {"learning_rate": lr}))
        if validating or stopping or done % recipe.checkpoint_every == 0:
            state = training_state(done, model, optimizer, accelerator, beside)
            state |= {"best": best, "val_dice": score} | clock.state()
            work.write(partial(run.save_checkpoint, done, state, best=improved))
        if stopping and done < recipe.steps:
            stop.stop(run, done)
    return clock


def _finish(work: _Work, clock: StepClock) -> None:
    """The checkpoint that becomes the model, what val chooses for it, test, and the run's results."""
    recipe, run, learner, data, accelerator = work.recipe, work.run, work.learner, work.data, work.accelerator
    spent, judged = clock.record(accelerator), learner.judged
    # accelerate puts its autocast into the model's own forward: what judges from here on decides itself in which precision
    accelerator.unwrap_model(learner.wrapped, keep_fp32_wrapper=False)
    accelerator.wait_for_everyone()  # the best checkpoint is on disk
    chosen = on_every_rank(partial(_checkpoint, run, recipe), accelerator)
    if learner.average is None:
        learner.model.load_state_dict(chosen["network"])
    else:
        learner.average.load_state_dict(chosen["average"])
    choices = choose_on_val(judged, data, recipe, accelerator, not accelerator.is_main_process)
    judged.config = _model_config(recipe, judged, data, work.teacher, choices)
    measured = measure(judged, data.test, recipe, accelerator, judged.config.object_rules())

    def save() -> None:
        _save(run, judged, data, measured, recipe, work.receipt)
        run.finish(
            "done",
            step=recipe.steps,
            best_step=chosen["step"],
            # of the best checkpoint the same; earlier ones had that alone
            best_val_dice=chosen.get("val_dice", chosen["best"]),
            **spent,
        )

    work.write(save)


def _checkpoint(run: Run, recipe: FinetuneRecipe) -> dict[str, Any]:
    """The one that becomes the model.

    Raises:
        InputError: this rank has another disk than the one that saved it.
    """
    if (chosen := run.load_checkpoint(recipe.checkpoint)) is None:
        raise other_folder(run.folder)
    return chosen


def _inputs(recipe: FinetuneRecipe, data: LabelledData, receipt: Receipt | None, teacher: Teacher | None) -> dict[str, str]:
    """sha256 of what the run rests on, by what it is."""
    inputs = {"train": source_digest(data.train), "val": source_digest(data.val), "test": source_digest(data.test)}
    if receipt is not None:
        inputs |= {f"encoder/{name}": digest for name, digest in receipt.encoder_sha256.items()}
        inputs |= {f"start/{name}": digest for name, digest in receipt.start_sha256.items()}
    if teacher is not None:
        inputs[f"teacher/{WEIGHTS}"] = teacher.sha256
    if teacher is not None or recipe.consistency is not None:
        inputs["unlabelled"] = source_digest(data.unlabelled)
    if recipe.data.draw_encoder is not None:
        inputs[f"draw_encoder/{WEIGHTS}"] = sha256(model_folder(recipe.data.draw_encoder) / WEIGHTS)
    return inputs


def _model_config(
    recipe: FinetuneRecipe, model: Segmenter, data: LabelledData, teacher: Teacher | None, choices: Choices
) -> ModelConfig:
    beginning = recipe.encoder or recipe.start
    parent = sha256(model_folder(beginning) / WEIGHTS) if beginning is not None else None
    assert recipe.normalisation is not None
    whole = recipe.model.spatial_dims == 3
    seen = [[s for axis, s in enumerate(case.spacing) if whole or axis != case.axis] for case in data.train]
    return ModelConfig(
        architecture=model.config.architecture,
        input_channels=recipe.data.channels,
        spacing=tuple(float(s) for s in np.median(seen, axis=0)),
        normalisation=recipe.normalisation,
        classes=recipe.data.classes,
        regions=recipe.data.regions,
        ignore=recipe.data.ignore,
        provenance=Provenance(
            data_sha256=source_digest([*data.train, *data.val]),
            recipe_sha256=recipe.sha256(),
            parent_sha256=parent,
            teacher_sha256=None if teacher is None else teacher.sha256,
            labels=data.labels(),
            versions=versions(),
        ),
        allowed=data.allowed,
        postprocessing=choices.postprocessing,
        operating_point=choices.operating_point,
    )


def _save(
    run: Run,
    model: Segmenter,
    data: LabelledData,
    measured: Sequence[Measured],
    recipe: FinetuneRecipe,
    receipt: Receipt | None,
) -> None:
    """model/, evaluation/ and report.html."""
    archive = merge_archives(evidence_of_cases(data.train, data.source.salt_fingerprint), data.archive)
    with folder_aside(run.folder / "model") as aside:
        model.save_pretrained(aside)
        write_archive(aside / ARCHIVE, archive)
    summary = None
    if measured:
        summary = write_test_evaluation(run.folder, model, measured, data, recipe)
        predict = predicting(model, model.config, next(model.parameters()).device, recipe.precision_of_test, recipe.inference)
        targets = targets_of(recipe.data.classes, recipe.data.regions)
        mirror_evaluation(run.mirror, summary, measured, targets, model.config, predict)
    mirror_segmenter(run, model.config, "encoder" if recipe.start is None else "segmenter")
    write_report(recipe, data, receipt, measured, summary, model)


def write_test_evaluation(
    folder: Path, model: Segmenter, measured: Sequence[Measured], data: LabelledData, recipe: FinetuneRecipe
) -> dict[str, Any]:
    """evaluation/ of a run, from its measured test cases; the summary."""
    device, point = next(model.parameters()).device, model.config.operating_point
    notes = [*data.notes(), *(notes_of(point) if point is not None else [])]
    return write_evaluation(
        folder / "evaluation",
        model,
        measured,
        model.config,
        "test",
        notes,
        device,
        recipe.precision_of_test,
        recipe.inference,
        point,
    )
