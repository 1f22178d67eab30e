"""Masks in the geometry of their scan, as nibabel, SimpleITK, highdicom and PIL see them."""

from pathlib import Path

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from resunet.data.images import Scan, read_scan
from resunet.errors import InputError
from resunet.inference.masks import Prediction, raw_labels, write_prediction

CLASSES = {0: "background", 3: "liver", 200: "tumour"}
RAW = np.array(list(CLASSES), np.uint8)


def values(*shape: int) -> np.ndarray:
    """Every voxel is a number of its own."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def thirds(scan: np.ndarray) -> np.ndarray:
    """What a network might make of it: class indices that depend on each voxel's value alone."""
    return (scan.astype(np.int64) * 7919 % 101 % 3).astype(np.uint8)


def shares(scan: np.ndarray, count: int) -> np.ndarray:
    return np.stack([(scan.astype(np.float32) + channel) % 11 / 11 for channel in range(count)])


def prediction(scan: Scan, *files: Path, probabilities: int = 0, classes=CLASSES) -> Prediction:
    made = shares(scan.values[0], probabilities) if probabilities else thirds(scan.values[0])
    return Prediction(made, classes, files, scan.format, scan.orientation, "ab" * 32)


def written(folder: Path, *files: Path, probabilities: int = 0, classes=CLASSES) -> Path:
    scan = read_scan(files if len(files) > 1 else files[0], None)
    made = write_prediction(prediction(scan, *files, probabilities=probabilities, classes=classes), folder, "sub/a")
    assert [path.name for path in (folder / "sub").iterdir()] == [made.name], "nothing half-written is left"
    return made


def oblique(*spacing: float) -> np.ndarray:
    """An affine whose axes are turned by some 20° about x and 30° about z, and permuted."""
    x, z = np.radians(20.3), np.radians(30.7)
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = (about_z @ about_x)[:, [1, 2, 0]] * np.array([-1, 1, -1]) * spacing
    affine[:3, 3] = -17.3, 40.1, 1 / 3
    return affine


@pytest.mark.parametrize("codes", [(1, 1), (0, 2), (4, 0), (0, 0)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_in_an_oblique_orientation(tmp_path, codes, suffix):
    source = nibabel.Nifti1Image(values(4, 6, 9), oblique(1, 1, 5))
    sform, qform = codes
    source.header.set_sform(oblique(1, 1, 5), sform)
    source.header.set_qform(oblique(1, 1, 5), qform)
    source.header["descrip"] = b"Surname^Given"
    nibabel.save(nibabel.Nifti1Image(source.dataobj, None, source.header), tmp_path / f"scan{suffix}")
    made = written(tmp_path / "out", tmp_path / f"scan{suffix}")
    assert made.name == f"a{suffix}"
    before, after = nibabel.load(tmp_path / f"scan{suffix}"), nibabel.load(made)
    assert after.affine.tobytes() == before.affine.tobytes() and after.shape == before.shape
    for field in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "xyzt_units"):
        assert after.header[field].tobytes() == before.header[field].tobytes(), field
    assert after.get_data_dtype() == np.uint8 and b"Surname" not in bytes(after.header.binaryblock)
    np.testing.assert_array_equal(np.asarray(after.dataobj), RAW[thirds(np.asarray(before.dataobj))])
    one, other = sitk.ReadImage(str(tmp_path / f"scan{suffix}")), sitk.ReadImage(str(made))
    for what in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(one, what)() == getattr(other, what)()


@pytest.mark.parametrize(
    "version, shape",
    [
        *((nibabel.Nifti1Image, shape) for shape in ((5, 7), (5, 7, 1), (1, 5, 7), (4, 5, 6, 1))),
        *((nibabel.Nifti2Image, shape) for shape in ((5, 7, 1), (1, 5, 7))),
    ],
)
def test_nifti_of_any_shape(tmp_path, shape, version):
    nibabel.save(version(values(*shape), np.diag([-2.0, 3, 4, 1])), tmp_path / "a.nii")
    made = nibabel.load(written(tmp_path / "out", tmp_path / "a.nii"))
    assert made.shape == shape and type(made) is version
    np.testing.assert_array_equal(np.asarray(made.dataobj), RAW[thirds(values(*shape))])


@pytest.mark.parametrize("count", [1, 3])
def test_probabilities_in_nifti(tmp_path, count):
    nibabel.save(nibabel.Nifti1Image(values(4, 6, 9), oblique(1, 1, 5)), tmp_path / "a.nii.gz")
    made = nibabel.load(written(tmp_path / "out", tmp_path / "a.nii.gz", probabilities=count))
    assert made.affine.tobytes() == nibabel.load(tmp_path / "a.nii.gz").affine.tobytes()
    expected = shares(values(4, 6, 9), count)
    assert made.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(made.dataobj), expected[0] if count == 1 else np.moveaxis(expected, 0, -1))


