"""How fast `resunet index` is beside reading and decoding alone, on the same cores with the same number of processes.

    python -m benchmarks.index_rate SOURCE [--out DIR] [--small 20000] [--large 2000] [--workers 2] [--repeats 3]

Makes PNGs of 128² and 1024² pixels by cropping (and, where an image is smaller, enlarging) and re-encoding the images below
SOURCE, in DIR, which is kept for the next time. Then measures in turn, `repeats` times: reading and decoding with this package's
reader, the same with PIL, and the whole command `resunet index` from its start to its end. Prints images a second and processor
time an image (medians, over all processes), and shares: of the rates, and of the processor times, which others on the machine
disturb less. Linux only.
"""

import argparse
import ctypes
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

from benchmarks.index_kills import session_of
from resunet.data.images import read_scan

FOLDER, CHUNK = 1000, 64
PR_SET_CHILD_SUBREAPER = 36  # prctl(2): what outlives its parent becomes ours, and its processor time, too


def make_images(source: Path, out: Path, size: int, count: int, workers: int) -> list[Path]:
    """`count` PNGs of size × size; those that are there already are kept."""
    wanted = [out / f"{number // FOLDER:03d}" / f"{number:06d}.png" for number in range(count)]
    todo = [(path, number) for number, path in enumerate(wanted) if not path.exists()]
    if todo:
        sources = sorted(path for path in source.rglob("images/*") if path.suffix in (".png", ".jpg"))
        for folder in {path.parent for path, _ in todo}:
            folder.mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool(workers) as pool:
            pool.starmap(partial(make_image, sources, size), todo, chunksize=CHUNK)
    return wanted


def make_image(sources: Sequence[Path], size: int, path: Path, number: int) -> None:
    """A crop of one of the sources."""
    rng = np.random.default_rng(number)
    with Image.open(sources[rng.integers(len(sources))]) as image:
        scale = max(1.0, size / min(image.size)) * rng.uniform(1.0, 1.1)
        image = image.resize([round(side * scale) for side in image.size])
        left, top = (int(rng.integers(side - size + 1)) for side in image.size)
        aside = path.with_suffix(".aside")
        image.crop((left, top, left + size, top + size)).save(aside, "PNG")
        os.replace(aside, path)


def decode(path: Path) -> None:
    read_scan(path, None)


def decode_by_pil(path: Path) -> None:
    with Image.open(path) as image:
        np.asarray(image)


class Cost(NamedTuple):
    """What a run took: seconds on the clock, and seconds of all processes together on the processors."""

    wall: float
    cpu: float


def each(function: Callable[[Path], None], paths: Sequence[Path]) -> float:
    """Apply it; seconds on the processor."""
    start = time.process_time()
    for path in paths:
        function(path)
    return time.process_time() - start


def reading(function: Callable[[Path], None], paths: Sequence[Path], workers: int) -> Cost:
    """Of processes that do nothing else, without their start."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        pool.map(partial(each, function), [paths[:1]] * workers, chunksize=1)
        start = time.perf_counter()
        cpu = sum(pool.imap_unordered(partial(each, function), chunks))
        return Cost(time.perf_counter() - start, cpu)


def indexing(folder: Path, workers: int) -> Cost:
    """Of the whole command, a first index: from the start of its process to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        salt = Path(scratch) / "salt"
        salt.write_text("5a" * 32)
        command = [sys.executable, "-P", "-m", "resunet", "index", str(folder), "--out", f"{scratch}/m.parquet"]
        command += ["--workers", str(workers), "--salt-file", str(salt)]
        before, start = _children(), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        if process.wait():
            raise SystemExit(f"resunet index ended with exit code {process.returncode}")
        wall = time.perf_counter() - start
        while any(session_of(pid) == process.pid for pid in psutil.pids()):  # its reading processes: ours to bury
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.01)
        return Cost(wall, _children() - before)


def _children() -> float:
    """Seconds on the processors of all that ended below this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shares(costs: dict[str, list[Cost]], name: str) -> str:
    """The index beside a way to read: the medians of both ratios over the rounds."""
    pairs = list(zip(costs[name], costs["index"], strict=True))
    wall, cpu = (statistics.median(read[i] / index[i] for read, index in pairs) for i in (0, 1))
    return f"{wall:.0%} of {name} by the clock, {cpu:.0%} by processor time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", type=int, default=20_000)
    parser.add_argument("--large", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp())
    print(f"{options.workers} processes, {os.cpu_count()} cores, medians of {options.repeats}", flush=True)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for size, count, asked in ((128, options.small, 0.4), (1024, options.large, 0.8)):
        if not count:
            continue
        folder = out / f"{size}-{count}"
        paths = make_images(options.source, folder, size, count, options.workers)
        costs: dict[str, list[Cost]] = {"read_scan": [], "PIL": [], "index": []}
        for _ in range(options.repeats):
            costs["read_scan"].append(reading(decode, paths, options.workers))
            costs["PIL"].append(reading(decode_by_pil, paths, options.workers))
            costs["index"].append(indexing(folder, options.workers))
        figures = {
            name: f"{name} {count / statistics.median(one.wall for one in its):.0f}/s ({count / max(its).wall:.0f} to "
            f"{count / min(its).wall:.0f}; {1e6 * statistics.median(one.cpu for one in its) / count:.0f} µs of processor each)"
            for name, its in costs.items()
        }
        print(f"{count} PNGs of {size}²: {', '.join(figures.values())}")
        print(f"index: {shares(costs, 'read_scan')}; {shares(costs, 'PIL')}; asked for {asked:.0%}", flush=True)
    if options.out is None:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
