import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from finetune.labelled import read_labelled, resolve
from resunet.config import FixedNormalisation, PercentileZScore
from resunet.data.cases import load_cases
from resunet.data.leakage import ARCHIVE, evidence_of_cases
from resunet.data.perceptual import HASH_BYTES
from resunet.data.source import assign_parts, draw_labelled, open_source
from resunet.errors import CheckFailed, InputError


def stems(cases) -> list[str]:
    return [case.case.id for case in cases]


def groups(cases) -> set[str]:
    return {case.case.group for case in cases}


def test_from_scratch_the_defaults_are_filled_in(recipe):
    resolved = resolve(recipe())
    assert resolved.model.norm == "batch" and resolved.normalisation == PercentileZScore()
    kept = resolve(recipe(model={"norm": "group"}, normalisation={"kind": "percentile_zscore", "low": 1, "high": 99}))
    assert kept.model.norm == "group" and kept.normalisation == PercentileZScore(low=1, high=99)


def test_norm_and_normalisation_come_from_the_encoder(recipe, encoder):
    resolved = resolve(recipe(encoder=str(encoder)))
    assert resolved.model.norm == "instance"
    assert resolved.normalisation == FixedNormalisation(kind="fixed", low=0, high=255, mean=60, std=50)
    same = recipe(encoder=str(encoder), normalisation=resolved.normalisation.model_dump())
    assert resolve(same).normalisation == resolved.normalisation


def test_another_normalisation_than_the_encoders_is_refused(recipe, encoder):
    with pytest.raises(InputError, match=r"normalisation=.*'percentile_zscore'.*pretrained with .*'fixed'.*Leave the key out"):
        resolve(recipe(encoder=str(encoder), normalisation={"kind": "percentile_zscore"}))


def test_the_parts_are_those_of_the_split(recipe):
    data = read_labelled(resolve(recipe()), quiet=True)
    assert stems(data.train) == ["c00a", "c00b", "c01a", "c02a", "c03a", "c04a"]
    assert stems(data.val) == ["c05a", "c06a", "c07a"]
    assert stems(data.test) == [f"c{i:02}a" for i in range(8, 14)]
    assert data.archive is None and data.notes() == []


@pytest.mark.parametrize("labelled, train, val", [(1, 1, 1), (2, 2, 2), (4, 4, 3), (0.4, 2, 2), (0.01, 1, 1), (None, 5, 3)])
def test_val_has_at_most_as_many_groups_as_training(recipe, labelled, train, val):
    data = read_labelled(resolve(recipe(data={"labelled": labelled})), quiet=True)
    assert (len(groups(data.train)), len(groups(data.val)), len(groups(data.test))) == (train, val, 6)


def test_draws_are_nested_and_differ(recipe):
    def drawn(labelled, draw):
        data = read_labelled(resolve(recipe(data={"labelled": labelled, "draw": draw})), quiet=True)
        return groups(data.train), groups(data.val)

    for draw in (0, 1):
        sizes = [drawn(count, draw) for count in (1, 2, 3)]
        assert all(small[i] < large[i] for small, large in itertools.pairwise(sizes) for i in (0, 1))
    assert len({frozenset(drawn(2, draw)[0]) for draw in range(8)}) > 2


def test_more_groups_than_there_are_is_refused(recipe):
    with pytest.raises(InputError, match=r"data\.labelled=6\.0: the pool has only 5 groups"):
        read_labelled(resolve(recipe(data={"labelled": 6})), quiet=True)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_renamed_copy_in_training_is_found(recipe, source, part):
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    for folder in ("images", "masks"):
        shutil.copy(source / folder / "c01a.png", source / folder / "copy.png")
    (source / "splits.json").write_text(json.dumps(splits | {part: [*splits[part], "copy"]}))
    with (source / "groups.csv").open("a") as file:
        file.write("copy,somebody\n")
    with pytest.raises(CheckFailed, match=rf"(?s)1 {part} cases are among the labelled training cases.*copy\.png") as error:
        read_labelled(resolve(recipe()), quiet=True)
    evidence = "(sha256 of the file; sha256 of the pixels; perceptual, correlation 1.000)"  # its group is another
    assert evidence in str(error.value)
    data = read_labelled(resolve(recipe(allow=["leak"])), quiet=True)
    assert data.notes() == [f"Allowed by the recipe: leak: 1 {part} cases are among the labelled training cases."]


