"""An index killed at random moments: the next run completes it, and the result equals that of an index nobody disturbed.

    python -m benchmarks.index_kills SOURCE [--files 400] [--kills 10] [--seed 0]

SOURCE is a folder of scans; up to `files` of them are copied, evenly over the sorted paths. Each round starts an index of its
own, kills the parent with SIGKILL at a random moment of the time that the undisturbed index took, sees that no worker outlives
it, lets a second run complete and compares every file byte by byte. A last index is killed ten times in a row, then completed.
Prints one line a round.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SALT = "5a" * 32


def copy_some(source: Path, to: Path, count: int) -> int:
    """Files evenly over a tree, with their folders; how many there are."""
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != "splits.json")  # would miss some
    chosen = files[:: max(1, -(-len(files) // count))]
    for path in chosen:
        (to / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to / path.relative_to(source))
    return len(chosen)


def start(archive: Path, out: Path) -> subprocess.Popen[bytes]:
    """`resunet index` in a session of its own."""
    out.parent.mkdir(exist_ok=True)
    command = ["index", str(archive), "--out", str(out), "--workers", "2", "--salt-file", str(archive.parent / "salt")]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-P", "-m", "resunet", *command], stdout=pipe, stderr=pipe, start_new_session=True)


def finish(archive: Path, out: Path) -> tuple[dict[str, bytes], float, str]:
    """Run an index to its end: its files, seconds, and what it said first."""
    began = time.monotonic()
    process = start(archive, out)
    _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"exit code {process.returncode}: {said.decode()}")
    files = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    return files, time.monotonic() - began, said.decode().splitlines()[0]


def kill_at(archive: Path, out: Path, seconds: float) -> tuple[bool, int]:
    """Start an index and kill it after some time; whether it was still running, and how many of its processes outlive it."""
    process = start(archive, out)
    time.sleep(seconds)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running, outliving(process.pid)


def outliving(session: int) -> int:
    """Processes of a session that are there two seconds after it should have ended."""
    deadline = time.monotonic() + 2
    while True:
        alive = sum(1 for pid in psutil.pids() if session_of(pid) == session)
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.02)


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "salt").write_text(SALT)
        archive = root / "archive"
        files = copy_some(options.source, archive, options.files)
        expected, seconds, _ = finish(archive, root / "undisturbed" / "m.parquet")
        again, other, _ = finish(archive, root / "again" / "m.parquet")
        assert again == expected
        seconds = min(seconds, other)  # so that most kills hit
        print(f"{files} files, {seconds:.1f} s undisturbed, {len(expected)} files written", flush=True)
        for number in range(options.kills + 1):
            out = root / str(number) / "m.parquet"
            last = number == options.kills
            moments = [rng.uniform(0.2, seconds) for _ in range(options.kills if last else 1)]
            killed = [kill_at(archive, out, moment) for moment in moments]
            left = sum(alive for _, alive in killed)
            found, _, said = finish(archive, out)
            differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            failed += bool(differing or left)
            when = ", ".join(f"{moment:.2f}" for moment in moments)
            print(
                f"killed at {when} s ({sum(running for running, _ in killed)} while running), processes left: {left}; {said}; "
                f"{'equal' if not differing else f'DIFFERENT: {differing}'}",
                flush=True,
            )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
