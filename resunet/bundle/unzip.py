"""A zipped bundle → a folder, however the zip was made: nothing outside the folder, and never much more than the zip itself."""

import lzma
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from resunet.errors import CheckFailed

_FILES = 1000
_EXPANSION = 50  # bytes of one in the zip, and what small files may have beside
_SPARE = 64 * 2**20
_CHUNK = 2**20
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


def unzip(path: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, which is empty.

    Raises:
        CheckFailed: no zip, a path that leaves the folder, a link, a name twice, or more than it may expand to.
    """
    budget = _EXPANSION * path.stat().st_size + _SPARE
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _refuse_members(path, members)
            for member in members:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "xb") as out:
                    while chunk := source.read(_CHUNK):  # what it says of its own size may be a lie
                        budget -= len(chunk)
                        if budget < 0:
                            raise CheckFailed(f"{path}: expands to more than {_EXPANSION} times its size: refused.")
                        out.write(chunk)
    except (*_BROKEN, FileExistsError, NotADirectoryError) as error:
        raise CheckFailed(f"{path}: cannot be unpacked: {error}") from error


def _refuse_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > _FILES:
        raise CheckFailed(f"{path}: holds {len(members)} files; a bundle has at most {_FILES}.")
    names = set()
    for member in members:
        name = member.filename
        parts = PurePosixPath(name).parts
        kind = stat.S_IFMT(member.external_attr >> 16)
        if name.startswith("/") or "\\" in name or ":" in name or ".." in parts or str(PurePosixPath(name)) != name:
            raise CheckFailed(f"{path}: holds {name!r}, a path that leaves the folder or is not plain: refused.")
        if kind not in (0, stat.S_IFREG):
            raise CheckFailed(f"{path}: holds {name!r}, which is no file: refused.")
        if name in names:
            raise CheckFailed(f"{path}: holds {name!r} twice: refused.")
        names.add(name)


def zip_folder(folder: Path, path: Path) -> None:
    """Every file of `folder`, in the order of their names and without times, so that equal bundles are equal zips."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            member = zipfile.ZipInfo(file.relative_to(folder).as_posix())
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            with open(file, "rb") as source, archive.open(member, "w", force_zip64=True) as out:
                shutil.copyfileobj(source, out, _CHUNK)
