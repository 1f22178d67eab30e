"""Decoders for DICOM transfer syntaxes that pydicom and its permissive plugins lack, or decode slowly. All give stored values."""

import math
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray

from resunet.data.dicom import frame_count


def decode_jpeg_above_8_bits(dataset: Any) -> NDArray:
    """Extended and lossless JPEG: pydicom has no permissive plugin for them, GDCM prints on standard error."""
    frames = frame_count(dataset) or 1
    space = "RGB" if dataset.PhotometricInterpretation == "RGB" else None
    parts = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=frames)
    decoded = np.stack([imagecodecs.jpeg8_decode(part, colorspace=space, outcolorspace=space) for part in parts])
    shape = (frames, dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    unused = decoded.dtype.itemsize * 8 - dataset.BitsStored
    if decoded.size != math.prod(shape) or decoded.shape[:3] != shape[:3] or unused < 0:
        raise ValueError("frames of another size than the header says")
    if dataset.PixelRepresentation:
        decoded = decoded.view(np.dtype(f"i{decoded.dtype.itemsize}"))
    return np.asarray((decoded << unused) >> unused)  # unused bits are no part of the value (DICOM PS3.5, 8.1.1)


def inflate_frames(dataset: Any) -> NDArray:
    """Deflated Image Frame Compression (DICOM PS3.5, A.4.13), which pydicom 3.0 does not know."""
    frames = frame_count(dataset) or 1
    size = -(-dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated // 8)
    parts = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=frames)
    return _native(dataset, [zlib.decompressobj(-15).decompress(part, size) for part in parts], size)


def decode_rle(dataset: Any) -> NDArray:
    """RLE (DICOM PS3.5, annex G): a segment for each byte of a sample, high bytes first; bits are packed in one.

    pydicom's own decoder is slow, its plugin's panics pass by `except Exception`.
    """
    frames, samples, bits = frame_count(dataset) or 1, dataset.SamplesPerPixel, dataset.BitsAllocated
    width = max(1, bits // 8)
    size = -(-dataset.Rows * dataset.Columns * min(bits, 8) // 8)
    decoded = []
    for part in pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=frames):
        count, *starts = struct.unpack("<16I", part[:64])
        if count != samples * width:
            raise ValueError("another number of segments than the header says")
        ends = [*starts[1:count], len(part)]
        segments = [
            np.frombuffer(imagecodecs.packbits_decode(part[start:end]), np.uint8)[:size]
            for start, end in zip(starts[:count], ends, strict=True)
        ]
        planes = np.stack(segments).reshape(samples, width, size)  # bytes of a sample, the high one first
        decoded.append(planes[:, ::-1].transpose(2, 0, 1).tobytes())
    stored = _native(dataset, decoded, size * samples * width)
    unused = bits - dataset.BitsStored
    return np.asarray((stored << unused) >> unused) if bits > 1 and unused > 0 else stored


def _native(dataset: Any, parts: list[bytes], size: int) -> NDArray:
    if len(parts) != (frame_count(dataset) or 1) or any(len(part) != size for part in parts):
        raise ValueError("frames of another size than the header says")
    joined = np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), size)
    values = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel
    if dataset.BitsAllocated == 1:
        return np.unpackbits(joined, axis=1, bitorder="little")[:, :values]
    kind = "i" if dataset.PixelRepresentation else "u"
    return joined.view(f"<{kind}{dataset.BitsAllocated // 8}")
