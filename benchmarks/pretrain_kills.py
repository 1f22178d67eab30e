"""Pretrainings killed at random steps: resumed, they end as one that nobody disturbed, bit by bit, in one process and in two.

    python -m benchmarks.pretrain_kills [--steps 40] [--kills 20] [--processes 1 2] [--variants …] [--seed 0]

On simulated patients, in variants: plain NT-Xent with batch norm, a memory bank, cached gradients (GradCache) with the loss that
knows patients and positions, a probe that chooses the checkpoint, and dense contrast of volumes. Each round starts a run of its
own, waits until it has logged a random step, and some milliseconds more, and ends it: SIGKILL to all its processes at once, SIGKILL
to one rank, or SIGTERM. It sees that no process outlives that, resumes the run, and compares metrics, gradients, model and the
tensors of the checkpoint (network, optimiser, memory bank) with the undisturbed run's. A last round of each variant is killed again
and again, then completed. Prints one line a round. The processes are forked from this one, which has imported everything: starting
anew takes ten times as long as training.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.finetune_kills import differing
from pretrain.__main__ import main as pretrain_main
from resunet.data.phantom import PhantomConfig, write_phantom
from resunet.exits import exit_code_of

SMALL = [
    *("batch=16", "views.size=32", "model.channels=[4,8,16]", "head={hidden: 16, output: 8, batch_norm: false}"),
    *("precision=fp32", "wandb.mode=disabled", "checkpoint_every=3", "log_every=1", "accumulate=2", "data.workers=1"),
]
VARIANTS = {
    "batch norm": ["head.batch_norm=true"],
    "memory bank": ["model.norm=group", "objective.memory_bank=32"],
    "cached gradients": [
        *("model.norm=group", "cache_chunk=5", "objective={same_group: ignore, position_threshold: 0.1}"),
    ],
    "probe": ["model.norm=group", "probe={classes: {0: background, 1: lesion}, groups: 2, every: 4, choose: best}"],
    "dense volumes": [
        *("batch=4", "model={channels: [4, 8, 16], norm: group, spatial_dims: 3}", "views={size: 16, window: 32}"),
        "dense={points: 8, pairs: 32}",
    ],
}
_WAYS = {1: ("SIGKILL", "SIGKILL", "SIGTERM"), 2: ("SIGKILL", "SIGKILL to one rank", "SIGKILL", "SIGTERM")}
# What says when and how long a run was, and nothing of what came out.
_OF_ITS_OWN = {"run.json", "report.html", "state.pt", "config.json"}
_PATIENCE = 600  # seconds
_LATER = 0.1  # seconds after a step was logged, at most


class Sweep:
    """The runs of one variant and number of processes, and what an undisturbed one leaves."""

    def __init__(self, root: Path, source: Path, variant: str, processes: int, steps: int) -> None:
        self.root = root / f"{variant.replace(' ', '-')}-{processes}"
        self.root.mkdir()
        self.processes, self.steps = processes, steps
        self._keys = [f"data.source={source}", f"data.store={root / 'store'}", f"steps={steps}", f"processes={processes}"]
        self._keys += ["resume=true", *SMALL, *VARIANTS[variant]]
        self.expected = self.undisturbed("undisturbed")
        names = differing(self.undisturbed("again"), self.expected)
        assert not names, f"two undisturbed runs differ: {names}"

    def undisturbed(self, name: str) -> dict[str, Any]:
        self.finish(self.root / name)
        return result(self.root / name)

    def start(self, out: Path) -> list[int]:
        """`python -m pretrain` on every rank, resuming what is there; the ids of the processes, which lead groups of their own."""
        port, ranks = free_port(), range(self.processes)
        return [self._fork(out, rank, port) for rank in ranks]

    def _fork(self, out: Path, rank: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setpgid(0, 0)
            torch.set_num_threads(1)  # here first: threads that race for torch's pool after a fork find none
            os.dup2(os.open(said_by(out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
            if self.processes > 1:  # what torchrun sets
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with contextlib.redirect_stdout(None):
                code = exit_code_of(pretrain_main, ["demo", f"out={out}", *self._keys])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def finish(self, out: Path) -> None:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.start(out)]
        if any(codes):
            raise SystemExit(f"exit codes {codes}: {said_by(out, 0).read_text(encoding='utf-8')}")

    def round(self, out: Path, kills: int, way: str, rng: random.Random) -> tuple[bool, str]:
        """One run disturbed so many times, then completed: whether it is the undisturbed one, and what happened."""
        said, left, first = [], 0, 0
        for _ in range(kills):
            step = rng.randrange(first + 1, self.steps)
            ranks = self.start(out)
            running = wait_for(ranks, out, step)
            time.sleep(rng.uniform(0, _LATER))
            left += disturb(ranks, way, rng)
            last = out / "checkpoints" / "last"
            first = int(last.readlink().name.removeprefix("step-")) if last.is_symlink() else 0
            reached = logged(out)
            said.append(f"{way} at step {reached} (saved: {first})" if running else "it had ended before")
            if first >= self.steps - 2:
                break
        self.finish(out)
        names = differing(result(out), self.expected)
        verdict = f"DIFFERENT: {names}" if names else "equal"
        return not names and not left, f"{', '.join(said)}; processes left: {left}; {verdict}"


def logged(out: Path) -> int:
    """How many steps stand in the log."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(ranks: Sequence[int], out: Path, step: int) -> bool:
    """Until the run has logged a step; False if it ended before.

    A resumed run drops the lines it is to write again, so that a line of its own is waited for.
    """
    until, started = time.monotonic() + _PATIENCE, time.time()
    path, first = out / "metrics.jsonl", psutil.Process(ranks[0])
    while time.monotonic() < until:
        if path.exists() and path.stat().st_mtime > started and logged(out) >= step:
            return True
        if first.status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.001)
    raise SystemExit(f"{out}: step {step} was not reached in {_PATIENCE} s")


