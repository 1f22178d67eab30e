import gzip
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from resunet.data.images import READABLE, read_mask, read_scan, stem_of, suffix_of
from resunet.errors import InputError


def grey(dtype, high: int, shape=(9, 13)) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, high, shape).astype(dtype)
    values.flat[:2] = 0, high - 1
    return values


def write_volume(path: Path, values: np.ndarray, spacing=(1.0, 1.0, 1.0), direction=None) -> Path:
    """values: (z, y, x); spacing: (x, y, z); direction: columns are the axes x, y, z in LPS."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_eight_bit_grey(tmp_path, suffix):
    values = grey(np.uint8, 256)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    scan = read_scan(tmp_path / f"a{suffix}", "grey")
    assert scan.values.dtype == np.uint8 and scan.spacing == (1.0, 1.0)
    np.testing.assert_array_equal(scan.values, values[None])


def test_sixteen_bit_grey_png(tmp_path):
    values = grey(np.uint16, 2**16)
    Image.fromarray(values).save(tmp_path / "a.png")
    scan = read_scan(tmp_path / "a.png", "grey")
    assert scan.values.dtype == np.uint16
    np.testing.assert_array_equal(scan.values, values[None])


def test_sixteen_bit_colour_png_keeps_its_sixteen_bits(tmp_path):
    values = grey(np.uint16, 2**16, (9, 13, 3))
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    scan = read_scan(tmp_path / "a.png", "rgb")
    assert scan.values.dtype == np.uint16
    np.testing.assert_array_equal(scan.values, np.moveaxis(values, -1, 0))


@pytest.mark.parametrize("dtype, high", [(np.uint8, 256), (np.uint16, 2**16)])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_dropped(tmp_path, dtype, high, colours, suffix):
    values = grey(dtype, high, (9, 13, colours + 1))
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(values))
    else:
        photometric = "rgb" if colours == 3 else "minisblack"
        tifffile.imwrite(path, values, photometric=photometric, planarconfig="contig", extrasamples=["unassalpha"])
    scan = read_scan(path, colours)
    assert scan.values.dtype == dtype
    np.testing.assert_array_equal(scan.values, np.moveaxis(values[..., :colours], -1, 0))


def test_a_palette_mask_keeps_its_indices(tmp_path):
    indices = grey(np.uint8, 4)
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette([0, 0, 0, 200, 30, 30, 30, 200, 30, 30, 30, 200])
    image.save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(mask.values, indices)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_a_one_bit_mask_is_zero_and_one(tmp_path, suffix):
    bits = grey(np.uint8, 2)
    Image.fromarray(bits * 255).convert("1").save(tmp_path / f"a{suffix}")
    mask = read_mask(tmp_path / f"a{suffix}")
    assert mask.values.dtype == np.uint8
    np.testing.assert_array_equal(mask.values, bits)


def test_jpeg(tmp_path):
    ramp = np.add.outer(np.arange(32), np.arange(40)).astype(np.uint8) * 3
    Image.fromarray(ramp).save(tmp_path / "grey.jpg", quality=95)
    scan = read_scan(tmp_path / "grey.jpg", "grey")
    assert scan.values.shape == (1, 32, 40) and scan.values.dtype == np.uint8
    assert np.abs(scan.values[0].astype(int) - ramp).max() <= 4
    colour = np.stack([ramp, 255 - ramp, np.full_like(ramp, 90)], axis=-1)
    Image.fromarray(colour).save(tmp_path / "colour.jpeg", quality=95, subsampling=0)
    scan = read_scan(tmp_path / "colour.jpeg", "rgb")
    assert np.abs(scan.values.astype(int) - np.moveaxis(colour, -1, 0)).max() <= 8


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int16, np.uint8])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_tiff_values_are_exact(tmp_path, dtype, compression):
    values = (np.random.default_rng(0).normal(0, 50, (9, 13)) + 100).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, compression=compression)
    scan = read_scan(tmp_path / "a.tif", "grey")
    assert scan.values.dtype == dtype
    np.testing.assert_array_equal(scan.values, values[None])


def test_the_byte_order_of_a_tiff_does_not_show(tmp_path):
    values = grey(np.uint16, 2**16)
    for order in "<>":
        tifffile.imwrite(tmp_path / "a.tif", values, byteorder=order)
        found = read_scan(tmp_path / "a.tif", "grey").values
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, values[None])


def test_pages_of_a_tiff_are_a_volume(tmp_path):
    values = grey(np.uint16, 2**16, (5, 9, 13))
    tifffile.imwrite(tmp_path / "a.tiff", values, photometric="minisblack")
    scan = read_scan(tmp_path / "a.tiff", "grey")
    assert scan.spacing == (1.0, 1.0, 1.0)
    np.testing.assert_array_equal(scan.values, values[None])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colour_tiff_in_either_layout(tmp_path, planar):
    values = grey(np.uint16, 2**16, (9, 13, 3))
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read_scan(tmp_path / "a.tif", "rgb").values, np.moveaxis(values, -1, 0))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
def test_computed_tomography_values_are_exact(tmp_path, suffix):
    values = np.random.default_rng(0).integers(-1000, 3001, (4, 5, 6)).astype(np.int16)
    values.flat[:2] = -1000, 3000
    scan = read_scan(write_volume(tmp_path / f"a{suffix}", values, (0.5, 0.7, 3.0)), "grey")
    assert scan.values.dtype == np.int16
    np.testing.assert_array_equal(scan.values, values[None])
    assert scan.spacing == pytest.approx((3.0, 0.7, 0.5))


@pytest.mark.parametrize(
    "direction, towards_lps",
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], lambda a: a),
        ([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], lambda a: a[:, ::-1, ::-1]),  # RAS
        ([[1, 0, 0], [0, 1, 0], [0, 0, -1]], lambda a: a[::-1]),  # LPI
        # stored sagittally: x runs to P, y to S, z to L
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], lambda a: a.transpose(1, 2, 0)),
        # stored coronally, head first downwards: x runs to L, y to I, z to P
        ([[1, 0, 0], [0, 0, 1], [0, -1, 0]], lambda a: a.transpose(1, 0, 2)[::-1]),
    ],
    ids=["LPS", "RAS", "LPI", "sagittal", "coronal"],
)
def test_a_volume_lands_in_lps_with_its_spacing_in_array_order(tmp_path, direction, towards_lps):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    spacing = (0.5, 0.75, 3.0)
    scan = read_scan(write_volume(tmp_path / "a.nii", values, spacing, direction), "grey")
    np.testing.assert_array_equal(scan.values[0], towards_lps(values))
    # a direction's row i says which stored axis runs along patient axis i: x, y, z
    stored_axis = np.abs(direction).argmax(axis=1)
    assert scan.spacing == pytest.approx([spacing[stored_axis[i]] for i in (2, 1, 0)])


def test_an_oblique_volume_is_turned_to_the_nearest_axes_and_not_resampled(tmp_path):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    c, s = math.cos(0.3), math.sin(0.3)
    oblique = np.array([[-c, s, 0], [-s, -c, 0], [0, 0, 1]])  # RAS, turned by 17° about z
    scan = read_scan(write_volume(tmp_path / "a.nii.gz", values, (0.5, 0.75, 3.0), oblique), "grey")
    np.testing.assert_array_equal(scan.values[0], values[:, ::-1, ::-1])
    assert scan.spacing == pytest.approx((3.0, 0.75, 0.5))


def test_a_mask_lands_where_its_scan_does(tmp_path):
    scan = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    direction = [[-1, 0, 0], [0, 0, 1], [0, -1, 0]]
    write_volume(tmp_path / "scan.nii", scan, direction=direction)
    write_volume(tmp_path / "mask.nii.gz", (scan > 50).astype(np.uint8), direction=direction)
    found = read_scan(tmp_path / "scan.nii", "grey").values[0] > 50
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz").values, found)


def test_a_2d_image_in_a_volume_format(tmp_path):
    values = grey(np.int16, 1000)
    flat = sitk.GetImageFromArray(values)
    flat.SetSpacing((0.5, 0.75))
    sitk.WriteImage(flat, str(tmp_path / "a.mha"))
    write_volume(tmp_path / "b.nii", values[None], (0.5, 0.75, 9.0))
    for name in ("a.mha", "b.nii"):
        scan = read_scan(tmp_path / name, "grey")
        np.testing.assert_array_equal(scan.values, values[None])
        assert scan.spacing == pytest.approx((0.75, 0.5))


def test_a_volume_of_colours(tmp_path):
    values = grey(np.uint8, 256, (4, 5, 6, 3))
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(tmp_path / "a.nrrd"))
    np.testing.assert_array_equal(read_scan(tmp_path / "a.nrrd", "rgb").values, np.moveaxis(values, -1, 0))


def test_four_dimensions_are_refused(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), np.int16), isVector=False), str(tmp_path / "a.nii"))
    with pytest.raises(InputError, match=r"a\.nii: has 4 dimensions"):
        read_scan(tmp_path / "a.nii", "grey")


def test_channels(tmp_path):
    colour = grey(np.uint16, 2**16, (9, 13, 3))
    (tmp_path / "colour.png").write_bytes(imagecodecs.png_encode(colour))
    luminance = 0.299 * colour[..., 0] + 0.587 * colour[..., 1] + 0.114 * colour[..., 2]
    np.testing.assert_allclose(read_scan(tmp_path / "colour.png", "grey").values[0], luminance, rtol=1e-6)
    assert read_scan(tmp_path / "colour.png", 3).values.shape == (3, 9, 13)
    single = grey(np.uint16, 2**16)
    Image.fromarray(single).save(tmp_path / "single.png")
    repeated = read_scan(tmp_path / "single.png", "rgb").values
    assert repeated.dtype == np.uint16
    np.testing.assert_array_equal(repeated, np.stack([single] * 3))
    with pytest.raises(InputError, match=r"single\.png: has 1 channel, 4 is wanted.*set data\.channels=1"):
        read_scan(tmp_path / "single.png", 4)
    with pytest.raises(InputError, match=r"has 3 channels, 1 is wanted"):
        read_scan(tmp_path / "colour.png", 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(tmp_path, bad):
    values = np.zeros((9, 13), np.float32)
    values[3, 4] = bad
    tifffile.imwrite(tmp_path / "broken.tif", values)
    with pytest.raises(InputError, match=r"broken\.tif: 1 of 117 values are NaN or infinite"):
        read_scan(tmp_path / "broken.tif", "grey")
    with pytest.raises(InputError, match=r"broken\.tif"):
        read_mask(tmp_path / "broken.tif")
    write_volume(tmp_path / "broken.nii", values[None].repeat(2, 0))
    with pytest.raises(InputError, match=r"broken\.nii: 2 of 234"):
        read_scan(tmp_path / "broken.nii", "grey")


def write_any(path: Path) -> None:
    values = grey(np.uint8, 256, (64, 64))
    if suffix_of(path) in (".nrrd", ".mha", ".nii", ".nii.gz"):
        write_volume(path, grey(np.int16, 3000, (8, 32, 32)))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values, compression="lzw")
    else:
        Image.fromarray(values).save(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".nrrd", ".mha"])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"cut{suffix}"
    write_any(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"cut\{suffix}: cannot be read"):
        read_scan(path, "grey")


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_truncated_nifti_is_refused(tmp_path, suffix, share):
    path = tmp_path / f"cut{suffix}"
    write_any(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"cut\{suffix}: cannot be read"):
        read_scan(path, "grey")


def test_a_file_that_is_something_else_is_refused(tmp_path):
    for suffix in READABLE:
        (tmp_path / f"text{suffix}").write_text("this is no image, whatever it is called")
        with pytest.raises(InputError, match=rf"text\{suffix}: cannot be read"):
            read_scan(tmp_path / f"text{suffix}", "grey")


@pytest.mark.parametrize("name", ["a.gif", "a.npy", "a", "a.nii.bz2"])
def test_an_unknown_ending_is_refused_with_those_that_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"is not a format this reads: \.nii, \.nii\.gz"):
        read_scan(tmp_path / name, "grey")


def test_a_file_that_is_not_there(tmp_path):
    for suffix in (".png", ".tif"):
        with pytest.raises(InputError, match=rf"none\{suffix}: no such file"):
            read_scan(tmp_path / f"none{suffix}", "grey")
    with pytest.raises(InputError, match=r"none\.nii"):
        read_scan(tmp_path / "none.nii", "grey")


def test_a_mask_of_fractions_is_refused(tmp_path):
    values = np.zeros((9, 13), np.float32)
    tifffile.imwrite(tmp_path / "whole.tif", values + 3)
    np.testing.assert_array_equal(read_mask(tmp_path / "whole.tif").values, 3)
    assert read_mask(tmp_path / "whole.tif").values.dtype.kind == "i"
    values[2, 3] = 0.5
    tifffile.imwrite(tmp_path / "soft.tif", values)
    with pytest.raises(InputError, match=r"soft\.tif: the mask holds values that are not whole numbers"):
        read_mask(tmp_path / "soft.tif")


def test_a_mask_in_colour_is_refused_unless_it_is_grey_all_the_same(tmp_path):
    labels = grey(np.uint8, 3)
    Image.fromarray(np.stack([labels] * 3, axis=-1)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "grey.png").values, labels)
    Image.fromarray(np.stack([labels, labels, 1 - labels], axis=-1)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match=r"colour\.png: the mask has 3 different channels"):
        read_mask(tmp_path / "colour.png")


@pytest.mark.parametrize(
    "name, stem, suffix",
    [("a.b.nii.gz", "a.b", ".nii.gz"), ("A.NII.GZ", "A", ".nii.gz"), ("x.y.PNG", "x.y", ".png"), ("plain", "plain", "")],
)
def test_stem_and_suffix(name, stem, suffix):
    assert (stem_of(Path(name)), suffix_of(Path(name))) == (stem, suffix)


def test_reading_imports_no_torch(tmp_path):
    Image.fromarray(grey(np.uint8, 256)).save(tmp_path / "a.png")
    write_volume(tmp_path / "a.nii", grey(np.int16, 9, (3, 4, 5)))
    code = (
        "import sys; from pathlib import Path; from resunet.data.images import read_scan, read_mask\n"
        f"for path in Path({str(tmp_path)!r}).iterdir(): read_scan(path, 'grey'); read_mask(path)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("bits", [2, 4])
def test_a_mask_of_few_bits_keeps_its_indices(tmp_path, bits):
    indices = grey(np.uint8, 4)
    (tmp_path / "a.png").write_bytes(packed_png(indices, bits))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png").values, indices)


def packed_png(indices: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 2 or 4 bits a pixel, which neither PIL nor imagecodecs writes (PNG specification, section 11.2.2)."""
    rows = b""
    for row in indices:
        packed = "".join(format(int(value), f"0{bits}b") for value in row)
        packed += "0" * (-len(packed) % 8)
        rows += b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", indices.shape[1], indices.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_one_bit_tiff_is_zero_and_one(tmp_path):
    bits = grey(np.uint8, 2)
    tifffile.imwrite(tmp_path / "a.tif", bits.astype(bool))
    scan = read_scan(tmp_path / "a.tif", "grey")
    assert scan.values.dtype == np.uint8
    np.testing.assert_array_equal(scan.values[0], bits)


