"""The opset of an ONNX file, read from its own bytes: a product has no onnx package.

Of the protobuf message ModelProto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) field 8 is opset_import, an
OperatorSetIdProto, with field 1, the domain ('' or 'ai.onnx' is ONNX itself), and field 2, its version. All else is passed over.
"""

from collections.abc import Iterator
from pathlib import Path

from resunet.errors import CheckFailed

_OPSET_IMPORT = 8


def opset_of(path: Path) -> int | None:
    """The version of ONNX's own operators; None where it names none.

    Raises:
        CheckFailed: not a protobuf message.
    """
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == _OPSET_IMPORT and isinstance(value, memoryview):
                imported = dict(_fields(value))
                domain, version = imported.get(1, memoryview(b"")), imported.get(2)
                if domain in (b"", b"ai.onnx") and isinstance(version, int):
                    return version
    except (IndexError, ValueError) as error:
        raise CheckFailed(f"{path.name}: is no ONNX file.") from error
    return None


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: whole numbers, and what has a length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or at + length > len(data):
            raise ValueError
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError
