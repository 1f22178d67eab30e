"""Scans read as volumes; what they share with slices is in test_scans.py."""

import dataclasses
import pickle

import numpy as np
import pytest

from resunet.config import FixedNormalisation, PercentileZScore
from resunet.data.cases import Case
from resunet.data.foreground import foreground_map
from resunet.data.preparing import BLOCK, DIRECT_PIXELS, prepare_scans
from resunet.data.scans import Scans
from resunet.data.store import Store
from resunet.runtime import normalise, percentile_intensity

RAW = FixedNormalisation(kind="fixed", low=-1e6, high=1e6, mean=0, std=1)
ZSCORE = PercentileZScore()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def volumes_of(store: Store, *cases: Case, normalisation=ZSCORE) -> Scans:
    return Scans(cases, list(prepare_scans(cases, "grey", normalisation, store, 3)), "grey", normalisation, store, 3)


def test_a_whole_window_is_the_normalised_volume_with_its_spacing(tmp_path, store, random, volume):
    values = random(6, 30, 40).astype(np.int16) - 1000
    values[2] = 7  # a slice without contrast is a part of the volume all the same
    sideways = random(20, 9, 24, seed=1)
    scans = volumes_of(store, volume(tmp_path / "a.nii.gz", values), volume(tmp_path / "b.mha", sideways, (0.5, 4, 0.75)))
    assert scans.num_items == 2 and scans.items == "volumes"
    for item, (raw, spacing) in enumerate(((values, (3, 1, 1)), (sideways, (0.5, 4, 0.75)))):
        window = scans.window(item, 64, rng())
        np.testing.assert_array_equal(window.values, normalise(raw[None], percentile_intensity(raw[None], 0.5, 99.5)))
        assert window.spacing == pytest.approx(spacing) and window.scan == item
        assert window.axis is None and np.isnan(window.position)


@pytest.mark.parametrize("size", [8, (4, 30, 50), 100])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_window_is_a_part_of_the_volume_and_holds_its_anchors(tmp_path, store, size, axis, volume):
    """Of a bright ball on black; anchors are on the ball's blocks, which are one slice thick along the coarsest axis."""
    shape = [70, 66, 90]
    shape[axis] = 24
    at = np.indices(shape)
    centre = [50, 20, 60]
    centre[axis] = 15
    reach = np.array([20, 18, 20])
    reach[axis] = 5
    ball = sum(((a - c) / r) ** 2 for a, c, r in zip(at, centre, reach, strict=True)) < 1
    values = np.where(ball, 1000 + np.arange(ball.size).reshape(shape), 0).astype(np.int32)  # no value twice
    spacing = tuple(3.0 if i == axis else 1.0 for i in range(3))
    scans = volumes_of(store, volume(tmp_path / "a.nii", values, spacing), normalisation=RAW)
    content = foreground_map(values[None], tuple(1 if i == axis else BLOCK for i in range(3)))
    assert content.mask.mean() < 0.3
    sides = (size,) * 3 if isinstance(size, int) else size
    corners = set()
    for seed in range(40):
        window = scans.window(0, size, rng(seed))
        assert window.values.shape == (1, *(min(side, n) for side, n in zip(sides, shape, strict=True)))
        assert window.anchors.shape == (2, 3) and ((window.anchors >= 0) & (window.anchors < window.values.shape[1:])).all()
        if not window.values.any():  # at the edge of a block that has content
            assert size != 100
            continue
        place = np.argwhere(values == window.values.max())[0] - np.argwhere(window.values[0] == window.values.max())[0]
        cut = tuple(slice(first, first + n) for first, n in zip(place, window.values.shape[1:], strict=True))
        np.testing.assert_array_equal(window.values[0], values[cut])
        for anchor in window.anchors:
            assert content.mask[tuple((place + anchor) // content.block)]
        corners.add(tuple(place))
    assert len(corners) == 1 if size == 100 else len(corners) > 9


def test_what_is_no_volume_is_left_out_and_not_stored(tmp_path, store, random, png, volume, known):
    side = int(DIRECT_PIXELS**0.5) + 1
    cases = [
        png(tmp_path / "a.png", random(20, 30)),
        volume(tmp_path / "b.nii", random(4, 20, 30)),
        volume(tmp_path / "single.nii", random(1, 20, 30)),
        png(tmp_path / "large.png", np.resize(np.arange(251, dtype=np.uint8), (side, side))),
        volume(tmp_path / "air.nii", np.full((5, 20, 20), -1000, np.int16)),
        volume(tmp_path / "c.nii", random(3, 22, 30)),
        volume(tmp_path / "sagittal.mha", random(20, 1, 24), (1, 4, 1)),
    ]
    for its in (cases, [known(one) for one in cases]):
        prepared = list(prepare_scans(its, "grey", ZSCORE, store, 3))
        assert [one.is_volume for one in prepared] == [False, True, False, False, True, True, False]
        scans = Scans(its, prepared, "grey", ZSCORE, store, 3)
        assert [scans.window(i, 64, rng()).scan for i in range(scans.num_items)] == [1, 5]
        assert store.size()[0] == 3
    for one in (cases[0], cases[2], cases[3], cases[6]):
        one.files[0].unlink()
    assert list(prepare_scans(its, "grey", ZSCORE, store, 3)) == prepared, "a manifest knows: they are not even there"


def test_slices_and_volumes_share_the_store(tmp_path, store, random, volume):
    cases = [volume(tmp_path / "a.nii", random(4, 20, 30)), volume(tmp_path / "single.nii", random(1, 20, 30))]
    flat = list(prepare_scans(cases, "grey", ZSCORE, store))
    assert [(one.num_slices, one.is_volume, one.decoded) for one in flat] == [(4, True, True), (1, False, True)]
    again = list(prepare_scans(cases, "grey", ZSCORE, store, 3))
    assert [dataclasses.replace(one, decoded=True) for one in again] == flat and not any(one.decoded for one in again)
    assert Scans(cases, again, "grey", ZSCORE, store, 3).num_items == 1


def test_volumes_may_be_pickled(tmp_path, store, random, volume):
    scans = volumes_of(store, volume(tmp_path / "b.nii", random(9, 20, 30)))
    again = pickle.loads(pickle.dumps(scans))
    one, other = (its.window(0, 8, rng(3)) for its in (scans, again))
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.anchors, other.anchors)
