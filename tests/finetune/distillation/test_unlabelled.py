import json

import numpy as np
import pytest
import torch

from finetune.distillation.unlabelled import MixedSampler
from finetune.labelled import read_labelled, resolve
from finetune.training.patches import UNLABELLED, PatchSampler
from resunet.config import FixedNormalisation
from resunet.data.cases import IGNORE, Case, LoadedCase, intensities_of
from resunet.data.index import IndexRequest, index
from resunet.data.perceptual import look


def scan(shape: tuple[int, ...], value: int, spacing: tuple[float, ...]) -> LoadedCase:
    values = np.full((1, *shape), value, np.int16) + np.arange(shape[-1], dtype=np.int16)
    case = Case(str(value), "", "", "", None, (), None)
    by = intensities_of(values, FixedNormalisation(kind="fixed", low=0, high=30000, mean=0, std=1))
    return LoadedCase(case, values, spacing, by, None, "", "", look(values))


class Labelled:
    def batch(self, size, entropy):
        assert size == 1
        return ("labelled", entropy)


@pytest.mark.parametrize("share, size, expected", [(0.5, 8, 4), (0.25, 8, 2), (0.9, 4, 3), (0, 8, 0)])
def test_a_share_of_every_batch_is_unlabelled(share, size, expected):
    mixed = MixedSampler(Labelled(), [scan((9, 9), 100, (1, 1))], (4, 4), share, size)
    kinds = [mixed.batch(1, (0, 2, 5, place))[0] == "labelled" for place in range(size)]
    assert kinds.count(False) == expected
    if expected == size // 2 and size > 1:  # half of it: every rank has as many of both
        assert sum(kinds[: size // 2]) == sum(kinds[size // 2 :])


def test_an_unlabelled_patch_is_a_piece_of_a_scan():
    scans = [scan((9, 40), 100, (1, 2)), scan((30, 40), 2000, (3, 4))]
    mixed = MixedSampler(Labelled(), scans, (12, 12), 0.5, 2)
    (place,) = mixed.places
    seen = set()
    for step in range(20):
        images, labels, spacing = mixed.batch(1, (0, 2, step, place))
        assert images.shape == (1, 1, 12, 12) and labels.shape == (1, 12, 12) and labels.dtype == torch.uint8
        low = int(images.min()) // 1000
        seen.add((low, int(images.min())))
        assert spacing.tolist() == [[1, 2], [3, 4]][low > 0 :][:1]
        beyond = 3 if low == 0 else 0  # of 12 rows 9 are the scan's
        assert int((labels == IGNORE).sum()) == beyond * 12 and int((labels == UNLABELLED).sum()) == (12 - beyond) * 12
        assert torch.equal(images, mixed.batch(1, (0, 2, step, place)).images)
    assert len(seen) > 4 and {low for low, _ in seen} == {0, 2}


def test_a_volume_without_labels():
    volume = scan((6, 20, 20), 500, (5, 1, 1))
    mixed = MixedSampler(Labelled(), [volume], (8, 8), 0.5, 2)
    assert len(mixed.units) == 6 and mixed.batch(1, (0, 1)).images.shape == (1, 1, 8, 8)
    whole = MixedSampler(Labelled(), [volume], (4, 8, 8), 0.5, 2)
    assert len(whole.units) == 1 and whole.batch(1, (0, 1)).labels.unique().tolist() == [UNLABELLED]


def taught(recipe, runs, **changes):
    return resolve(recipe(teacher=str(runs[0]), **changes))


def test_the_pool_that_was_not_drawn_is_read_without_its_masks(recipe, runs, source):
    ours = taught(recipe, runs, data={"labelled": 2, "draw": 1})
    data = read_labelled(ours, quiet=True)
    train, unlabelled = ({one.case.group_name for one in part} for part in (data.train, data.unlabelled))
    assert len(train) == 2 and train | unlabelled == {f"patient{i}" for i in range(5)} and not train & unlabelled
    assert all(one.labels is None for one in data.unlabelled) and len(data.val) == 2
    assert f"{len(data.unlabelled)} unlabelled scans of 3 groups are learned from, too." in data.notes()
    for one in data.unlabelled:
        (source / "masks" / f"{one.case.stem}.png").write_bytes(b"nobody's")
    again = read_labelled(ours, quiet=True)
    assert [one.case.id for one in again.unlabelled] == [one.case.id for one in data.unlabelled]


@pytest.mark.parametrize(
    "changes", [{"data": {"labelled": 2}, "distillation": {"unlabelled": 0}}, {}], ids=["not asked", "none"]
)
def test_labelled_only(recipe, runs, changes):
    assert read_labelled(taught(recipe, runs, **changes), quiet=True).unlabelled == []
    assert read_labelled(resolve(recipe(data={"labelled": 2})), quiet=True).unlabelled == []  # nobody to ask


def test_a_manifests_scans_without_masks_are_unlabelled(recipe, runs, source, tmp_path):
    """Of the pool; those of groups that are held out stay out."""
    masks, splits = source / "masks", json.loads((source / "splits.json").read_text(encoding="utf-8"))
    for stem in ("c01a", "c02a", "c08a"):  # two of the pool, one of test
        (masks / f"{stem}.png").unlink()
    assert "c08a" in splits["test"]
    request = IndexRequest((source,), tmp_path / "m.parquet", masks, workers=1, salt_file=source.parent / "salt")
    index(request)
    data = read_labelled(taught(recipe, runs, data={"source": str(tmp_path / "m.parquet")}), quiet=True)
    assert sorted(one.case.id for one in data.unlabelled) == ["c01a", "c02a"]
    assert len(data.train) == 4 and len(data.test) == 5


def test_patches_of_labelled_cases_are_what_they_were(recipe):
    """Cutting is shared with unlabelled scans: the random numbers of labelled ones are drawn as before."""
    data = read_labelled(resolve(recipe()), quiet=True)
    sampler = PatchSampler(data.train, (16, 16), 0.5)
    mixed = MixedSampler(sampler, [scan((30, 30), 7, (1, 1))], (16, 16), 0.5, 4)
    for place in set(range(4)) - mixed.places:
        for one, other in zip(mixed.batch(1, (0, 3, place)), sampler.batch(1, (0, 3, place)), strict=True):
            assert torch.equal(one, other)
