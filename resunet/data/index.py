"""`resunet index`: an archive → a manifest. Walk, look at every file, join DICOM files into volumes, describe, merge.

Reading is done by guarded processes and kept in M.parts/ as it goes: an index that was killed goes on where it was, and a second
run over the same tree reads what is new or changed. Imports no torch.
"""

import os
import re
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resunet.data.describe import Described, describe, open_file, open_scan
from resunet.data.dicom import group_files
from resunet.data.identity import load_salt
from resunet.data.ledger import Ledger, Scan, open_ledger
from resunet.data.manifest import beside, is_foreign, open_manifest
from resunet.data.merge import merge
from resunet.data.ownership import Ownership, pseudonymous
from resunet.data.pool import Fault, Limits, Outcome, guarded_map
from resunet.data.summary import summary_lines, write_summary
from resunet.data.walk import FoundFile, Tree, walk
from resunet.errors import EnvironmentFault, InputError, Stopped
from resunet.progress import progress, say

_CHUNK_FILES, _CHUNK_BYTES = 128, 8 << 20
_QUOTED = re.compile(r"""(?<!\w)(['"|`]).*?\1(?!\w)|<[^>]*>|\S*[/\\]\S*""")


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
    if is_foreign(request.out):
        raise InputError(f"--out {request.out}: is no manifest and would be replaced. Name another file, or delete it.")
    with _stopping_in_order(), _disk_at_fault(request.out):
        return _index(request)


def _index(request: IndexRequest) -> Path:
    sources = tuple(_absolute(source) for source in request.sources)
    masks = _absolute(request.masks) if request.masks is not None else None
    tree = walk(sources, _own(_absolute(request.out), masks))
    if not tree.files:
        raise InputError(f"SOURCE {', '.join(map(str, request.sources))}: no files there.")
    salt = load_salt(request.salt_file)
    ownership = Ownership(sources, tree, masks, salt)
    workers = request.workers or _cores()
    with open_ledger(request.out, salt.fingerprint, request.limits) as ledger:
        scans = _Reader(ledger, ownership, workers, request.limits).read(tree.files)
        rejects = _rejects(ledger, tree)
        if not scans:
            reasons = "\n".join(f"  {file.path}: {fault.reason}" for file, fault in rejects[:5])
            raise InputError(
                f"SOURCE {', '.join(map(str, request.sources))}: none of {len(tree.files)} files can be read:\n{reasons}"
            )
        merge(request.out, ledger, scans, rejects, ownership)
    manifest = open_manifest(request.out)
    for line in summary_lines(manifest):
        say(line)
    say(f"a page to look at: {write_summary(manifest)}")
    return request.out


