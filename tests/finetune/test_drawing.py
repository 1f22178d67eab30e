"""Labelled groups that are drawn by coverage of an embedding: what `resunet embed` and the orders of suggestions give."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from platformdirs import user_cache_path

from finetune.counted_labels import other_labels
from finetune.labelled import choose_cases
from finetune.loop import finetune
from resunet.checkpoint import LabelledGroups, model_folder, read_config
from resunet.config import DataSettings
from resunet.data.perceptual import HASH_BYTES
from resunet.data.source import Source, open_source
from resunet.embedding.coverage import nested_order
from resunet.embedding.embed import EmbedRequest, embed
from resunet.embedding.groups import groups_of
from resunet.embedding.table import read_embeddings
from resunet.errors import CheckFailed, InputError


def opened(root: Path) -> Source:
    return open_source(DataSettings(source=root, salt_file=root.parent / "salt"), masks=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, of this test alone; where tables of embeddings are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache_path("resunet") / "draws"


@pytest.fixture
def drawn(recipe, encoder):
    """The groups to train on and to choose by, of a draw."""

    def draw(labelled: float, draw: int = 0, by: str = "kcenter") -> tuple[set[str], set[str]]:
        how = {} if by == "random" else {"draw_by": by, "draw_encoder": str(encoder)}
        _, train, val, _ = choose_cases(recipe(data={"labelled": labelled, "draw": draw, **how}))
        return {case.group for case in train}, {case.group for case in val}

    return draw


@pytest.mark.parametrize("by", ["kcenter", "typicality"])
def test_they_are_the_beginning_of_the_order_of_suggestions(drawn, source, encoder, tmp_path, by):
    """Of all groups, embedded by the command, those of the pool; for every budget and draw."""
    table = tmp_path / "table.parquet"
    embed(encoder, table, EmbedRequest(source=source, salt_file=source.parent / "salt"))
    held_out = {case.group_hmac for case in opened(source).cases if case.part in ("val", "test")}
    groups = groups_of(read_embeddings(table), masked=set(), held_out=held_out)
    assert len(groups.names) == 5
    named = {case.group_hmac: case.group_name for case in opened(source).part("pool")}
    orders = set()
    for draw in range(3):
        order = [named[groups.names[place]] for place in nested_order(by, groups.points, draw)]
        for labelled in range(1, 6):
            assert drawn(labelled, draw, by)[0] == set(order[:labelled])
        assert drawn(0.4, draw, by)[0] == set(order[:2])
        orders.add(tuple(order))
    assert len(orders) > 1 or by == "typicality"


def test_groups_to_choose_by_are_those_of_the_random_draw(drawn):
    for labelled in (1, 2):
        for draw in range(3):
            assert drawn(labelled, draw)[1] == drawn(labelled, draw, "random")[1]


def test_only_the_pool_is_embedded_and_only_once(drawn, source, own_cache):
    """Images of val and test are no images here, and those of the pool are spoilt once their embeddings are kept."""
    for number in range(5, 14):
        (source / "images" / f"c{number:02}a.png").write_bytes(b"no image")
    first = drawn(2)
    (kept,) = own_cache.iterdir()
    assert set(read_embeddings(kept).column("split")) == {"pool"} and len(read_embeddings(kept).table) == 6
    assert own_cache.stat().st_mode & 0o77 == 0, "of patients"
    before = kept.read_bytes()
    for path in (source / "images").glob("c0[0-4]*"):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert drawn(2) == first and drawn(3)[0] > first[0]
    assert [path.read_bytes() for path in own_cache.iterdir()] == [before]
    os.utime(source / "images" / "c00a.png", ns=(1, 1))  # they have changed, as far as anybody can tell
    with pytest.raises(InputError, match="none of 6 scans could be embedded"):
        drawn(2)


def test_a_scan_that_cannot_be_read_now_changes_no_later_draw(drawn, source, own_cache):
    path = source / "images" / "c03a.png"
    kept = path.read_bytes()
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"data\.draw_by: 1 scans of the pool cannot be embedded; the first: .*c03a\.png"):
        drawn(2)
    assert list(own_cache.iterdir()) == []
    path.write_bytes(kept)
    assert len(drawn(5)[0]) == 5


def test_groups_without_content_come_last(drawn, source):
    for number in (1, 3):
        Image.fromarray(np.full((24, 24), 7, np.uint8)).save(source / "images" / f"c{number:02}a.png")
    for draw in range(4):
        assert drawn(3, draw)[0] == {"patient0", "patient2", "patient4"}
    assert {frozenset(drawn(4, draw)[0]) for draw in range(8)} == {
        frozenset({"patient0", "patient2", "patient4", last}) for last in ("patient1", "patient3")
    }


def test_an_encoder_that_saw_test_cases_may_not_choose(recipe, encoder, archive_of, source):
    (test,) = (case for case in opened(source).part("test") if case.group_name == "patient9")
    archive_of([(test.group_hmac, "file", "pixels", b"\xff" * HASH_BYTES)], opened(source).salt_fingerprint)
    with pytest.raises(CheckFailed, match=r"1 test cases are among the archive of data\.draw_encoder"):
        finetune(recipe(data={"labelled": 2, "draw_by": "kcenter", "draw_encoder": str(encoder)}))


def test_where_all_is_labelled_nothing_is_drawn(recipe, encoder):
    with pytest.raises(InputError, match=r"data\.draw_by=kcenter: all groups are labelled, and none is drawn"):
        finetune(recipe(data={"labelled": None, "draw_by": "kcenter", "draw_encoder": str(encoder)}))


def test_labels_behind_a_segmenter_that_draws_count(recipe, encoder, source):
    """As those of an encoder's probe do: they were made, and are not in test."""
    folder = model_folder(encoder)
    config = read_config(folder)
    hmacs = {case.group_name: case.group_hmac for case in opened(source).cases}
    used = LabelledGroups(groups=(hmacs["patient0"], "another"), salt_fingerprint=opened(source).salt_fingerprint)
    changed = config.model_copy(update={"provenance": config.provenance.model_copy(update={"labels": (used,)})})
    (folder / "config.json").write_text(changed.model_dump_json())
    made = recipe(data={"labelled": 2, "draw_by": "kcenter", "draw_encoder": str(encoder)})
    (counted,) = other_labels(made)
    assert set(counted.groups) == set(used.groups)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"draw_by": "kcenter"}, r"draw_by=kcenter, draw_encoder=None: one goes with the other; set data\.draw_encoder"),
        ({"draw_encoder": "runs/encoder"}, r"draw_by=random, draw_encoder=runs/encoder: .* set data\.draw_by, or leave it out"),
        ({"draw_by": "farthest"}, r"data\.draw_by='farthest': "),
    ],
)
def test_choices_that_do_not_fit(recipe, how, message):
    with pytest.raises(InputError, match=message):
        recipe(data={"labelled": 2, **how})


def test_an_encoder_that_is_not_there(recipe, tmp_path):
    with pytest.raises(InputError, match=r"nowhere"):
        choose_cases(recipe(data={"labelled": 2, "draw_by": "kcenter", "draw_encoder": str(tmp_path / "nowhere")}))