@pytest.mark.parametrize("ending, expected", [("nrrd", ".nrrd"), ("mha", ".mha"), ("mhd", ".mha")])
@pytest.mark.parametrize("size", [(3, 5, 7), (5, 7), (1, 5, 7)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_nrrd_and_metaimage(tmp_path, ending, expected, size, count):
    scan = sitk.GetImageFromArray(values(*size))
    scan.SetSpacing((0.7, 1 / 3, 5.1)[: len(size)])
    scan.SetOrigin((-11.1, 22.2, 33.3)[: len(size)])
    if len(size) == 3:
        scan.SetDirection((oblique(1, 1, 1)[:3, :3]).ravel())
    sitk.WriteImage(scan, str(tmp_path / f"a.{ending}"))
    scan = sitk.ReadImage(str(tmp_path / f"a.{ending}"))
    path = written(tmp_path / "out", tmp_path / f"a.{ending}", probabilities=count)
    made = sitk.ReadImage(str(path))
    assert path.suffix == expected and made.GetNumberOfComponentsPerPixel() == max(count, 1)
    for what in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(made, what)(), getattr(scan, what)(), rtol=0, atol=1e-12)
    of_labels, of_shares = RAW[thirds(values(*size))], shares(values(*size), max(count, 1))
    found = sitk.GetArrayFromImage(made)
    np.testing.assert_array_equal(
        found, of_labels if not count else of_shares[0] if count == 1 else np.moveaxis(of_shares, 0, -1)
    )


def slices(folder: Path, directions, count: int = 4, **elements) -> list[Path]:
    """A CT series from low to high along the normal, under names that are not in that order."""
    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    normal = np.cross(directions[:3], directions[3:])
    files = []
    for i in range(count):
        dataset = header(CTImageStorage)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.ImagePositionPatient = [f"{c:.6g}" for c in np.array([-10.0, 5, 2]) + 5 * i * normal]
        dataset.ImageOrientationPatient = [f"{c:.6g}" for c in directions]
        dataset.PixelSpacing, dataset.SliceThickness, dataset.InstanceNumber = [0.75, 1.25], 5, i + 1
        fill(dataset, (values(6, 8) + 100 * i))
        for name, value in elements.items():
            setattr(dataset, name, value)
        files.append(folder / f"{'cadb'[i]}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def header(sop_class) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset(None, {}, preamble=b"\0" * 128, file_meta=meta)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    dataset.PatientID, dataset.PatientName, dataset.Modality = "P1", "Surname^Given", "CT"
    return dataset


def fill(dataset: FileDataset, pixels: np.ndarray) -> None:
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelData = pixels.astype(np.int16).tobytes()


def ordered(files: list[Path]) -> list[Path]:
    return sorted(files, key=lambda path: int(pydicom.dcmread(path).InstanceNumber))


SAGITTAL = (0, 1, 0, 0, 0, -1)
TILTED = (0.8, 0.6, 0, 0, 0, -1)


@pytest.mark.parametrize("directions", [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0), SAGITTAL, TILTED])
def test_dicom_series(tmp_path, directions):
    files = ordered(slices(tmp_path / "ct", directions))
    made = hd.seg.segread(written(tmp_path / "out", *files))
    sources = [pydicom.dcmread(path) for path in files]
    assert [made.get_segment_description(i).SegmentLabel for i in (1, 2)] == ["liver", "tumour"]
    assert [made.get_segment_description(i).SegmentDescription for i in (1, 2)] == ["mask value 3", "mask value 200"]
    referenced = {uid for _, _, uid in made.get_source_image_uids()}
    assert referenced == {source.SOPInstanceUID for source in sources}
    uids = [source.SOPInstanceUID for source in sources]
    pixels = made.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=False)
    np.testing.assert_array_equal(pixels, [thirds(source.pixel_array) for source in sources])
    assert (made.StudyInstanceUID, made.FrameOfReferenceUID) == (sources[0].StudyInstanceUID, sources[0].FrameOfReferenceUID)
    volume, scan = made.get_volume(combine_segments=True), hd.get_volume_from_series(sources)
    np.testing.assert_allclose(volume.affine, scan.affine, atol=1e-5)
    np.testing.assert_array_equal(volume.array, thirds(scan.array))


