import dataclasses
import os
import pickle

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from resunet.config import FixedNormalisation, PercentileZScore
from resunet.data.cases import Case, read_case
from resunet.data.describe import PERCENTILES
from resunet.data.foreground import foreground_map
from resunet.data.images import read_scan
from resunet.data.order import shuffled_places
from resunet.data.perceptual import look
from resunet.data.preparing import BLOCK, DIRECT_PIXELS, evidence_of_scans, look_at_cases, prepare_scans
from resunet.data.scans import Scans
from resunet.data.store import Store
from resunet.errors import EnvironmentFault, InputError
from resunet.files import files_sha256
from resunet.runtime import normalise, percentile_intensity

RAW = FixedNormalisation(kind="fixed", low=-1e6, high=1e6, mean=0, std=1)
ZSCORE = PercentileZScore()


def scans_of(store: Store, *cases: Case, channels: str | int = "grey", normalisation=ZSCORE) -> Scans:
    return Scans(cases, list(prepare_scans(cases, channels, normalisation, store)), channels, normalisation, store)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_window_says_where_it_is_from(tmp_path, store, random, case, png, volume):
    """The scan, and how far along its slice axis in LPS, whatever way the file runs; slices without content count as places."""
    values = random(6, 30, 40).astype(np.int16)
    values[1] = 5
    upright = volume(tmp_path / "a.nii.gz", values)
    image = sitk.GetImageFromArray(values[::-1].copy())
    image.SetSpacing([1, 1, 3])
    image.SetDirection([1, 0, 0, 0, 1, 0, 0, 0, -1])
    sitk.WriteImage(image, str(tmp_path / "b.nii.gz"))
    sideways = volume(tmp_path / "c.mha", random(20, 3, 24), (1, 4, 1))
    single = volume(tmp_path / "d.mha", random(20, 1, 24), (1, 4, 1))
    scans = scans_of(store, png(tmp_path / "e.png", random(20, 20)), upright, case(tmp_path / "b.nii.gz"), sideways, single)
    windows = [scans.window(i, 64, rng()) for i in range(scans.num_items)]
    places = [(window.scan, window.axis, window.position) for window in windows]
    along = [0, 0.4, 0.6, 0.8, 1]
    assert places[0][:2] == (0, None) and np.isnan(places[0][2])
    assert places[1:6] == [(1, 0, one) for one in along] and places[6:11] == [(2, 0, one) for one in along]
    assert places[11:14] == [(3, 1, 0), (3, 1, 0.5), (3, 1, 1)]
    assert len(places) == 15 and places[14][0] == 4 and np.isnan(places[14][2])
    for one, other in zip(windows[1:6], windows[6:11], strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_an_image_is_where_its_case_says(tmp_path, store, random, png, volume):
    """So is a volume of one slice, or a stored image; the slices of a volume are where they are."""
    side = int(DIRECT_PIXELS**0.5) + 1
    large = np.resize(np.arange(251, dtype=np.uint8), (side, side))
    cases = [
        png(tmp_path / "a.png", random(20, 30), position=0.25),
        png(tmp_path / "large.png", large, position=0.5),
        volume(tmp_path / "single.mha", random(20, 1, 24), (1, 4, 1), position=0.75),
        volume(tmp_path / "b.nii", random(2, 20, 30), position=0.9),
    ]
    scans = scans_of(store, *cases)
    windows = [scans.window(i, 64, rng()) for i in range(scans.num_items)]
    assert [(window.axis, window.position) for window in windows] == [(None, 0.25), (None, 0.5), (1, 0.75), (0, 0), (0, 1)]


def test_a_whole_window_is_the_normalised_slice_of_the_whole_scan(tmp_path, store, random, png, volume):
    """Images and volumes, whatever their type, size, axis and channels; constant slices are left out."""
    floats = random(6, 30, 40).astype(np.float32) * 1e3 - 5e5
    thick = random(40, 7, 33, seed=1).astype(np.int16) - 1000
    thick[:, 3] = 77
    (tmp_path / "rgb").mkdir()
    pieces = [png(tmp_path / f"{i}.png", random(25 + i, 40, seed=i)) for i in range(3)]
    pieces += [volume(tmp_path / "a.nii.gz", floats), volume(tmp_path / "b.mha", thick, (1, 4, 1))]
    expected = []
    for one in pieces:
        values = read_case(one, "grey").values
        normalised = normalise(values, percentile_intensity(values, 0.5, 99.5))
        axis = {3: None, 4: 1 + int("b.mha" in one.where())}[values.ndim]
        count = 1 if axis is None else values.shape[axis]
        slices = [normalised if axis is None else normalised.take(i, axis=axis) for i in range(count)]
        expected += [one for i, one in enumerate(slices) if not (axis == 2 and i == 3)]
    scans = scans_of(store, *pieces)
    assert scans.num_items == len(expected) == 3 + 6 + 6
    for item, wanted in enumerate(expected):
        np.testing.assert_array_equal(scans.window(item, 64, rng(item)).values, wanted)
    assert store.size()[0] == 2  # images are read as they are


def test_channels_are_read_as_they_are_asked_for(tmp_path, store, random, case, png, volume):
    colour = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    one = png(tmp_path / "colour.png", colour)
    for channels, count in (("rgb", 3), ("grey", 1)):
        values = read_case(one, channels).values
        window = scans_of(store, one, channels=channels).window(0, 64, rng())
        assert window.values.shape == (count, 20, 30)
        np.testing.assert_array_equal(window.values, normalise(values, percentile_intensity(values, 0.5, 99.5)))
    files = [tmp_path / f"{i}.nii" for i in range(3)]
    for i, path in enumerate(files):
        volume(path, random(4, 20, 30, seed=i))
    joined = case(*files, file_per_channel=True)
    values = read_case(joined, 3).values
    scans = scans_of(store, joined, channels=3)
    normalised = normalise(values, percentile_intensity(values, 0.5, 99.5))
    for i in range(4):
        np.testing.assert_array_equal(scans.window(i, 64, rng()).values, normalised[:, i])


@pytest.mark.parametrize("size", [8, 48, 100, 300])
def test_a_window_is_a_part_of_the_slice_and_holds_its_anchors(tmp_path, store, size, png, volume):
    """Of a bright disc on black, as an image and as the slices of a volume: anchors are on the disc's blocks."""
    y, x = np.mgrid[:136, :200]
    disc = (y - 90) ** 2 + (x - 40) ** 2 < 25**2
    values = np.where(disc, 1000 + y * 200 + x, 0).astype(np.uint16)  # no value twice
    stack = np.stack([values, np.zeros_like(values), values])
    scans = scans_of(store, png(tmp_path / "a.png", values), volume(tmp_path / "a.nii", stack), normalisation=RAW)
    assert scans.num_items == 3
    image, its_slices = foreground_map(values[None], BLOCK).mask, foreground_map(stack[None], (1, BLOCK, BLOCK)).mask
    content_of = [image, its_slices[0], its_slices[2]]
    assert all(content.mean() < 0.3 for content in content_of)
    corners = set()
    for item in range(3):
        for seed in range(40):
            window = scans.window(item, size, rng(seed))
            assert window.values.shape == (1, min(size, 136), min(size, 200))
            if not window.values.any():  # at the edge of a block that has content
                assert size == 8
                continue
            place = np.argwhere(values == window.values.max())[0] - np.argwhere(window.values[0] == window.values.max())[0]
            cut = tuple(slice(first, first + n) for first, n in zip(place, window.values.shape[1:], strict=True))
            np.testing.assert_array_equal(window.values[0], values[cut])
            assert window.anchors.shape == (2, 2)
            for anchor in window.anchors:
                assert (anchor >= 0).all() and (anchor < window.values.shape[1:]).all()
                assert content_of[item][tuple((place + anchor) // BLOCK)]
            corners.add(tuple(place))
    assert len(corners) == 1 if size == 300 else len(corners) > 9


def test_a_volume_and_its_slice_as_an_image_give_the_same_windows(tmp_path, store, random, png, volume):
    values = np.zeros((120, 150), np.uint16)
    values[30:90, 20:130] = random(60, 110, high=900) + 100
    direct, stored = png(tmp_path / "a.png", values), volume(tmp_path / "a.nrrd", values[None], (5, 1, 1))
    scans = scans_of(store, direct, stored, normalisation=RAW)
    assert store.size()[0] == 1 and scans.num_items == 2
    for seed in range(20):
        one, other = (scans.window(item, 40, rng(seed)) for item in range(2))
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.anchors, other.anchors)


def test_large_images_are_stored(tmp_path, store, png, known):
    side = int(DIRECT_PIXELS**0.5) + 1
    values = (np.add.outer(np.arange(side), 2 * np.arange(side)) % 251).astype(np.uint8)
    one = png(tmp_path / "large.png", values)
    scans = scans_of(store, one, normalisation=RAW)
    assert store.size()[0] == 1 and scans.num_items == 1
    window = scans.window(0, 64, rng())
    assert window.values.shape == (1, 64, 64)
    first = int(window.values[0, 0, 0])
    np.testing.assert_array_equal(window.values[0], np.add.outer(np.arange(64), 2 * np.arange(64) + first) % 251)
    (again,) = prepare_scans([known(one)], "grey", RAW, store)
    assert not again.decoded and again.key and again.looked is None


def test_content_is_decoded_once(tmp_path, store, random, case, png, volume):
    cases = [volume(tmp_path / "a.nii", random(4, 20, 30)), png(tmp_path / "b.png", random(20, 30))]
    first, second = (list(prepare_scans(cases, "grey", ZSCORE, store)) for _ in range(2))
    assert [one.decoded for one in first] == [True, False] and not any(one.decoded for one in second)
    assert [dataclasses.replace(one, decoded=False) for one in first] == second
    entry = next(store.folder.glob("??/*"))
    copy = case(tmp_path / "renamed.nii")
    copy.files[0].write_bytes(cases[0].files[0].read_bytes())
    (same,) = prepare_scans([copy], "grey", ZSCORE, store)
    assert same == second[0]
    others = [("grey", RAW, copy), ("grey", ZSCORE, dataclasses.replace(copy, spacing=(1.0, 1.0, 4.0)))]
    for channels, normalisation, one in others:  # what is kept depends on how it is read
        (other,) = prepare_scans([one], channels, normalisation, store)
        assert other.decoded and other.key != same.key
    entry.unlink()
    (again,) = prepare_scans([copy], "grey", ZSCORE, Store(store.folder))
    assert again.decoded and again.key == same.key


def test_scans_without_any_content_have_no_slices(tmp_path, store, random, png, volume, known):
    one_bright = np.zeros((40, 40), np.uint8)
    one_bright[3, 3] = 200  # clipped away
    cases = [
        volume(tmp_path / "air.nii", np.full((5, 20, 20), -1000, np.int16)),
        png(tmp_path / "a.png", random(20, 30)),
        png(tmp_path / "black.png", np.zeros((20, 20), np.uint8)),
        png(tmp_path / "bright.png", one_bright),
        png(tmp_path / "b.png", random(22, 30)),
    ]
    for its in (cases, [known(one) for one in cases]):
        prepared = list(prepare_scans(its, "grey", ZSCORE, store))
        assert [one.num_slices for one in prepared] == [0, 1, 0, 0, 1]
        scans = Scans(its, prepared, "grey", ZSCORE, store)
        assert [scans.window(i, 64, rng()).values.shape[1] for i in range(2)] == [20, 22]
    assert Scans([], [], "grey", ZSCORE, store).num_items == 0


def test_what_a_manifest_knows_is_not_read(tmp_path, store, random, png, known):
    """A folder of images is not decoded, only looked at; of colour the manifest cannot tell all, and keeps."""
    cases = [png(tmp_path / f"{i}.png", random(20 + i, 30, seed=i)) for i in range(3)]
    flat = png(tmp_path / "flat.png", np.full((20, 20), 9, np.uint8))
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 200
    colours = [png(tmp_path / "red.png", red)]
    its = [known(one) for one in (*cases, flat, *colours)]
    prepared = list(prepare_scans(its, "grey", ZSCORE, store))
    assert [one.num_slices for one in prepared] == [1, 1, 1, 0, 1] and all(one.looked is None for one in prepared)
    for one in its:  # the same size and time: their content is not read
        stat = one.files[0].stat()
        one.files[0].write_bytes(bytes(stat.st_size))
        os.utime(one.files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert list(prepare_scans(its, "grey", ZSCORE, store)) == prepared


@pytest.mark.parametrize("ending", ["png", "nii"])
def test_a_file_that_changed_since_it_was_indexed(tmp_path, store, ending, random, png, volume, known):
    make = {"png": lambda seed: png(tmp_path / "a.png", random(20, 30, seed=seed)),
            "nii": lambda seed: volume(tmp_path / "a.nii", random(3, 20, 30, seed=seed))}[ending]  # fmt: skip
    one = known(make(0))
    os.utime(one.files[0], ns=(1, 1))  # a copy of the archive: another time, the same content
    assert next(prepare_scans([one], "grey", ZSCORE, store)).num_slices
    if ending == "nii":
        store = Store(tmp_path / "another")
    make(1)
    with pytest.raises(InputError, match=rf"a\.{ending}: has changed since it was indexed\. Run resunet index again\."):
        list(prepare_scans([one], "grey", ZSCORE, store))
    one.files[0].unlink()
    with pytest.raises(InputError, match=rf"a\.{ending}: cannot be read: .*restore it, or run resunet index again"):
        list(prepare_scans([one], "grey", ZSCORE, store))


def test_what_the_store_knows_needs_no_file(tmp_path, store, random, volume, known):
    one = known(volume(tmp_path / "a.nii", random(3, 20, 30)))
    (first,) = prepare_scans([one], "grey", ZSCORE, store)
    one.files[0].unlink()
    scans = scans_of(store, one)
    assert first.num_slices == scans.num_items == 3 and scans.window(2, 64, rng()).values.shape == (1, 20, 30)


def test_files_and_stored_scans_that_vanish(tmp_path, store, random, png, volume):
    cases = [png(tmp_path / "a.png", random(20, 30)), volume(tmp_path / "b.nii", random(3, 20, 30))]
    scans = scans_of(store, *cases)
    cases[0].files[0].unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        scans.window(0, 64, rng())
    next(store.folder.glob("??/*")).unlink()
    with pytest.raises(EnvironmentFault, match=r"a decoded scan is missing or damaged\. resume=true decodes it again"):
        scans.window(1, 64, rng())


def test_the_first_file_at_fault_is_told(tmp_path, store, random, png):
    cases = [png(tmp_path / f"{i:02}.png", random(20, 30, seed=i)) for i in range(40)]
    for i in (7, 30):
        cases[i].files[0].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"07\.png"):
        list(prepare_scans(cases, "grey", ZSCORE, store))
    with pytest.raises(InputError, match=r"07\.png"):
        list(look_at_cases(cases, "grey"))


def test_results_are_in_order(tmp_path, store, random, png):
    cases = [png(tmp_path / f"{i:02}.png", random(20 + i, 30, seed=i)) for i in range(40)]
    looked = list(look_at_cases(cases, "grey"))
    assert looked == [one.looked for one in prepare_scans(cases, "grey", ZSCORE, store)]
    for one, its in zip(cases, looked, strict=True):
        scan = read_scan(one.files[0], None)
        assert (its.file_sha256, its.pixel_sha256) == (files_sha256(one.files), scan.pixel_sha256)
        assert its.perceptual == look(scan.values).hash
    evidence = evidence_of_scans(cases, looked, "salt")
    assert evidence.table.column("pixel_sha256").to_pylist() == [its.pixel_sha256 for its in looked]
    np.testing.assert_array_equal(evidence.thumbnail(3), look(read_scan(cases[3].files[0], None).values).thumbnail)


def test_an_epoch_visits_every_slice_once(tmp_path, store, random, png, volume):
    """Slices are told by a number that only they hold."""
    cases, numbers = [], []
    for i, depth in enumerate((3, 1, 5)):
        stack = random(depth, 20, 24, seed=i, high=100)
        stack[:, 0, 0] = 1000 + 10 * i + np.arange(depth)
        numbers += stack[:, 0, 0].tolist()
        cases.append(volume(tmp_path / f"{i}.nii", stack))
    image = random(20, 24, high=100)
    image[0, 0] = 5000
    cases.insert(1, png(tmp_path / "a.png", image))
    scans = scans_of(store, *cases, normalisation=RAW)
    order = shuffled_places(np.arange(scans.num_items), scans.num_items, 0, 0)
    seen = [int(scans.window(int(item), 64, rng()).values[0, 0, 0]) for item in order]
    assert sorted(seen) == sorted([*numbers, 5000]) and seen != sorted(seen)


def test_scans_may_be_pickled(tmp_path, store, random, png, volume):
    scans = scans_of(store, png(tmp_path / "a.png", random(20, 30)), volume(tmp_path / "b.nii", random(3, 20, 30)))
    again = pickle.loads(pickle.dumps(scans))
    for item in range(4):
        np.testing.assert_array_equal(again.window(item, 8, rng(item)).values, scans.window(item, 8, rng(item)).values)


def test_every_part_of_the_content_has_its_turn(tmp_path, store, png):
    values = np.zeros((200, 200), np.uint8)
    values[100:196, 8:120] = np.random.default_rng(0).integers(60, 255, (96, 112))
    scans = scans_of(store, png(tmp_path / "a.png", values))
    anchors = np.zeros((13, 13), int)
    for seed in range(300):
        window = scans.window(0, 500, rng(seed))
        for y, x in window.anchors // BLOCK:
            anchors[y, x] += 1
    content = foreground_map(values[None], BLOCK).mask
    assert (anchors[~content] == 0).all() and anchors[content].min() > 0
    assert anchors[content].max() < 5 * anchors[content].mean()


def test_percentiles_are_those_of_a_manifest():
    assert PERCENTILES[0] == 0 and PERCENTILES[-1] == 100 and {0.5, 99.5} <= set(PERCENTILES)


def test_a_large_tiff_of_many_channels(tmp_path, store, case):
    values = np.random.default_rng(0).random((3, 5, 16, 16)).astype(np.float32)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, values.transpose(0, 2, 3, 1), photometric="minisblack", planarconfig="contig", metadata={"axes": "ZYXS"}
    )
    one = case(path)
    read = read_case(one, 5).values
    assert read.shape == (5, 3, 16, 16)
    scans = scans_of(store, one, channels=5)
    normalised = normalise(read, percentile_intensity(read, 0.5, 99.5))
    for i in range(3):
        np.testing.assert_array_equal(scans.window(i, 32, rng()).values, normalised[:, i])
