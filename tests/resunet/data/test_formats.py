import gzip
import struct
import warnings
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from resunet.data import formats
from resunet.data.formats import guarded, refuse_bomb, sniff
from resunet.data.images import read_mask, read_scan
from resunet.errors import InputError

GREY = np.random.default_rng(0).integers(0, 256, (9, 13)).astype(np.uint8)
VOLUME = np.random.default_rng(0).integers(-999, 999, (4, 5, 6)).astype(np.int16)
KINDS = {
    ".png": "png",
    ".jpg": "jpeg",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".dcm": "dicom",
}


def write(path):
    if path.suffix in (".png", ".jpg", ".bmp", ".tif"):
        Image.fromarray(GREY).save(path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(VOLUME[:1] if path.suffix == ".dcm" else VOLUME), str(path))
    return path


@pytest.mark.parametrize("name", ["scan", "scan.png", "scan.dcm", "scan.nii", "1.2.840.7"])
@pytest.mark.parametrize("suffix", KINDS)
def test_content_names_the_format_whatever_the_file_is_called(tmp_path, suffix, name):
    original = write(tmp_path / f"original{suffix}")
    expected = read_scan(original, None)
    assert expected.format == KINDS[suffix] == sniff(original)
    renamed = tmp_path / name
    renamed.write_bytes(original.read_bytes())
    assert sniff(renamed) == KINDS[suffix]
    found = read_scan(renamed, None)
    assert (found.format, found.pixel_sha256, found.spacing) == (expected.format, expected.pixel_sha256, expected.spacing)


def test_big_tiff_and_nifti_2(tmp_path):
    tifffile.imwrite(tmp_path / "a", GREY, bigtiff=True)
    nibabel.save(nibabel.Nifti2Image(VOLUME.T, np.diag([-1, -1, 1, 1])), tmp_path / "b.nii")
    assert sniff(tmp_path / "a") == "tiff"
    np.testing.assert_array_equal(read_scan(tmp_path / "a", None).values[0], GREY)
    scan = read_scan(tmp_path / "b.nii", None)
    assert scan.format == "nifti" and scan.orientation == "LPS"
    np.testing.assert_array_equal(scan.values[0], VOLUME)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"B",
        b"BM, a letter",
        b"\xff\xd8",
        b"PK\3\4" + bytes(500),
        gzip.compress(b"text" * 200, mtime=0),
        b"\x1f\x8b broken",
        bytes(2000),
        b"x" * 2000,
    ],
)
@pytest.mark.parametrize("name", ["a", "a.dcm", "a.txt"])
def test_what_is_no_image_has_no_format(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert sniff(tmp_path / name) is None
    with pytest.raises(InputError, match=rf"{name}: "):
        read_scan(tmp_path / name, None)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path):
    with pytest.raises(InputError, match="none: no such file"):
        sniff(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_scan(tmp_path, None)


def bomb(suffix: str) -> bytes:
    """A small valid file, its header changed to say 100,000² or 1,000³."""
    if suffix == ".png":
        header = struct.pack(">IIBBBBB", 100000, 100000, 8, 0, 0, 0, 0)
        rest = zlib.compress(bytes(100))
        chunks = [(b"IHDR", header), (b"IDAT", rest), (b"IEND", b"")]
        packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
    if suffix == ".bmp":
        return b"BM" + struct.pack("<IIIIiiHHIIIIII", 200, 0, 54, 40, 100000, 100000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(146)
    if suffix in (".nrrd", ".nrrd.gz"):
        coded = "gzip" if suffix.endswith("gz") else "raw"
        return (
            f"NRRD0004\ntype: short\nendian: little\ndimension: 3\nsizes: 1000 1000 1000\nencoding: {coded}\n\n".encode()
            + bytes(100)
        )
    if suffix == ".mha":
        lines = "ObjectType = Image\nNDims = 3\nDimSize = 1000 1000 1000\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        return lines.encode() + bytes(100)
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes()
    changed = image[:42] + struct.pack("<3h", 1000, 1000, 1000) + image[48:]
    return gzip.compress(changed) if suffix == ".nii.gz" else changed


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".nrrd", ".nrrd.gz", ".mha", ".nii", ".nii.gz"])
def test_a_header_that_claims_too_much_is_refused_before_anything_is_decoded(tmp_path, suffix):
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(bomb(suffix))
    with pytest.raises(InputError, match=r"bomb.*: cannot be read: the header says .*000"):
        read_scan(path, None)