def test_a_palette_scan_gives_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette([200, 200, 200, 50, 50, 50])
    image.save(tmp_path / "a.png")
    np.testing.assert_allclose(read_scan(tmp_path / "a.png", "grey").values, [[[200, 50]]], atol=1)


def zero_spacing(path: Path, axis: int) -> Path:
    """A NIfTI volume whose header says 0 mm along one of its axes x, y, z."""
    content = bytearray(path.read_bytes())
    content[80 + 4 * axis : 84 + 4 * axis] = np.float32(0).tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("axis", [0, 2])
def test_a_nifti_spacing_of_zero_is_refused_and_not_made_up(tmp_path, axis):
    path = zero_spacing(write_volume(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), (0.5, 2.0, 3.0)), axis)
    shown = " × ".join("0" if i == axis else f"{mm:g}" for i, mm in enumerate((0.5, 2.0, 3.0)))
    for read in (lambda: read_scan(path, "grey"), lambda: read_mask(path)):
        with pytest.raises(InputError, match=rf"a\.nii: the spacing in its header is {shown} mm"):
            read()
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=f"the spacing in its header is {shown} mm"):
        read_scan(packed, "grey")


def test_a_single_slice_needs_no_thickness(tmp_path):
    path = zero_spacing(write_volume(tmp_path / "a.nii", np.zeros((1, 5, 6), np.int16), (0.5, 2.0, 3.0)), 2)
    assert read_scan(path, "grey").spacing == (2.0, 0.5)


@pytest.mark.parametrize("name, old, new", [
    ("a.mha", b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1"),
    ("a.nrrd", b"space directions: (1,0,0)", b"space directions: (0,0,0)"),
])  # fmt: skip
def test_a_spacing_of_zero_elsewhere(tmp_path, name, old, new):
    path = write_volume(tmp_path / name, np.zeros((4, 5, 6), np.int16))
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(InputError, match="a spacing in its header is 0 mm"):
        read_scan(path, "grey")
