"""Fine-tuning: labelled cases and an encoder (or none) → segmenter. Build, prepare, resume, loop, save, evaluate."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from finetune.augment import augment
from finetune.evaluate import Measured, measure_cases, write_evaluation
from finetune.labelled import LabelledData, read_labelled, resolve
from finetune.losses import focal_dice_loss
from finetune.metrics import METRICS, values_by_group
from finetune.patches import PatchSampler
from finetune.recipe import FinetuneRecipe
from finetune.report import write_report
from finetune.statistics import figure
from resunet.checkpoint import WEIGHTS, ModelConfig, Provenance, model_folder
from resunet.data.cases import LoadedCase, source_digest
from resunet.data.images import channel_count
from resunet.data.leakage import ARCHIVE, describe_archive, merge_archives, write_archive
from resunet.files import folder_aside, sha256, write_text
from resunet.model import ResUNet, Segmenter, build_model
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
from resunet.transfer import Receipt, transfer_encoder

_PATCHES, _AUGMENT = 2, 3  # names of the random streams


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
    model, receipt = _build(recipe)
    data = read_labelled(recipe, quiet=not main)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(recipe, model)
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
        figures: dict[str, float] = {}
        for step in progress(range(first, recipe.steps), recipe.steps, "finetune", first, not main, figures):
            lr = _start_step(recipe, model, optimizer, step, transferred=receipt is not None)
            optimizer.zero_grad(set_to_none=True)
            metrics = _forward_backward(recipe, wrapped, sampler, step, accelerator)
            refuse_non_finite({"loss": metrics["loss"]}, step, accelerator)
            figures["loss"] = metrics["loss"]
            metrics["gradient_norm"] = float(accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.clip))
            optimizer.step()
            clock.tick()

            done = step + 1
            stopping = any_rank(bool(stop), accelerator)
            validating = done % recipe.validate_every == 0 or done == recipe.steps
            improved = False
            if validating:
                score = _validate(model, data.val, recipe, accelerator)
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


def _build(recipe: FinetuneRecipe) -> tuple[Segmenter, Receipt | None]:
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


def _optimizer(recipe: FinetuneRecipe, model: Segmenter) -> Optimizer:
    modules: dict[str, nn.Module] = {"network": model}
    if isinstance(model, ResUNet):
        modules = {"encoder": model.encoder, "decoder": model.decoder, "head": model.head}
    return AdamW(parameter_groups(modules, recipe.optimizer.weight_decay), lr=recipe.optimizer.lr)


def _start_step(recipe: FinetuneRecipe, model: Segmenter, optimizer: Optimizer, step: int, transferred: bool) -> float:
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


def _forward_backward(
    recipe: FinetuneRecipe, wrapped: nn.Module, sampler: PatchSampler, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """The gradients of one optimiser step, accumulated; its losses and the rms elastic displacement in pixels."""
    metrics: dict[str, float] = {}
    for part in range(recipe.accumulate):
        images, labels, moved = _batch(recipe, sampler, step * recipe.accumulate + part, accelerator)
        with nullcontext() if part == recipe.accumulate - 1 else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                logits = wrapped(images)
            terms = focal_dice_loss(logits, labels, recipe.loss.gamma, recipe.loss.focal_weight, recipe.loss.dice_weight)
            accelerator.backward(terms["loss"] / recipe.accumulate)
        values = {name: float(term.detach()) for name, term in terms.items()} | {"elastic_rms": moved}
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value / recipe.accumulate
    return metrics


def _batch(recipe: FinetuneRecipe, sampler: PatchSampler, index: int, accelerator: Accelerator) -> tuple[Tensor, Tensor, float]:
    rank = accelerator.process_index
    share = recipe.batch // accelerator.num_processes
    images, labels = sampler.batch(share, (recipe.seed, _PATCHES, index, rank))
    generator = step_generator(accelerator.device, recipe.seed, _AUGMENT, index, rank)
    device = accelerator.device
    images, labels, moved = augment(images.to(device), labels.to(device), recipe.augment, generator)
    return images.contiguous(memory_format=torch.channels_last), labels, moved


def _validate(model: Segmenter, val: Sequence[LoadedCase], recipe: FinetuneRecipe, accelerator: Accelerator) -> float:
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
    archive = merge_archives(describe_archive(data.train, data.source.salt.fingerprint), data.archive)
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