@pytest.mark.parametrize("size", [(100000, 100000), (40000, 40000)])
def test_a_tiff_that_claims_too_much(tmp_path, size):
    path = tmp_path / "bomb.tif"
    tifffile.imwrite(path, GREY, compression="zlib", photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag, value in zip((257, 256, 278), (*size, size[0]), strict=True):
            file.pages[0].tags[tag].overwrite(value, dtype="I")
    with pytest.raises(InputError, match=r"bomb\.tif: cannot be read: the header says"):
        read_scan(path, None)


def test_even_images_are_no_bombs(tmp_path):
    zeros = np.zeros((3000, 3000), np.uint8)
    Image.fromarray(zeros).save(tmp_path / "a.png")
    Image.fromarray(zeros).convert("1").save(tmp_path / "b.png")
    Image.fromarray(zeros).convert("P").save(tmp_path / "f.png")
    Image.fromarray(zeros + 128).save(tmp_path / "c.jpg", quality=1, optimize=True, progressive=True)
    tifffile.imwrite(tmp_path / "d.tif", zeros, compression="lzw", metadata=None)
    tifffile.imwrite(tmp_path / "e.tif", zeros.astype(bool), metadata=None)
    for name in ("a.nii.gz", "a.nrrd", "a.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((20, 300, 300), np.int16)), str(tmp_path / name), useCompression=True)
    for path in tmp_path.iterdir():
        assert (read_mask(path).values == (128 if path.suffix == ".jpg" else 0)).all()


def test_sizes_are_counted_without_wrapping(tmp_path):
    with pytest.raises(InputError, match="a scan may have"):
        refuse_bomb(tmp_path, (2**16, 2**16, 2**16, 2**16), 1, None)
    with pytest.raises(InputError, match="must be above 0"):
        refuse_bomb(tmp_path, (0, 5), 1, None)
    refuse_bomb(tmp_path, (2**10, 2**11, 2**10), 2, None)
    refuse_bomb(tmp_path, (7, 5), 2, 70, 1)
    with pytest.raises(InputError, match="cannot hold"):
        refuse_bomb(tmp_path, (7, 5), 2, 69, 1)


def test_a_reason_quotes_nothing_of_the_file_and_no_path(tmp_path):
    path = tmp_path / "Surname.tif"

    def fails():
        raise ValueError(f"{path}: can't parse 'born 1970' in \"Given\" of Surname.tif at 0x7fffdeadbeef")

    with pytest.raises(InputError) as caught:
        guarded(path, fails)
    reason = str(caught.value).removeprefix(f"{path}: ")
    assert reason == "cannot be read: ValueError: the file: can't parse '…' in '…' of the file at"
    with pytest.raises(InputError) as caught:
        guarded(path, fails, says=False)
    assert str(caught.value) == f"{path}: cannot be read: ValueError"


def test_libraries_warnings_stay_inside_whatever_filters_are_set(tmp_path):
    path = write(tmp_path / "a.png")
    for action in ("error", "always", "error"):
        warnings.simplefilter(action)
        guarded(path, lambda: exec("import warnings; warnings.warn('x')", {"__name__": "pydicom.valuerep"}))
    with pytest.raises(UserWarning):
        warnings.warn("ours is seen", stacklevel=1)
    assert formats.MAX_BYTES == 2**32


def test_a_detached_header_finds_its_data_beside_it(tmp_path):
    write(tmp_path / "a.mhd")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.mhd", None).values[0], VOLUME)
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot hold"):
        read_scan(tmp_path / "a.mhd", None)


@pytest.mark.parametrize("code", ["LPS", "RAS", "RPI", "PIR"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_the_orientation_of_the_file_is_kept(tmp_path, code, suffix):
    sitk.WriteImage(sitk.DICOMOrient(sitk.GetImageFromArray(VOLUME), code), str(tmp_path / f"a{suffix}"))
    scan = read_scan(tmp_path / f"a{suffix}", None)
    assert scan.orientation == code
    np.testing.assert_array_equal(scan.values[0], VOLUME)
