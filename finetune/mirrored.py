"""What Weights & Biases is told of a finished fine-tuning run: test figures, each case by a number, and the segmenter."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from finetune.evaluation.metrics import METRICS
from finetune.evaluation.outputs import Measured, Predict, telling_cases
from finetune.evaluation.overlay import grey_picture, telling_slice
from finetune.evaluation.targets import Targets
from resunet.checkpoint import WEIGHTS, ModelConfig
from resunet.data.cases import take_slice
from resunet.files import sha256
from resunet.mirror import Mirror, Overlaid
from resunet.runs import Run

CASES, ORDER = "test_cases", "test_order"  # in W&B's summary: what of each case is known by its number, and which these are


def mirror_segmenter(run: Run, config: ModelConfig, parent: Literal["encoder", "segmenter"] = "encoder") -> None:
    """The run's model/ as an artifact, below the encoder, or the segmenter, that it began with."""
    if run.mirror is None:
        return
    folder, its = run.folder / "model", config.provenance
    facts = {"sha256": sha256(folder / WEIGHTS), "architecture": config.architecture.model_dump(mode="json")}
    parents = {parent: its.parent_sha256, "teacher": its.teacher_sha256}
    inputs = {name: digest for name, digest in parents.items() if digest is not None}
    run.mirror.model("segmenter", folder, facts, inputs)


def mirror_evaluation(
    mirror: Mirror | None,
    summary: dict[str, Any],
    measured: Sequence[Measured],
    targets: Targets,
    config: ModelConfig,
    predict: Predict,
) -> None:
    """Figures of the test cases, and of each case; pictures of the telling ones, where the recipe lets them go.

    Args:
        predict: the labels of a case as they were measured.
    """
    if mirror is None:
        return
    mirror.summarise({f"test/{name}": summary[name]["mean"] for name in METRICS if summary[name]["mean"] is not None})
    mirror.summarise({CASES: case_columns(measured, targets), ORDER: order_of(one.row()[0] for one in measured)})
    if mirror.takes_pictures:
        mirror.table("test_overlays", ["case", "how", "dice", "overlay"], _overlays(measured, config, predict))


def case_columns(measured: Sequence[Measured], targets: Targets) -> dict[str, list[Any]]:
    """`case_columns_of` measured cases."""
    rows = [
        (case, group, name, its.dice)
        for case, group, measures in (one.row() for one in measured)
        for name, its in zip(targets.names, measures.classes, strict=True)
        if its.truth_voxels
    ]
    return case_columns_of(rows, {one.row()[0]: one.row()[1] for one in measured})


def case_columns_of(rows: Iterable[tuple[str, str, str, Any]], groups: Mapping[str, str]) -> dict[str, list[Any]]:
    """Dice of every case and class that its truth has, by columns; cases are numbers in the order of their ids, groups in that of
    their first cases: a group that nobody named is called after a path.

    Args:
        rows: case, group, class, Dice.
        groups: of all test cases, also of those with nothing to find.
    """
    cases = _numbers(groups)
    of_groups = {group: number for number, group in enumerate(dict.fromkeys(groups[case] for case in cases))}
    numbered = sorted((cases[case], of_groups[group], name, dice) for case, group, name, dice in rows)
    return {name: [row[i] for row in numbered] for i, name in enumerate(("case", "group", "class", "dice"))}


def order_of(ids: Iterable[str]) -> str:
    """Which case has which number: the same where ids are, which are made with a salt."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()


def _overlays(measured: Sequence[Measured], config: ModelConfig, predict: Predict) -> list[list[Any]]:
    numbers = _numbers([one.row()[0] for one in measured])
    classes = dict(enumerate((config.classes or {}).values()))
    rows = []
    for rank, one in telling_cases(measured):
        assert one.case.labels is not None
        index = telling_slice(one.case.labels, one.case.axis)
        masks = {"truth": one.case.label_slice(index), "prediction": take_slice(predict(one.case), one.case.axis, index)}
        picture = Overlaid(grey_picture(one.case, index), masks, classes)
        rows.append([numbers[one.row()[0]], rank, one.measures.macro("dice"), picture])
    return rows


def _numbers(ids: Iterable[str]) -> dict[str, int]:
    return {one: number for number, one in enumerate(sorted(set(ids)))}
