"""Pretraining on two network namespaces, which share no loopback, as on two machines, beside one process with the whole batch.

    python -m benchmarks.two_machines [--steps 5] [--loopback]

Two namespaces are joined by a pair of veth devices; in each, `accelerate launch` starts one rank of
configs/accelerate/several_machines.yaml with its own --machine_rank and the other's address. That needs root and iproute2; with
`--loopback` the two are launched side by side and meet on 127.0.0.1. Compares losses and weights.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from resunet.data.phantom import PhantomConfig, write_phantom
from resunet.report import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "accelerate" / "several_machines.yaml"
SMALL = [
    *(
        "batch=16",
        "views.size=32",
        "model={channels: [4, 8, 16], norm: group}",
        "head={hidden: 16, output: 8, batch_norm: false}",
    ),
    *("precision=fp32", "wandb.mode=disabled", "log_every=1", "data.workers=0"),
    "optimizer={name: lars, lr: 0.1}",  # AdamW moves a weight by its rate even where the gradient is rounding only
]
_ADDRESSES = ("10.99.7.1", "10.99.7.2")
_PATIENCE = 600  # seconds


@dataclass(frozen=True)
class Machine:
    """command: what a command begins with, to run there. device: that gloo listens on."""

    command: tuple[str, ...]
    device: str


@contextmanager
def machines() -> Iterator[list[Machine]]:
    """Two namespaces that reach one another at `_ADDRESSES`."""
    first, second = names = (f"resunet{os.getpid()}a", f"resunet{os.getpid()}b")
    devices = [f"veth{os.getpid() % 100000}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", devices[0], "netns", first, "type", "veth", "peer", "name", devices[1], "netns", second)
        for name, device, address in zip(names, devices, _ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            for one in (device, "lo"):
                ip("-n", name, "link", "set", one, "up")
        yield [Machine(("ip", "netns", "exec", name), device) for name, device in zip(names, devices, strict=True)]
    finally:
        for name in names:  # a veth goes with its namespace
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}. This needs root, and a kernel with namespaces.")


def wait(processes: Sequence[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            said, _ = process.communicate(timeout=_PATIENCE)
            if process.returncode:
                raise SystemExit(f"exit code {process.returncode}: {said}")
    finally:
        for process in processes:
            process.kill()


def start(command: Sequence[str], device: str | None = None) -> subprocess.Popen[str]:
    """device: that gloo listens on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": device} if device else {})
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--loopback", action="store_true")
    options = parser.parse_args()
    if not options.loopback and (os.geteuid() or shutil.which("ip") is None):
        raise SystemExit("benchmarks.two_machines: network namespaces need root and iproute2 (ip); or --loopback.")
    here = Machine((), "lo")
    with tempfile.TemporaryDirectory() as scratch, nullcontext([here, here]) if options.loopback else machines() as both:
        root = Path(scratch)
        source = write_phantom(root / "data", PhantomConfig(pool=6, val=2, test=2, spacing_mm=(4, 4, 8)))
        keys = [f"data.source={source}", f"steps={options.steps}", *SMALL]
        alone, joined = root / "alone", root / "joined"
        wait([start([sys.executable, "-m", "pretrain", "demo", f"out={alone}", f"data.store={root / 'store'}", *keys])])
        ranks = []
        address = "127.0.0.1" if options.loopback else _ADDRESSES[0]
        for rank, machine in enumerate(both):
            command = [*machine.command, sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
            command += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", address]
            command += ["-m", "pretrain", "demo", f"out={joined}", "processes=2", f"data.store={root / f'store-{rank}'}", *keys]
            ranks.append(start(command, device=machine.device))
        wait(ranks)
        losses = [read_metrics(out)["loss"][1] for out in (alone, joined)]
        weights = [load_file(out / "model" / "model.safetensors") for out in (alone, joined)]
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
        away = max(float((weights[1][name] - value).abs().max()) for name, value in weights[0].items())
    two = "launches" if options.loopback else "namespaces"
    print(f"two {two} beside one process, {options.steps} steps: losses differ by {apart:.1e} at most, weights by {away:.1e}")
    raise SystemExit(0 if apart < 1e-4 and away < 1e-4 else 1)


if __name__ == "__main__":
    main()