@pytest.fixture
def saw(recipe, archive_of):
    """Makes the record that of an encoder that saw the case `stem`; only the columns `keep` know it."""

    def write(stem: str, salt: str | None = None, keep: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        source = open_source(recipe().data, masks=False)
        cases = load_cases([case for case in source.cases if case.id == stem], "grey", PercentileZScore())
        (row,) = evidence_of_cases(cases, "").table.to_pylist()
        others = ("other", "other", "other", b"\xff" * HASH_BYTES)
        known = tuple(value if i in keep else others[i] for i, value in enumerate(row.values()))
        archive_of([known], salt or source.salt_fingerprint)

    return write


@pytest.mark.parametrize(
    "keep, evidence",
    [
        ((0,), "group"),
        ((1,), "sha256 of the file"),
        ((2,), "sha256 of the pixels"),
        ((3,), "perceptual, distance 0 without thumbnails to verify it"),
    ],
)
@pytest.mark.parametrize("part, stem", [("val", "c05a"), ("test", "c13a")])
def test_a_case_that_was_pretrained_on_is_found(recipe, encoder, saw, part, stem, keep, evidence):
    saw(stem, keep=keep)
    with pytest.raises(CheckFailed, match=rf"(?s)1 {part} cases are among the pretraining archive.*{stem}\.png \({evidence}\)"):
        read_labelled(resolve(recipe(encoder=str(encoder))), quiet=True)


def test_training_cases_may_be_pretrained_on(recipe, encoder, saw):
    saw("c01a")
    data = read_labelled(resolve(recipe(encoder=str(encoder))), quiet=True)
    assert data.notes() == [] and len(data.archive) == 1


def test_another_salt_is_said_to_give_no_evidence(recipe, encoder, saw):
    saw("c05a", salt="another", keep=(0,))
    data = read_labelled(resolve(recipe(encoder=str(encoder))), quiet=True)
    assert len(data.notes()) == 1 and "group evidence unavailable" in data.notes()[0]
    saw("c05a", salt="another", keep=(1,))  # hashes compare all the same
    with pytest.raises(CheckFailed, match="sha256 of the file"):
        read_labelled(resolve(recipe(encoder=str(encoder))), quiet=True)


def test_an_encoder_without_its_record_is_refused(recipe, encoder):
    (encoder / ARCHIVE).unlink()
    with pytest.raises(InputError, match=r"has no archive\.parquet"):
        read_labelled(resolve(recipe(encoder=str(encoder))), quiet=True)


def test_val_and_pool_are_needed(recipe, source):
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    (source / "splits.json").write_text(json.dumps(splits | {"val": []}))
    with pytest.raises(InputError, match=r"6 pool and 0 val cases; both are needed"):
        read_labelled(resolve(recipe()), quiet=True)


def test_without_splits_one_is_made_and_said(recipe, source):
    (source / "splits.json").unlink()
    data = read_labelled(resolve(recipe()), quiet=True)
    assert len(groups(data.train)) + len(groups(data.val)) + len(groups(data.test)) == 14
    assert not groups(data.train) & (groups(data.val) | groups(data.test)) and not groups(data.val) & groups(data.test)
    assert any("No splits.json" in note for note in data.notes())


def test_a_stratified_split_and_draw(recipe, source):
    """The parts are those that `assign_parts` makes, for pretraining too, and the draw is of the same strata."""
    (source / "splits.json").unlink()
    black = np.zeros((24, 24), np.uint8)
    for number in (1, 4, 7, 10):
        Image.fromarray(black).save(source / "masks" / f"c{number:02}a.png")
    ours = resolve(recipe(data={"stratify": True, "labelled": 4}))
    found = read_labelled(ours, quiet=True)
    expected = assign_parts(open_source(ours.data, masks=True), ours.data.split_seed, stratify=True)
    drawn = draw_labelled(expected, 4, ours.data.draw, stratify=True)
    for cases, part in ((found.train, "pool"), (found.val, "val"), (found.test, "test")):
        assert stems(cases) == drawn.stems()[part]
    plain = read_labelled(resolve(recipe(data={"labelled": 4})), quiet=True)
    assert (stems(plain.train), stems(plain.val), stems(plain.test)) != (
        stems(found.train),
        stems(found.val),
        stems(found.test),
    )


def test_a_fold_is_of_what_the_draw_left_in_pool_and_val(recipe):
    drawn = read_labelled(resolve(recipe(data={"labelled": 2})), quiet=True)
    expected = set(stems(drawn.train)) | set(stems(drawn.val))
    vals = []
    for fold in range(4):
        data = read_labelled(resolve(recipe(data={"labelled": 2, "folds": 4, "fold": fold})), quiet=True)
        assert set(stems(data.train)) | set(stems(data.val)) == expected and not groups(data.train) & groups(data.val)
        assert stems(data.test) == stems(drawn.test)
        vals += groups(data.val)
    assert sorted(vals) == sorted(groups(drawn.train) | groups(drawn.val))
    before_training = read_labelled(resolve(recipe(data={"labelled": 2, "folds": 4})), quiet=True)
    first = read_labelled(resolve(recipe(data={"labelled": 2, "folds": 4, "fold": 0})), quiet=True)
    assert stems(before_training.val) == stems(first.val)


def test_classes_are_compared_with_what_a_data_set_says(recipe, source):
    (source / "images").rename(source / "imagesTr")
    (source / "masks").rename(source / "labelsTr")
    for path in list((source / "imagesTr").iterdir()):
        path.rename(path.with_name(f"{path.stem}_0000.png"))
    about = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "lesion": 255, "ignore": 256}, "file_ending": ".png"}
    (source / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"the recipe does not say what 256 is.*data\.ignore=\[256\]"):
        read_labelled(resolve(recipe()), quiet=True)
    data = read_labelled(resolve(recipe(data={"ignore": [256]})), quiet=True)
    assert stems(data.train) == ["c00a", "c00b", "c01a", "c02a", "c03a", "c04a"]