def disturb(ranks: Sequence[int], how: str, rng: random.Random) -> int:
    """End a run; how many of its processes, the workers that read included, are there half a minute after."""
    family = [one for pid in ranks for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    victims = {"SIGKILL": family, "SIGKILL to one rank": [psutil.Process(rng.choice(ranks))]}.get(how, [family[0]])
    for one in victims:
        try:
            one.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue  # it ended by itself, or with the one before
    _, alive = psutil.wait_procs(family, timeout=30)
    for one in alive:
        one.kill()
    for pid in ranks:
        with contextlib.suppress(ChildProcessError):  # psutil has waited for it
            os.waitpid(pid, 0)
    return len(alive)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def said_by(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank{rank}.txt")


def result(out: Path) -> dict[str, Any]:
    """All that a run leaves, by name: files as bytes, the checkpoint as tensors."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in _OF_ITS_OWN]
    left: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in files}
    state = torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True)
    for name in ("seconds", "cpu_seconds"):
        state.pop(name)
    left["checkpoints/last"] = state
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20, help="rounds for each number of processes, over the variants")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import pretrain.loop  # noqa: F401  before any fork

    rng = random.Random(options.seed)
    failed = rounds = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = write_phantom(root / "data", PhantomConfig(pool=6, val=2, test=2, spacing_mm=(4, 4, 8)))
        for processes in options.processes:
            sweeps = {variant: Sweep(root, source, variant, processes, options.steps) for variant in options.variants}
            print(f"{processes} processes, {options.steps} steps; undisturbed runs are the same twice", flush=True)
            turns = [(name, 1) for name, _ in zip(options.variants * options.kills, range(options.kills), strict=False)]
            turns += [(name, 4) for name in options.variants]
            for number, (name, kills) in enumerate(turns):
                way = "SIGKILL" if kills > 1 else _WAYS[processes][number // len(options.variants) % len(_WAYS[processes])]
                passed, said = sweeps[name].round(sweeps[name].root / str(number), kills, way, rng)
                failed, rounds = failed + (not passed), rounds + 1
                print(f"  {name}: {said}", flush=True)
    print(f"{rounds} rounds, {failed} failed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