@pytest.mark.parametrize("count", [1, 3])
def test_dicom_probabilities(tmp_path, count):
    files = ordered(slices(tmp_path / "ct", SAGITTAL))
    classes = {0: "background", 1: "x"} if count == 1 else CLASSES
    made = hd.seg.segread(written(tmp_path / "out", *files, probabilities=count, classes=classes))
    sources = [pydicom.dcmread(path) for path in files]
    found = made.get_pixels_by_source_instance([source.SOPInstanceUID for source in sources])
    expected = np.stack([shares(source.pixel_array, count) for source in sources])
    expected = np.moveaxis(expected if count == 1 else expected[:, 1:], 1, -1)
    assert made.SegmentationType == "FRACTIONAL"
    np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-6)


def test_one_dicom_slice_and_one_without_a_geometry(tmp_path):
    (alone,) = slices(tmp_path / "ct", SAGITTAL, count=1)
    made = hd.seg.segread(written(tmp_path / "one", alone))
    np.testing.assert_array_equal(
        made.get_pixels_by_source_instance([pydicom.dcmread(alone).SOPInstanceUID], combine_segments=True)[0],
        thirds(values(6, 8)),
    )
    dataset = pydicom.dcmread(alone)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "PixelSpacing"):
        delattr(dataset, name)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.save_as(tmp_path / "flat.dcm")
    made = pydicom.dcmread(written(tmp_path / "two", tmp_path / "flat.dcm"))
    np.testing.assert_array_equal(made.pixel_array, [thirds(values(6, 8)) == 1, thirds(values(6, 8)) == 2])


def test_a_dicom_file_whose_frames_are_not_in_order(tmp_path):
    frames = [2, 0, 3, 1]
    dataset = header(EnhancedCTImageStorage)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    dataset.NumberOfFrames, dataset.InstanceNumber = 4, 1
    shared, orientation, measures = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = list(SAGITTAL)
    measures.PixelSpacing, measures.SliceThickness = [0.75, 1.25], 5
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for frame in frames:
        group, position = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = [5 * frame, 0, 0]
        group.PlanePositionSequence = [position]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    fill(dataset, np.stack([values(6, 8) + 100 * frame for frame in frames]))
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    made = hd.seg.segread(written(tmp_path / "out", tmp_path / "a.dcm"))
    found = made.get_pixels_by_source_frame(dataset.SOPInstanceUID, [1, 2, 3, 4], combine_segments=True)
    np.testing.assert_array_equal(found, [thirds(values(6, 8) + 100 * frame) for frame in frames])


