"""Files and folders that stand whole or not at all, and their digests. Imports no torch."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from resunet.errors import EnvironmentFault, InputError

_PARTIAL = ".partial."


def refuse_taken(out: Path, key: str = "--out ", what: str = "folder", otherwise: str = "or delete it") -> None:
    """Refuse a place for a new file or folder before work is done that could not be kept.

    Args:
        key: what the user calls it: a flag and a blank, or a recipe key and '='.
        what: 'folder' or 'file'.
        otherwise: what to do beside naming another.

    Raises:
        InputError: something stands there, or what is above it is no folder, or its name is none.
        EnvironmentFault: nothing can be written above it.
    """
    try:
        if out.exists() or out.is_symlink():
            raise InputError(f"{key}{out}: exists already. Name another {what}, {otherwise}.")
    except OSError as error:  # a name that is too long
        raise InputError(f"{key}{out}: {error.strerror}. Name another {what}.") from error
    refuse_unwritable(out, key, what)


def refuse_unwritable(out: Path, key: str = "--out ", what: str = "folder") -> None:
    """Raises as `refuse_taken`, but for what stands there."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{key}{out}: {above} is a file, not a folder. Name another {what}.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{key}{out}: nothing can be written in {above}. Name another {what}, or allow it.")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with file_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A new folder that stands at `folder` once the block has ended, whole or not at all; one that stands is replaced.

    An empty one is filled instead, which may be a mount point, a link or the working directory: it cannot be taken away.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fills = is_empty(folder)
    aside = folder / f"{_PARTIAL}{uuid.uuid4().hex}" if fills else folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        yield aside
        if fills:
            for child in sorted(aside.iterdir()):
                os.replace(child, folder / child.name)
        else:
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """A folder that holds nothing, but for what a killed `folder_aside` left."""
    return folder.is_dir() and all(child.name.startswith(_PARTIAL) for child in folder.iterdir())


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """A file that stands at `path` once the block has ended, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """sha256 of a file; of several, sha256 over theirs (hex digits) in order."""
    return joined_sha256([sha256(path) for path in paths])


def joined_sha256(digests: Sequence[str]) -> str:
    """A single digest itself; of several, sha256 over them in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
