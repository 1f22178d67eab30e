"""Fine-tunings killed at random moments: resumed, they end as one that nobody disturbed, bit by bit, in one process and in two.

    python -m benchmarks.finetune_kills [--steps 30] [--kills 5] [--processes 1 2] [--seed 0]

On simulated patients, with everything switched on that has a state: moving average, deep supervision, precise batch statistics,
accumulation. Each round starts a run of its own and disturbs it at a random moment of the time that an undisturbed one took:
SIGKILL to all its processes, SIGKILL to one rank, or SIGTERM. It sees that no process outlives that, resumes the run, and compares
metrics, gradients, model, evaluation and the tensors of the checkpoints with the undisturbed run's. A last run is killed again and
again, then completed. Prints one line a round.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from resunet.data.phantom import PhantomConfig, write_phantom

EVERYTHING = [
    *(
        "ema=0.9",
        "loss.deep_supervision=true",
        "loss.component_weight=1",
        "model.statistics=precise",
        "model.statistics_batches=4",
    ),
    *("accumulate=2", "batch=4", "patch=[48,48]", "model.channels=[4,8,8,16]", "precision=fp32", "wandb.mode=disabled"),
    *("validate_every=5", "checkpoint_every=3", "log_every=1"),
]
# What says when and how long a run was, and nothing of what came out.
_OF_ITS_OWN = {"run.json", "report.html", "state.pt"}


def start(source: Path, out: Path, steps: int, processes: int) -> subprocess.Popen[bytes]:
    """`finetune` with all its ranks, resuming what is there."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    keys = [f"data.source={source}", f"out={out}", f"steps={steps}", f"processes={processes}", "resume=true", *EVERYTHING]
    # the same number of threads alone and under torchrun, which sets one
    return subprocess.Popen(
        [sys.executable, *(ranks if processes > 1 else []), "-m", "finetune", "demo", *keys],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(source: Path, out: Path, steps: int, processes: int) -> float:
    """Run to the end; seconds."""
    began = time.monotonic()
    said, _ = (process := start(source, out, steps, processes)).communicate()
    if process.returncode != 0:
        raise SystemExit(f"exit code {process.returncode}: {said.decode()}")
    return time.monotonic() - began


def disturb(process: subprocess.Popen[bytes], how: str, rng: random.Random) -> tuple[bool, int]:
    """Whether it was still running, and how many of its processes are there half a minute after."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    running = process.poll() is None
    ranks = [one for one in family if "finetune" in _command(one) and "torch.distributed.run" not in _command(one)]
    victims = {"SIGKILL": family, "SIGKILL to one rank": [rng.choice(ranks or family)], "SIGTERM": family[:1]}[how]
    for one in victims:
        try:
            one.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue  # it ended by itself, or with the one before
    process.communicate()
    _, alive = psutil.wait_procs(family[1:], timeout=30)
    for one in alive:
        one.kill()
    return running, len(alive)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def result(out: Path) -> dict[str, Any]:
    """All that a run leaves, by name: files as bytes, checkpoints as tensors."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file() and path.name not in _OF_ITS_OWN}
    left: dict[str, Any] = {name: path.read_bytes() for name, path in files.items() if name != "config.json"}
    for name in ("last", "best"):
        state = torch.load(out / "checkpoints" / name / "state.pt", weights_only=True)
        for spent in ("seconds", "cpu_seconds"):
            state.pop(spent)
        left[f"checkpoints/{name}"] = state
    return left


def equal(a: Any, b: Any) -> bool:
    """Bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not the same, or is there only once."""
    return sorted(name for name in found.keys() | expected.keys() if not equal(found.get(name), expected.get(name)))


def sweep(root: Path, source: Path, steps: int, processes: int, kills: int, rng: random.Random) -> int:
    """The rounds of one number of processes; how many failed."""
    out = root / f"undisturbed-{processes}"
    seconds = finish(source, out, steps, processes)
    expected = result(out)
    again = root / f"again-{processes}"
    seconds = min(seconds, finish(source, again, steps, processes))
    assert not (names := differing(result(again), expected)), f"two undisturbed runs differ: {names}"
    print(f"{processes} processes: {steps} steps in {seconds:.1f} s undisturbed, {len(expected)} files and states", flush=True)
    ways = ["SIGKILL", "SIGTERM"] if processes == 1 else ["SIGKILL", "SIGKILL to one rank", "SIGTERM"]
    failed = 0
    for number in range(kills + 1):
        out = root / f"{processes}-{number}"
        said, left, hits = [], 0, 0
        for turn in range(kills if number == kills else 1):
            how, moment = ways[(number + turn) % len(ways)], rng.uniform(0.3 * seconds, seconds)  # before, it starts up
            process = start(source, out, steps, processes)
            time.sleep(moment)
            running, alive = disturb(process, how, rng)
            left, hits = left + alive, hits + running
            at = (out / "checkpoints" / "last").readlink().name if (out / "checkpoints" / "last").is_symlink() else "no step"
            said.append(f"{how} at {moment:.1f} s ({at})")
        finish(source, out, steps, processes)
        names = differing(result(out), expected)
        failed += bool(names or left)
        verdict = f"DIFFERENT: {names}" if names else "equal"
        print(f"  {', '.join(said)}; {hits} while running, processes left: {left}; {verdict}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = write_phantom(root / "data", PhantomConfig(pool=3, val=3, test=3, spacing_mm=(4, 4, 8)))
        failed = sum(sweep(root, source, options.steps, number, options.kills, rng) for number in options.processes)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
