"""`resunet index`: an archive → a manifest. Walk, look at every file, join DICOM files into volumes, describe, merge.

Reading is done by guarded processes and kept in M.parts/ as it goes: an index that was killed goes on where it was, and a second
run over the same tree reads what is new or changed. Imports no torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from resunet.data.pool import Limits, start_early
from resunet.errors import EnvironmentFault, InputError
from resunet.exits import stopped_by_sigterm


@dataclass(frozen=True)
class IndexRequest:
    """What `resunet index` takes. masks: a folder with the images' own relative names; workers: 0 is one a core."""

    sources: tuple[Path, ...]
    out: Path
    masks: Path | None = None
    workers: int = 0
    salt_file: Path | None = None
    limits: Limits = field(default_factory=Limits)


def index(request: IndexRequest) -> Path:
    """Make a manifest or bring it up to date; its path.

    Raises:
        InputError: sources, masks, groups.csv or splits.json at fault, nothing that can be read, or an `out` that is something
            else or being written.
        EnvironmentFault: the disk.
        Stopped: SIGTERM.
    """
    if request.out.suffix != ".parquet":
        raise InputError(f"--out {request.out}: a manifest is a Parquet file; give a name that ends in .parquet.")
    with stopped_by_sigterm("the same command goes on where it was"), _disk_at_fault(request.out):
        if not request.out.exists():  # much to read, presumably
            start_early()
        from resunet.data.indexing import make_manifest  # while the readers are imported over there

        return make_manifest(request)


@contextmanager
def _disk_at_fault(out: Path) -> Iterator[None]:
    """What the system refuses here is about our own files: those of the archive are read by workers."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"--out {out}: cannot be written: {os.strerror(error.errno) if error.errno else error}. Free space or correct the "
            "permissions and give the same command again: it goes on where it was. Or name another --out."
        ) from error
