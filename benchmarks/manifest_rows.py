"""A manifest of a million rows: what opening it, finding rows, splitting it and checking it against another cost.

    python -m benchmarks.manifest_rows [--rows 1000000] [--held-out 10000] [--source FOLDER] [--out DIR]

Rows are synthetic, the code is real: parts are written and merged as `resunet index` does. Hashes are those of the images below
FOLDER with noise on top (without it, of random images), so that they lie as near to each other as real ones. Every measurement
runs in a process of its own and prints its seconds and its peak memory.
"""

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from resunet.data.check import check
from resunet.data.describe import DESCRIBED, PERCENTILES
from resunet.data.evidence import evidence_of, find_pairs
from resunet.data.identity import Salt
from resunet.data.images import IMAGES, read_scan
from resunet.data.ledger import open_ledger
from resunet.data.manifest import open_manifest
from resunet.data.merge import merge
from resunet.data.ownership import Ownership
from resunet.data.perceptual import SIDE, look
from resunet.data.pool import Limits
from resunet.data.splits import split_groups
from resunet.data.summary import write_summary
from resunet.data.walk import FoundFile, Tree

GROUP = 20  # scans of a patient
BATCH = 1000  # rows handed over at a time, as a worker of an index would
COPIES = 100  # of the held-out scans are in the archive


def looks(source: Path | None, count: int = 3000) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Hashes (n, L) and thumbnails (n, 1, SIDE, SIDE) of images."""
    rng = np.random.default_rng(0)
    if source is None:
        values = [np.kron(rng.integers(0, 255, (16, 16), np.uint8), np.ones((8, 8), np.uint8))[None] for _ in range(count)]
    else:
        files = sorted(path for path in source.rglob("images/*") if path.suffix in IMAGES)
        values = [read_scan(path, None).values for path in files[:: max(1, len(files) // count)]]
    seen = [look(one) for one in values]
    return np.stack([np.frombuffer(one.hash, np.uint8) for one in seen]), np.stack([one.thumbnail for one in seen])


def write(out: Path, rows: int, first: int, source: Path | None) -> None:
    """A manifest of `rows` scans, which are numbered from `first`; the number decides what is in them."""
    hashes, thumbnails = looks(source)
    root = out.with_suffix("")
    root.mkdir()
    names = [f"{number // 1000:05d}/{number:08d}" for number in range(first, first + rows)]
    groups = (f"{name},p{number // GROUP}\n" for number, name in enumerate(names, first))
    (root / "groups.csv").write_text("stem,group\n" + "".join(groups))
    files = [FoundFile(f"{root}/{name}.png", 10_000 + number % 1000, number) for number, name in enumerate(names, first)]
    salt = Salt(bytes(32))
    ownership = Ownership([root], Tree(files), None, salt)
    with open_ledger(out, salt.fingerprint, Limits()) as ledger:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            rows_of_some = [described(file.mtime_ns, hashes, thumbnails) for file in some]
            ledger.add_scans([(file,) for file in some], pa.RecordBatch.from_pylist(rows_of_some, schema=DESCRIBED))
        ledger.flush()
        merge(out, ledger, [(file,) for file in files], [], ownership)


def described(number: int, hashes: NDArray[np.uint8], thumbnails: NDArray[np.uint8]) -> dict[str, object]:
    rng = np.random.default_rng(number)
    source = int(rng.integers(len(hashes)))
    noise = rng.integers(-12, 13, hashes.shape[1])
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    own = thumbnails[source] if rng.random() < 0.5 else rng.integers(0, 255, (1, SIDE, SIDE), np.uint8)
    return {
        "file_sha256": digest,
        "pixel_sha256": digest[::-1],
        "perceptual": (hashes[source] + noise).clip(0, 255).astype(np.uint8).tobytes(),
        "format": "png",
        "modality": "",
        "shape": (128, 128 + number % 7),
        "channels": 1,
        "spacing": (1.0, 1.0),
        "orientation": "",
        "dtype": "uint8",
        "percentiles": np.sort(rng.random(len(PERCENTILES)) * 255).tolist(),
        "files": 1,
        "bytes": 10_000 + number % 1000,
        "thumbnail": own.tobytes(),
    }


def measured(what: str, function: Callable[..., object], *arguments: object) -> None:
    """Run a function in a process of its own and print what it cost."""
    context = multiprocessing.get_context("spawn")
    pipe, its = context.Pipe()
    process = context.Process(target=_measure, args=(its, function, arguments))
    process.start()
    its.close()
    try:
        seconds, gib, said = pipe.recv()
    except EOFError:
        raise SystemExit(f"{what}: failed") from None
    process.join()
    print(f"{what}: {seconds:.1f} s, peak memory {gib:.2f} GiB {said}".rstrip(), flush=True)


def _measure(pipe, function: Callable[..., object], arguments: tuple[object, ...]) -> None:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    said = function(*arguments)
    seconds = time.perf_counter() - start
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, said or ""))


def open_and_find(path: Path) -> str:
    start = time.perf_counter()
    manifest = open_manifest(path)
    opened = time.perf_counter()
    rng = np.random.default_rng(0)
    wanted = rng.choice(manifest.num_rows, 1000, replace=False)
    ids = manifest.column("id").take(wanted).to_pylist()
    if manifest.rows_of(ids).tolist() != wanted.tolist():
        raise AssertionError("other rows were found")
    found = time.perf_counter()
    for row in wanted:
        manifest.files(int(row))
        manifest.thumbnail(int(row))
    done = time.perf_counter()
    return f"(open {opened - start:.2f} s, 1,000 ids {found - opened:.2f} s, their files and thumbnails {done - found:.2f} s)"


def split(path: Path) -> str:
    manifest = open_manifest(path)
    groups = manifest.column("group").combine_chunks().dictionary_encode()
    part_of = split_groups(groups.dictionary.to_pylist(), 0)
    parts = np.array([part_of[name] for name in groups.dictionary.to_pylist()])[groups.indices.to_numpy()]
    names, counts = np.unique(parts, return_counts=True)
    return f"({len(part_of)} groups: {dict(zip(names.tolist(), counts.tolist(), strict=True))})"


def evidence(archive: Path, held_out: Path) -> str:
    pairs = find_pairs(evidence_of(open_manifest(archive)), evidence_of(open_manifest(held_out)))
    return f"({len(pairs)} pairs of {len(set(pairs.held_out.tolist()))} held-out scans)"


def checked(archive: Path, held_out: Path, out: Path) -> str:
    lines = StringIO()
    with redirect_stdout(lines):
        pairs = check(archive, held_out, out)
    if len(lines.getvalue().splitlines()) != pairs:
        raise AssertionError("a line a pair")
    return f"({pairs} lines)"


def summary(path: Path) -> None:
    write_summary(open_manifest(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--held-out", type=int, default=10_000)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        archive, held_out = out / "archive.parquet", out / "held_out.parquet"
        if not archive.exists():
            measured(f"write {options.rows} rows", write, archive, options.rows, 0, options.source)
            first = options.rows - COPIES  # the first of the held-out are the last of the archive
            measured(f"write {options.held_out} rows", write, held_out, options.held_out, first, options.source)
        measured("open, look up", open_and_find, archive)
        measured("split by group", split, archive)
        measured("evidence", evidence, archive, held_out)
        pairs = Path(scratch) / "pairs.parquet"
        measured("check with --out", checked, archive, held_out, pairs)
        measured("summary page", summary, archive)


if __name__ == "__main__":
    main()
