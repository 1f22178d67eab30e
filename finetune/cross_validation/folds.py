"""Cross-validation by group, and the ensemble of its folds, as in nnU-Net (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).

    OUT/fold-K/            an ordinary run each, which chooses by its own val and does not touch test
    OUT/model/             the ensemble of all
    OUT/cross_validation/  every pool and val case as the one network predicts it that was not trained on it
    OUT/evaluation/        the ensemble on test, which is read here and nowhere else

Machines may share the work: each trains one fold (data.fold=K), and the command without it and with resume=true joins them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.choices import Choices
from finetune.cross_validation.out_of_fold import (
    OF_SINGLE_NETWORKS,
    OPTIMISTIC,
    SPLIT,
    choose_out_of_fold,
    described,
    in_order,
    predict_left_out,
    refuse_impossible_folds,
)
from finetune.cross_validation.page import Evaluated, Fold, counted, write_folds_page
from finetune.evaluation.alarms import notes_of
from finetune.evaluation.evaluate import Measured, write_evaluation
from finetune.evaluation.metrics import values_by_group
from finetune.evaluation.outputs import write
from finetune.evaluation.statistics import figure
from finetune.evaluation.targets import targets_of
from finetune.inference.predict import predict_case
from finetune.judging import measure
from finetune.labelled import FoldedData, read_folds, resolve
from finetune.loop import finetune
from finetune.mirrored import mirror_evaluation, mirror_segmenter
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import WEIGHTS, ModelConfig
from resunet.data.cases import LoadedCase, source_digest
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.exits import is_main_rank
from resunet.files import sha256, write_text
from resunet.layout import place
from resunet.members import join_members, write_ensemble
from resunet.progress import say
from resunet.report import read_metrics
from resunet.runs import Run, check_out, is_done
from resunet.runtime import remove_objects
from resunet.stopping import failing_as
from resunet.training import start_ranks


def train(recipe: FinetuneRecipe) -> Path:
    """Run a fine-tuning recipe, of a cross-validation one fold or all; the run directory.

    Raises:
        ResUNetError: as `finetune.loop.finetune`; or folds of another recipe or of other cases than the recipe's.
    """
    if recipe.data.folds is None:
        return finetune(recipe)
    if recipe.data.fold is not None:
        return _train_one(recipe, recipe.data.fold)
    return _cross_validate(recipe)


def fold_recipe(recipe: FinetuneRecipe, fold: int) -> FinetuneRecipe:
    """What trains one fold of a cross-validation, wherever that is done."""
    data = recipe.data.model_copy(update={"fold": fold})
    return recipe.model_copy(update={"out": recipe.out / f"fold-{fold}", "data": data, "evaluate_test": False})


def _train_one(recipe: FinetuneRecipe, fold: int) -> Path:
    one = resolve(fold_recipe(recipe, fold))
    check_out(one)
    if (recipe.out / "config.json").is_file():  # the run that all folds belong to, or a stranger
        whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"fold": None}), "resume": True})
        check_out(resolve(whole))
    if not is_done(one.out):
        _check(resolve(recipe), quiet=not is_main_rank())
    return finetune(one)


def _cross_validate(recipe: FinetuneRecipe) -> Path:
    recipe = resolve(recipe)
    assert recipe.data.folds is not None
    folds = [fold_recipe(recipe, fold) for fold in range(recipe.data.folds)]
    _check_out(recipe, folds)
    if is_done(recipe.out):
        return recipe.out
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    if not all(is_done(one.out) for one in folds):
        _check(recipe, quiet=not accelerator.is_main_process)
    accelerator.wait_for_everyone()  # every rank has seen that `out` is free before the first fold is in it
    for fold, one in enumerate(folds):
        if accelerator.is_main_process:
            say(f"fold {fold}, of 0 to {len(folds) - 1}{': done before' if is_done(one.out) else ''}")
        finetune(one)
    _join(recipe, folds)
    return recipe.out


def _check_out(recipe: FinetuneRecipe, folds: Sequence[FinetuneRecipe]) -> None:
    """`check_out` of the whole and of every fold; folds alone, which other machines may have trained, can be joined."""
    only_folds = any(one.out.is_dir() for one in folds) and not (recipe.out / "config.json").is_file()
    if not (recipe.resume and only_folds):
        check_out(recipe)
    for one in folds:
        check_out(one)


def _check(recipe: FinetuneRecipe, quiet: bool) -> None:
    """What would stop a later fold or the end: leaks between folds and into test, and what val cannot choose."""
    refuse_impossible_folds(recipe, read_folds(recipe, quiet))


def _join(recipe: FinetuneRecipe, folds: Sequence[FinetuneRecipe]) -> None:
    """model/, cross_validation/, evaluation/ and report.html of finished folds."""
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    main, device = accelerator.is_main_process, accelerator.device
    data = read_folds(recipe, quiet=not main)
    records = [json.loads((one.out / "run.json").read_text(encoding="utf-8")) for one in folds]
    _refuse_other_cases(data, folds, records)
    ensemble, archive = join_members([one.out for one in folds])
    ensemble = place(ensemble, device)
    inputs = {"folds": source_digest(data.cases), "test": source_digest(data.test)}
    inputs |= {f"{one.out.name}/{WEIGHTS}": sha256(one.out / "model" / WEIGHTS) for one in folds}
    # `out` is there: its folds are in it
    run = Run(recipe.model_copy(update={"resume": True}), "finetune", inputs, writes=main)
    with failing_as(run):
        left_out = predict_left_out(ensemble, data, recipe, accelerator)
        ensemble.config = _config(ensemble, recipe, data, choose_out_of_fold(ensemble, data, left_out, recipe, accelerator))
        tested = measure(ensemble, data.test, recipe, accelerator, ensemble.config.object_rules())
        if main:
            write_ensemble(run.folder / "model", ensemble, archive)
            _copy_records(run, folds)
            _write_results(run, recipe, ensemble, data, left_out, tested, [record["best_step"] for record in records])
        spent = [name for name in ("seconds", "cpu_seconds") if all(name in record for record in records)]
        run.finish(
            "done",
            step=recipe.steps,
            best_step=[record["best_step"] for record in records],
            best_val_dice=[record["best_val_dice"] for record in records],
            **{name: round(sum(record[name] for record in records), 1) for name in spent},
        )
    accelerator.wait_for_everyone()


def _config(ensemble: Ensemble, recipe: FinetuneRecipe, data: FoldedData, choices: Choices) -> ModelConfig:
    return ensemble.config.model_copy(
        update={
            "provenance": ensemble.config.provenance.model_copy(update={"recipe_sha256": recipe.sha256()}),
            "allowed": list(dict.fromkeys([*ensemble.config.allowed, *data.allowed])),
            "postprocessing": choices.postprocessing,
            "operating_point": choices.operating_point,
        }
    )


def _refuse_other_cases(data: FoldedData, folds: Sequence[FinetuneRecipe], records: Sequence[dict[str, Any]]) -> None:
    for fold, (one, record) in enumerate(zip(folds, records, strict=True)):
        now = {"train": source_digest(data.train(fold)), "val": source_digest(data.val(fold))}
        changed = [part for part, digest in now.items() if record["inputs"][part] != digest]
        if changed:
            raise InputError(
                f"{one.out}: was trained on other cases than fold {fold} has now ({' and '.join(changed)} differ), so that nobody "
                "could say which are out of its fold. Restore the source, or delete this folder to train the fold again."
            )


def _copy_records(run: Run, folds: Sequence[FinetuneRecipe]) -> None:
    """metrics.jsonl: the mean over folds of what all logged at a step. receipt.json: of all folds alike."""
    metrics = [read_metrics(one.out) for one in folds]
    by_step: dict[int, dict[str, float]] = {}
    for name in set.intersection(*(set(its) for its in metrics)):
        values = [dict(zip(*its[name], strict=True)) for its in metrics]
        for step in set.intersection(*(set(one) for one in values)):
            by_step.setdefault(int(step), {})[name] = sum(one[step] for one in values) / len(values)
    run.rewind(0)
    for step in sorted(by_step):
        run.log(step, dict(sorted(by_step[step].items())))
    receipt = folds[0].out / "receipt.json"
    if receipt.is_file():
        write_text(run.folder / "receipt.json", receipt.read_text(encoding="utf-8"))


def _write_results(
    run: Run,
    recipe: FinetuneRecipe,
    ensemble: Ensemble,
    data: FoldedData,
    left_out: Sequence[Sequence[Measured]],
    tested: Sequence[Measured],
    best_steps: Sequence[int],
) -> None:
    """cross_validation/, evaluation/ and report.html. left_out: the val cases of each fold."""
    config, precision = ensemble.config, recipe.precision_of_test
    targets = targets_of(recipe.data.classes, recipe.data.regions)
    device = next(ensemble.parameters()).device
    every = in_order(data, left_out)
    member_of = {one.case.case.id: member for its, member in zip(left_out, ensemble.members, strict=True) for one in its}

    def by_member(case: LoadedCase) -> NDArray[np.uint8]:
        return predict_case(member_of[case.case.id], case, device, precision, recipe.inference)

    def by_ensemble(case: LoadedCase) -> NDArray[np.uint8]:
        return remove_objects(predict_case(ensemble, case, device, precision, recipe.inference), config.object_rules())

    notes = [*data.notes(), OPTIMISTIC]
    summary = write(run.folder / "cross_validation", every, targets, SPLIT, notes, precision, by_member)
    outside = Evaluated("cross_validation", summary, every, by_member)
    test, point = None, config.operating_point
    if tested:
        about = [*data.notes(), *([OF_SINGLE_NETWORKS, *notes_of(point)] if point is not None else [])]
        summary = write_evaluation(
            run.folder / "evaluation", ensemble, tested, config, "test", about, device, precision, recipe.inference, point
        )
        test = Evaluated("evaluation", summary, tested, by_ensemble)
        mirror_evaluation(run.mirror, summary, tested, targets, config, by_ensemble)
    mirror_segmenter(run, config)
    facts = [
        Fold(
            training=counted(data.train(fold)),
            val=counted(data.val(fold)),
            best_step=best_steps[fold],
            dice=figure(values_by_group([one.row() for one in its], lambda case: case.macro("dice")), (0.0, 1.0)),
        )
        for fold, its in enumerate(left_out)
    ]
    write_folds_page(recipe, data, facts, outside, test, notes, described(config))
