import hashlib
import weakref
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from resunet.data.describe import DESCRIBED, PERCENTILES, counted_percentiles, describe, open_file, open_scan
from resunet.data.images import read_scan
from resunet.data.perceptual import look
from resunet.data.walk import walk


@pytest.fixture
def files(tmp_path):
    """Images of 8 and 16 bits and colours, one that is large, and a volume."""
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(40, 50), (64, 64), (30, 20, 3), (600, 600), (33, 7)]):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / f"{number}.png")
    Image.fromarray(rng.integers(0, 2**16, (40, 40), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(rng.integers(0, 256, (48, 64), np.uint8)).save(tmp_path / "x.jpg")
    sitk.WriteImage(sitk.GetImageFromArray(rng.random((6, 7, 8), np.float32)), tmp_path / "v.nii.gz")
    return walk([tmp_path]).files


def test_facts_are_those_of_each_file_alone(files):
    described = describe(map(open_file, files))
    assert not described.headers and described.scans.schema.equals(DESCRIBED)
    described.scans.validate(full=True)
    for file, row in zip(files, described.scans.to_pylist(), strict=True):
        scan = read_scan(Path(file.path), None)
        seen = look(scan.values)
        assert row["file_sha256"] == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
        assert row["pixel_sha256"] == scan.pixel_sha256 and row["perceptual"] == seen.hash
        assert row["thumbnail"] == seen.thumbnail.tobytes()
        assert (tuple(row["shape"]), row["channels"]) == (scan.values.shape[1:], scan.values.shape[0])
        assert (row["dtype"], row["format"], row["modality"]) == (scan.values.dtype.name, scan.format, scan.modality)
        assert (row["files"], row["bytes"], row["orientation"]) == (1, file.size, scan.orientation)
        assert np.array_equal(row["spacing"], np.float32(scan.spacing))
        assert np.allclose(row["percentiles"], np.percentile(scan.values, PERCENTILES), rtol=1e-6)
        assert describe([open_scan((file,))]).scans.to_pylist() == [row]


def test_few_decoded_scans_are_held_at_a_time(tmp_path):
    """A chunk of small files may decode to more than memory holds."""
    for number in range(8):
        Image.fromarray(np.full((2000, 3000), number, np.uint8)).save(tmp_path / f"{number}.png")
    seen, alive = [], []

    def opened():
        for file in walk([tmp_path]).files:
            one = open_file(file)
            seen.append(weakref.ref(one.scan.values))
            alive.append(sum(values() is not None for values in seen))
            yield one

    found = describe(opened())
    assert [row["percentiles"][0] for row in found.scans.to_pylist()] == list(range(8))
    assert max(alive) <= 4


def test_nothing_gives_no_rows():
    assert describe([]).scans.num_rows == 0


def test_counted_percentiles_are_those_of_the_values():
    rng = np.random.default_rng(1)
    values = [rng.integers(low, high, size) for low, high, size in ((0, 256, 4000), (7, 9, 3), (255, 256, 1), (0, 2, 999))]
    counts = np.array([np.bincount(one, minlength=256) for one in values])
    assert np.allclose(counted_percentiles(counts), [np.percentile(one, PERCENTILES) for one in values], rtol=1e-12)
