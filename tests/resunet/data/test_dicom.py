import dataclasses
import itertools
import random
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from resunet.data.dicom import DicomHeader, gaps_told, group_files, read_header
from resunet.data.images import read_mask, read_scan
from resunet.errors import InputError

AXIAL = (1, 0, 0, 0, 1, 0)
UID = "1.2.826.0.1.3680043.8.498."


def grey(dtype, low: int, high: int, shape=(9, 13)) -> np.ndarray:
    values = np.random.default_rng(0).integers(low, high, shape).astype(dtype)
    values.flat[:2] = low, high - 1
    return values


def make(values: np.ndarray, syntax=ExplicitVRLittleEndian, **elements) -> FileDataset:
    """values: (y, x), (frames, y, x), or with samples last, as PhotometricInterpretation and NumberOfFrames say."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID + "1"
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    dataset = FileDataset(None, {}, preamble=b"\0" * 128, file_meta=meta, is_implicit_VR=implicit, is_little_endian=little)
    colour = elements.get("PhotometricInterpretation", "MONOCHROME2") in ("RGB", "YBR_FULL")
    framed = "NumberOfFrames" in elements
    dataset.Rows, dataset.Columns = values.shape[int(framed) : int(framed) + 2]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = values.dtype.itemsize * 8
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientID, dataset.PatientName, dataset.Modality = "P1", "Surname^Given", "CT"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = UID + "2", UID + "3"
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = values.astype(values.dtype.newbyteorder("<" if little else ">")).tobytes()
    dataset["PixelData"].VR = "OW" if values.dtype.itemsize > 1 else "OB"
    return dataset


def save(dataset: FileDataset, path: Path) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path


def write(path: Path, values: np.ndarray, syntax=ExplicitVRLittleEndian, **elements) -> Path:
    return save(make(values, syntax, **elements), path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype, low, high", [("u1", 0, 256), ("i2", -2000, 3000), ("u2", 0, 65536), ("u4", 0, 2**32)])
def test_values_are_exact_in_their_own_dtype(tmp_path, syntax, dtype, low, high):
    values = grey(dtype, low, high)
    scan = read_scan(write(tmp_path / "a.dcm", values, syntax), None)
    assert scan.values.dtype == np.dtype(dtype) and scan.values.dtype.isnative
    assert (scan.format, scan.modality, scan.orientation, scan.spacing) == ("dicom", "CT", "", (1.0, 1.0))
    np.testing.assert_array_equal(scan.values, values[None])


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("dtype, low, high", [("u1", 0, 256), ("i2", -2000, 3000), ("u2", 0, 65536)])
def test_compressed_values_are_exact(tmp_path, syntax, dtype, low, high):
    values = grey(dtype, low, high, (32, 40))
    dataset = make(values)
    dataset.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read_scan(save(dataset, tmp_path / "a.dcm"), None).values, values[None])


@pytest.mark.parametrize("dtype, low, high", [("u1", 0, 256), ("i2", -2000, 3000), ("u2", 0, 4096)])
def test_lossless_jpeg(tmp_path, dtype, low, high):
    values = grey(dtype, low, high, (2, 32, 40))
    dataset = make(values, NumberOfFrames=2)
    unsigned = values.view(f"u{values.dtype.itemsize}")
    dataset.PixelData = pydicom.encaps.encapsulate([imagecodecs.ljpeg_encode(frame) for frame in unsigned])
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    np.testing.assert_array_equal(read_scan(save(dataset, tmp_path / "a.dcm"), None).values, values[None])


@pytest.mark.parametrize(
    "stored, dtype, slope, intercept, expected",
    [
        ("u2", "u2", 1, 0, lambda v: v),
        ("u2", "i2", 1, -1024, lambda v: v - 1024),
        ("u2", "i4", 30, 5, lambda v: v * 30 + 5),
        ("i2", "i2", -1, 0, lambda v: -v),
        ("u2", "f4", 0.5, 0.25, lambda v: v * 0.5 + 0.25),
    ],
)
def test_slope_and_intercept(tmp_path, stored, dtype, slope, intercept, expected):
    values = grey(stored, 0, 4096)
    scan = read_scan(write(tmp_path / "a", values, RescaleSlope=slope, RescaleIntercept=intercept), None)
    assert scan.values.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(scan.values[0], expected(values.astype(np.float64)))


def test_monochrome1_is_inverted_within_the_bits_stored(tmp_path):
    values = grey("u2", 0, 1024)
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    np.testing.assert_array_equal(
        read_scan(write(tmp_path / "a", values, BitsStored=10, **inverted), None).values[0], 1023 - values
    )
    signed = grey("i2", -512, 512)
    found = read_scan(write(tmp_path / "b", signed, BitsStored=10, RescaleSlope=2, RescaleIntercept=7, **inverted), None)
    np.testing.assert_array_equal(found.values[0], (-1 - signed) * 2 + 7)


@pytest.mark.parametrize("dtype, low, high", [("u2", 0, 4096), ("i2", -2048, 2048)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_overlay_bits_are_masked_off(tmp_path, dtype, low, high, syntax):
    values = grey(dtype, low, high)
    dirty = ((values.view("u2") & 0x0FFF) | (grey("u2", 0, 16) << 12)).view(dtype)
    dataset = make(dirty)
    if syntax == RLELossless:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit = 12, 11
    np.testing.assert_array_equal(read_scan(save(dataset, tmp_path / "a"), None).values[0], values)


@pytest.mark.parametrize("shift, dtype", [(8, np.uint8), (0, np.uint8), (None, np.uint16)])
def test_a_palette_becomes_colours(tmp_path, shift, dtype):
    indices = grey("u1", 0, 4)
    table = np.array([[0, 200, 30, 90], [1, 2, 3, 255], [9, 8, 7, 6]], "u2")
    table = table * 253 if shift is None else table << shift
    dataset = make(indices, PhotometricInterpretation="PALETTE COLOR")
    for colour, entries in zip(("Red", "Green", "Blue"), table, strict=True):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [4, 0, 16])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", entries.astype("<u2").tobytes())
    scan = read_scan(save(dataset, tmp_path / "a"), None)
    assert scan.values.dtype == dtype
    np.testing.assert_array_equal(scan.values, table[:, indices] >> (shift or 0))


def test_ybr_becomes_rgb(tmp_path):
    rgb = grey("u1", 0, 256, (9, 13, 3)).astype(float)
    to_ybr = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])  # DICOM PS3.3, C.7.6.3.1.2
    ybr = np.clip(np.round(rgb @ to_ybr.T + [0, 128, 128]), 0, 255).astype("u1")
    found = read_scan(write(tmp_path / "a", ybr, PhotometricInterpretation="YBR_FULL"), None).values
    assert found.shape == (3, 9, 13) and np.abs(np.moveaxis(found, 0, -1) - rgb).max() <= 2


@pytest.mark.parametrize("name, dtype", [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_float_pixel_data(tmp_path, name, dtype):
    values = np.random.default_rng(0).normal(size=(9, 13)).astype(dtype)
    dataset = make(np.zeros((9, 13), f"u{values.dtype.itemsize}"))
    del dataset.PixelData
    setattr(dataset, name, values.tobytes())
    found = read_scan(save(dataset, tmp_path / "a"), None).values
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found[0], values)


def test_one_bit_pixels(tmp_path):
    bits = grey("u1", 0, 2, (3, 10, 13))
    dataset = make(bits, NumberOfFrames=3, BitsAllocated=1, BitsStored=1)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    np.testing.assert_array_equal(read_mask(save(dataset, tmp_path / "a")).values, bits)


def test_frames_without_a_geometry_keep_their_order(tmp_path):
    colour = grey("u1", 0, 256, (4, 9, 13, 3))
    path = write(tmp_path / "a", colour, NumberOfFrames=4, PhotometricInterpretation="RGB", PixelSpacing=[0.5, 0.25])
    scan = read_scan(path, None)
    assert scan.spacing == (1.0, 0.5, 0.25) and scan.orientation == ""
    np.testing.assert_array_equal(scan.values, np.moveaxis(colour, -1, 0))


def enhanced(values: np.ndarray, heights, **elements) -> FileDataset:
    dataset = make(values, NumberOfFrames=len(values), **elements)
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [0.5, 0.25]
    orientation.ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number, height in enumerate(heights):
        position, scale, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [1, 2, height]
        scale.RescaleSlope, scale.RescaleIntercept = 1, 1000 * number
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [position], [scale]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    return dataset


def test_an_enhanced_file_is_ordered_and_scaled_by_its_functional_groups(tmp_path):
    values = grey("u2", 0, 100, (4, 9, 13))
    scan = read_scan(save(enhanced(values, [20, 17, 26, 23]), tmp_path / "a"), None)
    scaled = values + np.array([0, 1000, 2000, 3000])[:, None, None]
    np.testing.assert_array_equal(scan.values[0], scaled[[1, 0, 3, 2]])
    assert scan.spacing == (3.0, 0.5, 0.25) and scan.orientation == "LPS"


def write_series(folder: Path, values: np.ndarray, heights, orientation=AXIAL, **elements) -> list[Path]:
    """One file a slice, heights along the normal; names say nothing."""
    folder.mkdir(exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    paths = []
    for number, (slice_, height) in enumerate(zip(values, heights, strict=True)):
        place = {"ImageOrientationPatient": list(orientation), "ImagePositionPatient": (normal * height + (5, 6, 7)).tolist()}
        own = {name: value[number] if isinstance(value, list) else value for name, value in elements.items()}
        path = folder / f"{random.Random(f'{folder}{number}').randrange(10**9)}"
        paths.append(write(path, slice_, **{"PixelSpacing": [0.5, 0.25], "InstanceNumber": number + 1, **place, **own}))
    return paths


def grouped(folder: Path) -> list[tuple[Path, ...]]:
    headers = {str(path): read_header(path) for path in folder.rglob("*") if path.is_file()}
    units = group_files(headers)
    names = list(headers)
    random.Random(0).shuffle(names)
    assert group_files({name: headers[name] for name in names}) == units
    assert sorted(itertools.chain(*units)) == sorted(headers)
    return [tuple(map(Path, unit)) for unit in units]


def test_slices_are_ordered_by_position_and_spaced_by_it(tmp_path):
    values = grey("i2", -1000, 3000, (5, 9, 13))
    write_series(tmp_path / "s", values, [30, 10, 50, 20, 40], SliceThickness=99)
    (unit,) = grouped(tmp_path)
    scan = read_scan(unit, "grey")
    np.testing.assert_array_equal(scan.values[0], values[[1, 3, 0, 4, 2]])
    assert scan.spacing == (10.0, 0.5, 0.25) and scan.orientation == "LPS"
    downwards = read_scan(unit[::-1], "grey")
    assert downwards.orientation == "LPI" and downwards.pixel_sha256 == scan.pixel_sha256


@pytest.mark.parametrize(
    "orientation, code, towards_lps",
    [
        ((1, 0, 0, 0, 1, 0), "LPS", lambda a: a),
        ((-1, 0, 0, 0, -1, 0), "RAS", lambda a: a[:, ::-1, ::-1]),
        ((0, 1, 0, 0, 0, -1), "PIR", lambda a: a.transpose(1, 2, 0)[::-1, :, ::-1]),  # sagittal: x to P, y to I, z to R
        ((1, 0, 0, 0, 0, -1), "LIP", lambda a: a.transpose(1, 0, 2)[::-1]),  # coronal: x to L, y to I, z to P
    ],
)
def test_a_series_lands_in_lps(tmp_path, orientation, code, towards_lps):
    values = grey("i2", -1000, 3000, (4, 9, 13))
    write_series(tmp_path / "s", values, [0, 3, 6, 9], orientation)
    (unit,) = grouped(tmp_path)
    scan = read_scan(unit, None)
    assert scan.orientation == code
    np.testing.assert_array_equal(scan.values[0], towards_lps(values))
    stored = {"x": 0.25, "y": 0.5, "z": 3.0}
    order = {"LPS": "zyx", "RAS": "zyx", "PIR": "yxz", "LIP": "yzx"}[code]
    assert scan.spacing == pytest.approx([stored[axis] for axis in order])


def test_slices_of_several_slopes_are_one_volume(tmp_path):
    values = grey("u2", 0, 1000, (3, 9, 13))
    write_series(tmp_path / "s", values, [0, 1, 2], RescaleSlope=[1, 2, 0.5], RescaleIntercept=0)
    (unit,) = grouped(tmp_path)
    scan = read_scan(unit, None)
    assert scan.values.dtype == np.float32
    np.testing.assert_array_equal(scan.values[0], values * np.array([1, 2, 0.5])[:, None, None])


@pytest.mark.parametrize(
    "other",
    [
        {"PatientID": "P2"},
        {"SeriesInstanceUID": UID + "9"},
        {"StudyInstanceUID": UID + "9"},
        {"PixelSpacing": [[0.7, 0.7]] * 3},
        {"PhotometricInterpretation": "MONOCHROME1"},
    ],
)
def test_what_differs_is_not_joined(tmp_path, other):
    values = grey("i2", 0, 100, (3, 9, 13))
    write_series(tmp_path / "a", values, [0, 2, 4])
    write_series(tmp_path / "b", values, [1, 3, 5], **other)
    assert sorted(len(unit) for unit in grouped(tmp_path)) == [3, 3]
    assert all(len({path.parent for path in unit}) == 1 for unit in grouped(tmp_path))


@pytest.mark.parametrize(
    "phase",
    [
        {"AcquisitionNumber": [1, 1, 1, 2, 2, 2]},
        {"EchoTime": [10, 10, 10, 90, 90, 90]},
        {"EchoTime": [10, 10, 10, 90, 90, 90], "AcquisitionNumber": [1, 2, 3, 4, 5, 6], "InstanceNumber": [1, 5, 3, 4, 2, 6]},
        {"TemporalPositionIdentifier": [1, 1, 1, 2, 2, 2], "AcquisitionNumber": [1, 2, 3, 1, 2, 3]},
        {"DiffusionBValue": [0.0, 0.0, 0.0, 800.0, 800.0, 800.0], "InstanceNumber": 1},
        {"ImageType": [["ORIGINAL", "PRIMARY", kind] for kind in "MMMPPP"]},
        {},  # the number of the instance alone
    ],
)
def test_phases_at_equal_positions_are_volumes_of_their_own(tmp_path, phase):
    values = grey("i2", 0, 100, (6, 9, 13))
    files = write_series(tmp_path / "s", values, [0, 5, 10, 0, 5, 10], **phase)
    assert sorted(grouped(tmp_path)) == sorted([tuple(files[:3]), tuple(files[3:])])


def test_ten_times_of_three_echoes(tmp_path):
    headers = {}
    for time, echo, height in itertools.product(range(10), range(3), range(4)):
        phases = ("", str(time), str(echo), *[""] * 7)
        headers[f"{height}{echo}{time}"] = DicomHeader("p", "s", "x", "MR", "stack", 2.5 * height, 1, 1, phases)
    units = group_files(headers)
    assert len(units) == 30
    assert all([int(name[0]) for name in unit] == [0, 1, 2, 3] and len({name[1:] for name in unit}) == 1 for unit in units)


def test_a_missing_slice_and_copies_shred_nothing(tmp_path):
    header = DicomHeader("p", "s", "x", "CT", "stack", 0.0, 1, 1, ("",) * 10)
    heights = [0, 1, 2, 4, 5]
    headers = {
        f"{folder}/{height}": dataclasses.replace(header, position=float(height), instance=height)
        for folder in "ab"
        for height in heights
    }
    assert group_files(headers) == [tuple(f"{folder}/{height}" for height in heights) for folder in "ab"]


@pytest.mark.parametrize(
    ("heights", "gap"),
    [
        ([0, 1, 2, 4, 5], True),
        ([0, 1, 3], True),
        ([0, 2.5, 5, 7.4, 10], False),
        ([0, 9], False),
        ([3], False),
        ([0, 0, 0], False),
    ],
)
def test_gaps_between_slices_are_told(heights, gap):
    header = DicomHeader("p", "s", "x", "CT", "stack", 0.0, 1, 1, ("",) * 10)
    whole = {f"w/{n}": dataclasses.replace(header, position=2.0 * n) for n in range(4)}
    odd = {f"a/{n}": dataclasses.replace(header, position=float(height)) for n, height in enumerate(heights)}
    told = gaps_told([whole, odd, whole, odd])
    assert len(told) == gap
    assert all(
        line.startswith("2 DICOM volumes have gaps") and line.endswith(f"the {len(heights)} files from a/0") for line in told
    )


def test_files_without_geometry_are_units_of_their_own(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}", grey("u1", 0, 9), InstanceNumber=number)
    save(enhanced(grey("u2", 0, 9, (2, 9, 13)), [0, 1]), tmp_path / "enhanced")
    assert [len(unit) for unit in grouped(tmp_path)] == [1, 1, 1, 1]


def test_a_header_holds_what_it_says_and_reads_no_pixels(tmp_path):
    (path,) = write_series(tmp_path, grey("i2", 0, 9, (1, 9, 13)), [4.5], EchoTime=12.5)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\xe0\x7f\x10\x00")])
    header = read_header(path)
    assert (header.patient, header.study, header.series) == ("P1", UID + "2", UID + "3")
    assert (header.position, header.instance, header.frames, header.modality) == (11.5, 1, 1, "CT")
    assert "12.5" in header.phases and header.stack


@pytest.mark.parametrize("reader", [read_header, lambda path: read_scan(path, None)])
def test_a_file_without_an_image_is_refused(tmp_path, reader):
    dataset = make(grey("u1", 0, 9))
    del dataset.PixelData, dataset.Rows, dataset.Columns
    save(dataset, tmp_path / "plan.dcm")
    with pytest.raises(InputError, match=r"plan\.dcm: has no image"):
        reader(tmp_path / "plan.dcm")


def test_no_preamble_no_meta(tmp_path):
    values = grey("i2", -5, 900)
    dataset = Dataset()
    dataset.update(make(values))
    for name, implicit in (("a", True), ("b.dcm", False), ("1.2.840.77", True)):
        dataset.save_as(tmp_path / name, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert (tmp_path / name).read_bytes()[128:132] != b"DICM"
        np.testing.assert_array_equal(read_scan(tmp_path / name, None).values[0], values)


def test_a_cut_or_wrong_file_is_refused_without_the_patients_name(tmp_path):
    path = write(tmp_path / "a.dcm", grey("i2", 0, 900), RescaleSlope=2)
    whole = path.read_bytes()
    for end in (*range(0, 140, 13), *range(140, len(whole) - 2, 37)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"a\.dcm: ") as caught:
            read_scan(path, None)
        assert "Surname" not in str(caught.value) and "P1" not in str(caught.value).replace(str(path), "")


def test_slices_of_two_shapes_are_refused(tmp_path):
    a = write(tmp_path / "a", grey("i2", 0, 9))
    b = write(tmp_path / "b", grey("i2", 0, 9, (9, 14)))
    with pytest.raises(InputError, match=r"b: has the shape"):
        read_scan([a, b], None)


@pytest.mark.parametrize("element", ["Rows", "NumberOfFrames"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_a_header_that_claims_too_much_is_refused(tmp_path, element, syntax):
    dataset = make(grey("u2", 0, 900, (32, 40)))
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    setattr(dataset, element, 60000 if element == "Rows" else 2000000)
    dataset.Columns = 60000
    with pytest.raises(InputError, match=r"a\.dcm: cannot be read: the header says .*60000"):
        read_scan(save(dataset, tmp_path / "a.dcm"), None)


def test_a_frame_that_claims_more_than_the_header_is_refused(tmp_path):
    dataset = make(grey("u2", 0, 900, (32, 40)))
    frame = bytearray(imagecodecs.jpeg2k_encode(grey("u2", 0, 900, (32, 40)), codecformat="j2k", level=0))
    start = frame.index(b"\xff\x4f\xff\x51") + 8
    frame[start : start + 8] = (90000).to_bytes(4, "big") * 2
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(frame)])
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    with pytest.raises(InputError, match=r"a: a frame says 90000 × 90000"):
        read_scan(save(dataset, tmp_path / "a"), None)


def test_nothing_is_printed_and_nothing_warns(tmp_path):
    dataset = make(grey("i2", 0, 900), PatientBirthDate="1970-99-99", SliceThickness="1")
    dataset.PixelData += b"\0" * 64  # pydicom warns of padding
    save(dataset, tmp_path / "a.dcm")
    (tmp_path / "b.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:700])
    code = (
        "from pathlib import Path; from resunet.data.images import read_scan; from resunet.errors import InputError\n"
        f"for name in 'ab':\n  try: read_scan(Path({str(tmp_path)!r}) / (name + '.dcm'), None)\n"
        "  except InputError: pass\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert (done.stdout, done.stderr) == ("", "")
