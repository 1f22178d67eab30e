"""Fine-tuning: labelled cases and an encoder (or none) → segmenter. Build, prepare, resume, loop, save, evaluate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from finetune.evaluate import Measured, measure_cases, write_evaluation
from finetune.gradients import GradientRecord
from finetune.labelled import LabelledData, read_labelled, resolve
from finetune.metrics import METRICS, values_by_group
from finetune.patches import PatchSampler
from finetune.recipe import FinetuneRecipe
from finetune.report import write_report
from finetune.statistics import figure
from finetune.step import build, forward_backward, make_optimizer, start_step
from resunet.checkpoint import WEIGHTS, ModelConfig, Provenance, model_folder
from resunet.data.cases import LoadedCase, source_digest
from resunet.data.leakage import ARCHIVE, evidence_of_cases, merge_archives, write_archive
from resunet.files import folder_aside, sha256, write_text
from resunet.model import Segmenter
from resunet.progress import progress
from resunet.runs import Run, check_out, is_done, versions
from resunet.training import (
    StepClock,
    any_rank,
    failing_as,
    mean_over_ranks,
    refuse_non_finite,
    restore_training,
    start_ranks,
    stop_on_sigterm,
    training_state,
)
from resunet.transfer import Receipt


def finetune(recipe: FinetuneRecipe) -> Path:
    """Run a fine-tuning recipe; the run directory.

    Raises:
        ResUNetError: input, environment, a leak, a loss that is not finite, or SIGTERM; see `resunet.errors`.
    """
    recipe = resolve(recipe)
    check_out(recipe)
    if is_done(recipe.out):
        return recipe.out
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    main, device = accelerator.is_main_process, accelerator.device
    model, receipt = build(recipe)
    data = read_labelled(recipe, quiet=not main)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(recipe, model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    sampler = PatchSampler(data.train, recipe.patch, recipe.foreground)
    inputs = {"train": source_digest(data.train), "val": source_digest(data.val), "test": source_digest(data.test)}
    if receipt is not None:
        inputs |= {f"encoder/{name}": digest for name, digest in receipt.encoder_sha256.items()}
    accelerator.wait_for_everyone()  # every rank has seen that `out` is free before the main one makes it

    run = Run(recipe, "finetune", inputs, writes=main)
    with failing_as(run), stop_on_sigterm() as stop:
        if main and receipt is not None:
            write_text(run.folder / "receipt.json", receipt.model_dump_json(indent=2) + "\n")
        first, best, clock = 0, -1.0, StepClock()
        if (state := run.load_checkpoint("last")) is not None:
            first = restore_training(state, model, optimizer, accelerator)
            best, clock = state["best"], StepClock(state["seconds"])
        run.rewind(first)
        gradients = GradientRecord(run.folder, recipe.optimizer.clip, first, writes=main)
        figures: dict[str, float] = {}
        for step in progress(range(first, recipe.steps), recipe.steps, "finetune", first, not main, figures):
            lr = start_step(recipe, model, optimizer, step, transferred=receipt is not None)
            optimizer.zero_grad(set_to_none=True)
            metrics = forward_backward(recipe, wrapped, sampler, step, accelerator)
            refuse_non_finite({"loss": metrics["loss"]}, step, accelerator)
            figures["loss"] = metrics["loss"]
            metrics["gradient_norm"] = float(accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.clip))
            done = step + 1
            if done == 1 or done % recipe.log_every == 0:
                gradients.take(done, model, metrics["gradient_norm"])
            optimizer.step()
            clock.tick()

            stopping = any_rank(bool(stop), accelerator)
            validating = done % recipe.validate_every == 0 or done == recipe.steps
            improved = False
            if validating:
                score = validate(model, data.val, recipe, accelerator)
                improved = score >= best
                best = max(score, best)
                metrics["val_dice"] = figures["val_dice"] = score
            if done % recipe.log_every == 0 or validating:
                run.log(done, mean_over_ranks(metrics, accelerator) | {"learning_rate": lr})
            if validating or stopping or done % recipe.checkpoint_every == 0:
                state = training_state(done, model, optimizer, accelerator)
                run.save_checkpoint(done, state | {"best": best, "seconds": clock.seconds()}, best=improved)
            if stopping and done < recipe.steps:
                stop.stop(run, done)

        stop.release()
        seconds = clock.seconds()
        accelerator.wait_for_everyone()  # the best checkpoint is on disk
        chosen = run.load_checkpoint("best")
        assert chosen is not None
        model.load_state_dict(chosen["network"])
        measured = measure_cases(model, data.test, len(recipe.data.classes), device, recipe.precision, accelerator, not main)
        if main:
            model.config = _model_config(recipe, model, data)
            _save(run, model, data, measured, recipe, receipt)
        run.finish(
            "done",
            step=recipe.steps,
            best_step=chosen["step"],
            best_val_dice=best,
            seconds=round(seconds, 1),
            seconds_per_step=clock.seconds_per_step(),
        )
    accelerator.wait_for_everyone()
    return recipe.out


def validate(model: Segmenter, val: Sequence[LoadedCase], recipe: FinetuneRecipe, accelerator: Accelerator) -> float:
    """Dice of the whole val scans, as evaluation counts it; 0 where no case defines one."""
    measured = measure_cases(
        model, val, len(recipe.data.classes), accelerator.device, recipe.precision, accelerator, quiet=True
    )
    dice = figure(values_by_group([one.row() for one in measured], lambda case: case.macro("dice")))["mean"]
    return 0.0 if dice is None else float(dice)


def _model_config(recipe: FinetuneRecipe, model: Segmenter, data: LabelledData) -> ModelConfig:
    parent = sha256(model_folder(recipe.encoder) / WEIGHTS) if recipe.encoder is not None else None
    assert recipe.normalisation is not None
    planes = [[s for axis, s in enumerate(case.spacing) if axis != case.axis] for case in data.train]
    return ModelConfig(
        architecture=model.config.architecture,
        input_channels=recipe.data.channels,
        spacing=tuple(float(s) for s in np.median(planes, axis=0)),
        normalisation=recipe.normalisation,
        classes=recipe.data.classes,
        ignore=recipe.data.ignore,
        provenance=Provenance(
            data_sha256=source_digest([*data.train, *data.val]),
            recipe_sha256=recipe.sha256(),
            parent_sha256=parent,
            versions=versions(),
        ),
        allowed=data.allowed,
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
        device = next(model.parameters()).device
        summary = write_evaluation(
            run.folder / "evaluation", model, measured, model.config, "test", data.notes(), device, recipe.precision
        )
        run.summarise({f"test/{name}": summary[name]["mean"] for name in METRICS if summary[name]["mean"] is not None})
    write_report(recipe, data, receipt, measured, summary)
