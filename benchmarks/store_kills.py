"""Writers killed at random moments while they fill one store; then the next run completes and equals the reference.

    python -m benchmarks.store_kills --out DIR [--kills 10] [--writers 3] [--scans 40]

Each round starts `writers` processes that fill the same store with the same scans in different orders, and kills all of them
with SIGKILL at a random moment. It is checked after every kill that each entry that is there equals the reference byte by byte,
and at the end that one more run fills the store completely and that no other file is left. Prints one line a round.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resunet.data.store import Store, store_key


def scan(seed: int) -> NDArray[np.int16]:
    """A scan of some size that is made faster than it is written: (1, z, y, x)."""
    rng = np.random.default_rng(seed)
    size = rng.integers(100, 250, 3)
    return np.resize(rng.normal(0, 300, 99991).astype(np.int16), (1, *size))


def fill(folder: Path, scans: int, order: int) -> None:
    """Put all scans, in an order of its own."""
    store = Store(folder)
    for i in np.random.default_rng(order).permutation(scans):
        key = store_key(str(i))
        if key not in store:
            store.put(key, scan(int(i)), {"seed": int(i)}, slice_axis=[None, 0, 1, 2][i % 4])


def entries(folder: Path) -> dict[str, bytes]:
    """Key → bytes of what a store holds."""
    return {path.name: path.read_bytes() for path in folder.glob("??/*")}


def start(folder: Path, scans: int, order: int) -> subprocess.Popen[bytes]:
    """A process that fills the store."""
    arguments = ["--out", str(folder), "--scans", str(scans), "--fill", str(order)]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.store_kills", *arguments], start_new_session=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--scans", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill is not None:
        return fill(options.out, options.scans, options.fill)

    fill(options.out / "reference", options.scans, 0)
    reference = entries(options.out / "reference")
    folder = options.out / "store"
    rng = random.Random(options.seed)
    stale = 0
    for kill in range(options.kills):
        before = set((folder / "aside").glob("*"))
        writers = [start(folder, options.scans, kill * options.writers + i) for i in range(options.writers)]
        while not set((folder / "aside").glob("*")) - before and any(writer.poll() is None for writer in writers):
            time.sleep(0.001)  # until one has begun to write
        time.sleep(rng.uniform(0, 0.5))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL) if writer.poll() is None else None
        died = sum(writer.wait() == -signal.SIGKILL for writer in writers)
        left = len(list((folder / "aside").iterdir()))
        stale += left
        found = entries(folder)
        wrong = [key for key, content in found.items() if reference.get(key) != content]
        print(
            f"kill {kill + 1}: {died} writers died, {left} files aside, {len(found)} of {options.scans} scans, wrong: {wrong}"
        )
        assert not wrong
    last = start(folder, options.scans, -1 % 1000)
    assert last.wait() == 0
    assert entries(folder) == reference
    others = [path for path in folder.rglob("*") if path.is_file() and path.name not in reference]
    assert not others, others
    store = Store(folder)
    for i in range(options.scans):
        values = scan(i)
        assert (store.open(store_key(str(i))).crop((slice(None),) * 4) == values).all()
    print(f"the next run completed: {options.scans} scans equal the reference; of {stale} stale files none is left")
    return None


if __name__ == "__main__":
    main()
