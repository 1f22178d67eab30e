"""How fast `resunet index` is beside reading and decoding alone, on the same cores with the same number of processes.

    python -m benchmarks.index_rate SOURCE [--out DIR] [--small 20000] [--large 2000] [--workers 2] [--repeats 3]

Makes PNGs of 128² and 1024² pixels by cropping (and, where an image is smaller, enlarging) and re-encoding the images below
SOURCE, in DIR, which is kept for the next time. Then measures in turn, `repeats` times: reading and decoding with this package's
reader, the same with PIL, and the whole index: walk, processes, merge and summary. Prints images a second (medians) and shares.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from resunet.data.images import read_scan
from resunet.data.index import IndexRequest, index

FOLDER, CHUNK = 1000, 64


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


def each(function: Callable[[Path], None], paths: Sequence[Path]) -> None:
    for path in paths:
        function(path)


def reading(function: Callable[[Path], None], paths: Sequence[Path], workers: int) -> float:
    """Images a second of processes that do nothing else, without their start."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        pool.map(partial(each, function), [paths[:1]] * workers, chunksize=1)
        start = time.perf_counter()
        for _ in pool.imap_unordered(partial(each, function), chunks):
            pass
        return len(paths) / (time.perf_counter() - start)


def indexing(folder: Path, count: int, workers: int) -> float:
    """Images a second of a whole first index."""
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        salt = Path(scratch) / "salt"
        salt.write_text("5a" * 32)
        start = time.perf_counter()
        index(IndexRequest((folder,), Path(scratch) / "m.parquet", workers=workers, salt_file=salt))
        return count / (time.perf_counter() - start)


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
    for size, count, asked in ((128, options.small, 0.4), (1024, options.large, 0.8)):
        if not count:
            continue
        folder = out / f"{size}-{count}"
        paths = make_images(options.source, folder, size, count, options.workers)
        rates: dict[str, list[float]] = {"read_scan": [], "PIL": [], "index": []}
        for _ in range(options.repeats):
            rates["read_scan"].append(reading(decode, paths, options.workers))
            rates["PIL"].append(reading(decode_by_pil, paths, options.workers))
            rates["index"].append(indexing(folder, count, options.workers))
        medians = {name: statistics.median(its) for name, its in rates.items()}
        shares = [
            statistics.median(i / r for i, r in zip(rates["index"], rates[name], strict=True)) for name in ("read_scan", "PIL")
        ]
        print(
            f"{count} PNGs of {size}²: "
            + ", ".join(
                f"{name} {rate:.0f}/s ({min(rates[name]):.0f} to {max(rates[name]):.0f})" for name, rate in medians.items()
            )
            + f"; index is {shares[0]:.0%} of read_scan and {shares[1]:.0%} of PIL, asked for {asked:.0%}",
            flush=True,
        )
    if options.out is None:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
