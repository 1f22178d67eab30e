"""What `resunet index` does, from the files of an archive to its manifest. Imports no torch."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from resunet.data.describe import Described, describe, open_file, open_scan
from resunet.data.dicom import gaps_told, group_files
from resunet.data.identity import load_salt
from resunet.data.index import IndexRequest
from resunet.data.ledger import Ledger, Scan, open_ledger
from resunet.data.manifest import beside, is_foreign, open_manifest
from resunet.data.merge import merge
from resunet.data.ownership import Ownership, pseudonymous
from resunet.data.pool import Fault, Limits, Outcome, guarded_map
from resunet.data.walk import FoundFile, Tree, walk
from resunet.errors import InputError
from resunet.plain import number_of
from resunet.progress import progress, say

_CHUNK_FILES, _CHUNK_BYTES = 128, 8 << 20
_QUOTED = re.compile(r"""(?<!\w)(['"|`]).*?\1(?!\w)|<[^>]*>|\S*[/\\]\S*""")


def make_manifest(request: IndexRequest) -> Path:
    """The manifest that was asked for; its path. Raises as `resunet.data.index.index` says."""
    if is_foreign(request.out):
        raise InputError(f"--out {request.out}: is no manifest and would be replaced. Name another file, or delete it.")
    sources = tuple(_absolute(source) for source in request.sources)
    masks = _absolute(request.masks) if request.masks is not None else None
    tree = walk(sources, _own(_absolute(request.out), masks))
    if not tree.files:
        raise InputError(f"SOURCE {', '.join(map(str, request.sources))}: no files there.")
    salt = load_salt(request.salt_file, "--salt-file ")
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
        gaps = gaps_told({file.path: ledger.headers[file] for file in scan} for scan in scans if len(scan) > 1)
        merge(request.out, ledger, scans, rejects, ownership)
    from resunet.data.summary import summary_lines, write_summary  # what draws is not needed before

    manifest = open_manifest(request.out)
    for line in [*summary_lines(manifest), *gaps]:
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
        new = [file for file in files if not self._is_known(file)] if ledger.knows_something else files
        say(f"{number_of(len(files), 'file')}, {len(new):,} of them new or changed; {number_of(self._workers, 'worker')}")
        for one in self._outcomes("look at files", open_file, new, lambda file: [file]):
            if one.result is not None:
                headers, described = one.result
                ledger.add_scans([(file,) for place, file in enumerate(one.items) if place not in headers], described)
                for place, header in headers.items():
                    ledger.add_header(one.items[place], pseudonymous(header, self._salt))
            for file, fault in one.faults:
                ledger.add_reject(file, _bare(fault, [file]))
        ledger.flush()
        while True:
            scans = _scans(ledger, files)
            todo = [scans[i] for i in (ledger.rows_of(scans) < 0).nonzero()[0]]
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
            if one.result is not None:
                self._ledger.add_scans(one.items, one.result.scans)
            for scan, fault in one.faults:
                if len(scan) == 1:
                    self._ledger.add_reject(scan[0], _bare(fault, scan))
                else:
                    broken[scan] = fault
        files = [(file,) for scan in broken for file in scan]
        for one in self._outcomes("index files of broken volumes", open_scan, files, lambda scan: scan):
            for scan, fault in one.faults:
                self._ledger.add_reject(scan[0], _bare(fault, scan))
        for scan, fault in broken.items():
            if not any(file in self._ledger.rejects for file in scan):  # each by itself can be read, together they cannot
                for file in scan:
                    self._ledger.add_reject(file, _bare(fault, scan))

    def _outcomes(
        self, label: str, opening: Callable[..., Any], items: Sequence, files_of: Callable[..., Sequence[FoundFile]]
    ) -> Iterator[Outcome[Any, Described]]:
        """The outcomes of all items, a chunk at a time, with progress."""
        if not items:
            return
        counted = iter(progress(range(len(items)), len(items), label))
        with closing(guarded_map(opening, describe, _chunks(items, files_of), self._workers, self._limits)) as chunks:
            for one in chunks:
                yield one
                for _ in islice(counted, len(one.items) + len(one.faults)):
                    pass
        next(counted, None)


def _scans(ledger: Ledger, files: Sequence[FoundFile]) -> list[Scan]:
    """What is read as one: the volumes of DICOM series, every other file by itself; without rejects."""
    good = [file for file in files if file not in ledger.rejects] if ledger.rejects else files
    dicom = {file.path: file for file in good if file in ledger.headers} if ledger.headers else {}
    volumes = group_files({path: ledger.headers[file] for path, file in dicom.items()})
    others = [(file,) for file in good if file.path not in dicom]
    return [tuple(dicom[path] for path in volume) for volume in volumes] + others


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
