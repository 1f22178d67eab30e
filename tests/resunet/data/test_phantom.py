import csv
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import cc3d
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from resunet.data.phantom import PhantomConfig, SimulatedPatient, simulate_patient, write_phantom
from resunet.errors import InputError

SMALL = PhantomConfig(pool=1, val=1, test=1, spacing_mm=(2.4, 2.4, 4.8))  # coarser than the default: half the time


@lru_cache
def simulated(seed: int) -> SimulatedPatient:
    return simulate_patient(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "sim", SMALL, seed=3)


@pytest.fixture(scope="module")
def patients(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    stems = sorted(path.name for path in (folder / "images").iterdir())
    return [
        tuple(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / kind / s))) for kind in ("images", "masks")) for s in stems
    ]


def lesion_sizes(mask: np.ndarray) -> np.ndarray:
    return cc3d.statistics(cc3d.connected_components(mask, connectivity=26))["voxel_counts"][1:]


def test_the_same_seed_gives_the_same_patient_and_another_seed_another() -> None:
    first, again, other = simulate_patient(0, SMALL), simulate_patient(0, SMALL), simulate_patient(1, SMALL)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert first.origin == again.origin != other.origin
    assert np.array_equal(first.lesion_volumes_mm3, again.lesion_volumes_mm3)
    assert first.image.dtype == np.uint16 and first.mask.dtype == np.uint8


def test_adding_patients_changes_no_other(folder: Path, tmp_path: Path) -> None:
    more = write_phantom(tmp_path / "more", replace(SMALL, pool=2), seed=3)
    for path in [*folder.glob("*/sim-*.nii.gz")]:
        a, b = (sitk.ReadImage(str(root / path.relative_to(folder))) for root in (folder, more))
        assert np.array_equal(sitk.GetArrayViewFromImage(a), sitk.GetArrayViewFromImage(b))
        assert a.GetOrigin() == b.GetOrigin()
    splits = [json.loads((root / "splits.json").read_text(encoding="utf-8")) for root in (folder, more)]
    assert all(splits[0][part] == splits[1][part] for part in ("val", "test"))
    assert set(splits[0]["pool"]) < set(splits[1]["pool"])


def test_both_readers_see_the_same_geometry_in_image_and_mask(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        affines = []
        for kind in ("images", "masks"):
            read = sitk.ReadImage(str(folder / kind / path.name))
            direction = np.array(read.GetDirection()).reshape(3, 3)
            lps = np.eye(4)
            lps[:3, :3], lps[:3, 3] = direction * read.GetSpacing(), read.GetOrigin()
            ras = nibabel.load(folder / kind / path.name)
            np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ lps, ras.affine, atol=1e-4)
            assert nibabel.aff2axcodes(ras.affine) == ("L", "P", "S")
            np.testing.assert_allclose(ras.header.get_zooms(), SMALL.spacing_mm, rtol=1e-6)
            assert ras.shape == read.GetSize()
            affines.append(ras.affine)
        assert np.array_equal(*affines)


def test_lesions_are_mostly_small_and_some_are_large() -> None:
    sizes = np.concatenate([lesion_sizes(simulated(seed).mask) for seed in range(3)])
    assert np.mean(sizes < 10) >= 0.3
    assert np.sum(sizes > 100) >= 2
    assert len(sizes) > 3 * 8


def test_the_lesion_table_is_that_of_the_mask() -> None:
    patient = simulated(1)
    volumes = lesion_sizes(patient.mask) * np.prod(patient.spacing)
    np.testing.assert_allclose(patient.lesion_volumes_mm3, np.sort(volumes)[::-1])
    assert patient.lesions == len(volumes) > 0


def test_lesions_are_inside_the_brain_and_brighter_than_what_surrounds_them(patients) -> None:
    for image, mask in patients:
        lesion, brain = mask == 1, ndimage.binary_fill_holes(image > 0)
        assert set(np.unique(mask)) == {0, 1}
        assert brain[lesion].all()
        around = ndimage.binary_dilation(lesion, iterations=3) & ~ndimage.binary_dilation(lesion) & brain
        assert image[lesion].mean() > 1.1 * image[around].mean()


def test_contrast_is_the_knob_and_leaves_the_lesions_where_they_are() -> None:
    faint, bright = simulate_patient(2, PhantomConfig(lesion_contrast=0.3)), simulated(2)
    assert np.array_equal(faint.mask, bright.mask)
    lesion = faint.mask == 1
    assert bright.image[lesion].mean() > 1.15 * faint.image[lesion].mean()


def test_grey_values_are_deep_and_no_anatomy_comes_twice(patients) -> None:
    middles = []
    for image, _ in patients:
        assert len(np.unique(image)) > 256
        assert not image[0].any() and image[1:3].any()  # cut to the brain
        assert not image[:, [0, -1]].any() and not image[:, :, [0, -1]].any()  # nobody's brain is cut off
        middles.append(image[len(image) // 2] > 0)
    assert len({middle.shape for middle in middles}) == 1
    for i, a in enumerate(middles):
        for b in middles[i + 1 :]:
            assert 2 * np.sum(a & b) / (a.sum() + b.sum()) < 0.99


def test_another_spacing_holds_the_same_volume_of_brain() -> None:
    coarse, fine = simulate_patient(0, SMALL), simulated(0)
    brains = [np.sum(p.image > 0) * np.prod(p.spacing) for p in (coarse, fine)]
    assert brains[0] == pytest.approx(brains[1], rel=0.05)
    assert 0.9e6 < brains[0] < 2.3e6  # mm3


def test_splits_and_groups_name_every_patient_once(folder: Path) -> None:
    splits = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    assert {part: len(stems) for part, stems in splits.items()} == {"pool": 1, "val": 1, "test": 1}
    listed = sorted(stem for stems in splits.values() for stem in stems)
    with (folder / "groups.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert listed == sorted(row["stem"] for row in rows) == [f"sim-{i:04d}" for i in range(1, 4)]
    assert len({row["group"] for row in rows}) == 3
    for kind in ("images", "masks"):
        assert sorted(path.name for path in (folder / kind).iterdir()) == [f"{stem}.nii.gz" for stem in listed]
    assert "SIMULATED" in (folder / "SOURCE.txt").read_text(encoding="utf-8")


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "note").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_phantom(tmp_path / "sim", SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["sim", "note"]


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert (done, total) == (1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "sim", SMALL, progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"pool": -1}, {"pool": 0, "val": 0, "test": 0}, {"spacing_mm": (0, 2, 4)}, {"noise": (0.2, 0.1)}, {"places": (1, 1, 1)}],
)
def test_a_config_out_of_range_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(InputError, match="allowed is"):
        PhantomConfig(**wrong)