class _Reader:
    """Fills a ledger with what it does not know."""

    def __init__(self, ledger: Ledger, ownership: Ownership, workers: int, limits: Limits) -> None:
        self._ledger, self._salt = ledger, ownership.salt
        self._workers, self._limits = workers, limits

    def read(self, files: Sequence[FoundFile]) -> list[Scan]:
        """Everything that can be read, as it is read together."""
        ledger = self._ledger
        new = [file for file in files if not self._is_known(file)]
        say(f"{len(files):,} files, {len(new):,} of them new or changed; {self._workers} workers")
        for one in self._outcomes("look at files", open_file, new, lambda file: [file]):
            if one.fault is not None:
                ledger.add_reject(one.item, _bare(one.fault, [one.item]))
            elif isinstance(one.result, Described):
                ledger.add_scan((one.item,), one.result)
            elif one.result is not None:
                ledger.add_header(one.item, pseudonymous(one.result, self._salt))
        ledger.flush()
        while True:
            scans = _scans(ledger, files)
            todo = [scan for scan in scans if scan not in ledger]
            if not todo:
                return scans
            self._describe(todo)
            ledger.flush()

    def _is_known(self, file: FoundFile) -> bool:
        ledger = self._ledger
        return file in ledger.headers or file in ledger.rejects or (file not in ledger.hidden and (file,) in ledger)

    def _describe(self, scans: Sequence[Scan]) -> None:
        """Describe DICOM scans. What cannot be read is rejected; of a volume, only the files that cannot be read alone."""
        broken: dict[Scan, Fault] = {}
        for one in self._outcomes("index DICOM", open_scan, scans, lambda scan: scan):
            if one.fault is None:
                self._ledger.add_scan(one.item, one.result)  # type: ignore[arg-type]
            elif len(one.item) == 1:
                self._ledger.add_reject(one.item[0], _bare(one.fault, one.item))
            else:
                broken[one.item] = one.fault
        files = [(file,) for scan in broken for file in scan]
        for one in self._outcomes("index files of broken volumes", open_scan, files, lambda scan: scan):
            if one.fault is not None:
                self._ledger.add_reject(one.item[0], _bare(one.fault, one.item))
        for scan, fault in broken.items():
            if not any(file in self._ledger.rejects for file in scan):  # each by itself can be read, together they cannot
                for file in scan:
                    self._ledger.add_reject(file, _bare(fault, scan))

    def _outcomes(
        self, label: str, opening: Callable[..., Any], items: Sequence, files_of: Callable[..., Sequence[FoundFile]]
    ) -> Iterator[Outcome]:
        """The outcome of every item, with progress."""
        if not items:
            return
        with closing(guarded_map((opening, describe), _chunks(items, files_of), self._workers, self._limits)) as chunks:
            yield from progress((one for chunk in chunks for one in chunk), len(items), label)


def _scans(ledger: Ledger, files: Sequence[FoundFile]) -> list[Scan]:
    """What is read as one: the volumes of DICOM series, every other file by itself; without rejects."""
    by_path = {file.path: file for file in files if file in ledger.headers and file not in ledger.rejects}
    volumes = group_files({path: ledger.headers[file] for path, file in by_path.items()})
    others = [(file,) for file in files if file not in ledger.headers and file not in ledger.rejects]
    return [tuple(by_path[path] for path in volume) for volume in volumes] + others


def _rejects(ledger: Ledger, tree: Tree) -> list[tuple[FoundFile, Fault]]:
    found = [(file, ledger.rejects[file]) for file in tree.files if file in ledger.rejects]
    found += [(file, Fault(reason, "")) for file, reason in tree.unreachable]
    return sorted(found, key=lambda one: one[0].path)


def _bare(fault: Fault, files: Sequence[FoundFile]) -> Fault:
    """A reason without paths, which stand beside it, and without what a reader quotes: names of folders and headers name people."""
    reason = fault.reason
    for file in files:
        folder = str(Path(file.path).parent)
        reason = reason.removeprefix(f"{file.path}: ").replace(file.path, "the file").replace(folder, "its folder")
    return replace(fault, reason=_QUOTED.sub("…", reason).encode(errors="replace").decode())


def _chunks(items: Sequence, files_of: Callable[..., Sequence[FoundFile]]) -> list[list]:
    """Items together in order: few enough to be done again and decoded at once, enough to be worth sending."""
    chunks: list[list] = []
    count = size = 0
    for item in items:
        files = files_of(item)
        its_size = sum(file.size for file in files)
        if not chunks or count + len(files) > _CHUNK_FILES or size + its_size > _CHUNK_BYTES:
            chunks.append([])
            count = size = 0
        chunks[-1].append(item)
        count, size = count + len(files), size + its_size
    return chunks


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (links keep their names)


def _own(out: Path, masks: Path | None) -> Callable[[str], bool]:
    """Which paths are no scans of a source: the manifest itself, and the masks."""
    own = {str(out), *(str(beside(out, what)) for what in ("paths.parquet", "rejects.parquet", "html", "parts"))}
    thumbnails = str(beside(out, "thumbnails-"))
    return lambda path: path in own or path == str(masks) or (path.startswith(thumbnails) and path.endswith(".npy"))


@contextmanager
def _stopping_in_order() -> Iterator[None]:
    """SIGTERM raises where we are, so that what was read is kept and the workers end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: types.FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped("stopped by SIGTERM; the same command goes on where it was")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