@pytest.mark.parametrize(
    "name, message", [("FrameOfReferenceUID", "its header has no FrameOfReferenceUID"), ("SliceThickness", "AttributeError")]
)
def test_a_header_that_dicom_seg_cannot_do_with_is_the_file_s_fault(tmp_path, name, message):
    files = ordered(slices(tmp_path / "ct", SAGITTAL))
    for path in files:
        dataset = pydicom.dcmread(path)
        delattr(dataset, name)
        dataset.save_as(path)
    with pytest.raises(InputError, match=rf"c\.dcm: cannot be written as DICOM-SEG: {message}"):
        written(tmp_path / "out", *files)
    assert not list((tmp_path / "out" / "sub").iterdir())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_plain_images_become_png_with_a_palette(tmp_path, name):
    Image.fromarray(values(9, 13).astype(np.uint8)).save(tmp_path / name)
    path = written(tmp_path / "out", tmp_path / name)
    made = Image.open(path)
    assert path.name == "a.png" and made.mode == "P"
    np.testing.assert_array_equal(np.asarray(made), RAW[thirds(read_scan(tmp_path / name, None).values[0])])
    colours = np.asarray(made.convert("RGB"))
    assert {tuple(colour) for colour in colours.reshape(-1, 3)} == {(0, 0, 0), (230, 159, 0), (86, 180, 233)}


def test_mask_values_above_255(tmp_path):
    Image.fromarray(values(9, 13).astype(np.uint8)).save(tmp_path / "a.png")
    made = Image.open(written(tmp_path / "out", tmp_path / "a.png", classes={0: "a", 1: "b", 1000: "c"}))
    np.testing.assert_array_equal(np.asarray(made), np.array([0, 1, 1000])[thirds(values(9, 13))])
    for value in (70000, -1):
        with pytest.raises(
            InputError, match=rf"a\.png: its mask is written as PNG, .* a class of this model is {value}\. Convert"
        ):
            written(tmp_path / "bad", tmp_path / "a.png", classes={0: "a", 1: "b", value: "c"})
    assert not list((tmp_path / "bad" / "sub").iterdir())
    for top, dtype in ((255, np.uint8), (256, np.int16), (40000, np.uint16), (70000, np.int32)):
        assert raw_labels(np.zeros(1, np.uint8), {0: "a", top: "b"}).dtype == dtype
    assert raw_labels(np.array([1], np.uint8), {0: "a", -5: "b"}).tolist() == [-5]


def test_probabilities_of_plain_images_are_tiff(tmp_path):
    Image.fromarray(values(9, 13).astype(np.uint8)).save(tmp_path / "a.png")
    for count in (1, 3):
        path = written(tmp_path / str(count), tmp_path / "a.png", probabilities=count)
        expected = shares(values(9, 13).astype(np.uint8), count)
        assert path.suffix == ".tiff"
        np.testing.assert_array_equal(tifffile.imread(path), expected[0] if count == 1 else expected)


@pytest.mark.parametrize("shape", [(9, 13), (4, 9, 13)])
def test_tiff_keeps_its_resolution_and_its_place_on_earth(tmp_path, shape):
    place = [(33550, "d", 3, (0.5, 0.5, 0.0), True), (34735, "H", 4, (1, 1, 0, 0), True)]
    about = {"resolution": (2500, 1250), "resolutionunit": "CENTIMETER", "photometric": "minisblack", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", values(*shape), extratags=place, **about)
    path = written(tmp_path / "out", tmp_path / "a.tif")
    np.testing.assert_array_equal(tifffile.imread(path), RAW[thirds(values(*shape))])
    with tifffile.TiffFile(tmp_path / "a.tif") as before, tifffile.TiffFile(path) as after:
        for tag in ("XResolution", "YResolution", "ResolutionUnit", 33550, 34735):
            assert after.pages[0].tags[tag].value == before.pages[0].tags[tag].value
    assert path.suffix == ".tif"
