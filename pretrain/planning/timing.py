"""What a pretraining step costs on this machine, from a few of them: the real network, loss, optimiser and reading processes."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from pretrain.archive import Archive
from pretrain.loader import ContrastiveSet, ContrastiveSets, reading
from pretrain.network import build_network, build_optimizer
from pretrain.objective import build_loss, loss_state
from pretrain.probe.probe import Probe
from pretrain.recipe import PretrainRecipe
from pretrain.step import add_gradients, gradient_norm
from resunet.measuring import ENOUGH_SECONDS, load, peak_memory, peak_memory_of_workers, timed
from resunet.training import training_state

_STEPS = 5


@dataclass(frozen=True)
class Cost:
    """What was measured of a rank.

    step: seconds of one, the median; the first is left out, as it allocates.
    waited: seconds of it in which the network had nothing to do but wait for scans.
    read: seconds that one process takes to read a rank's share of a set.
    memory, worker_memory: bytes at their peaks; of a process that reads, what it shares with the rank included.
    parameters: of the encoder, and of all else: heads, and with dense a decoder.
    checkpoint: bytes.
    busy: see `resunet.measuring.load`.
    own_group: how many others of a rank's share are of a scan's own group, on average.
    look: seconds of one look of the probe, without one 0.
    """

    step: float
    waited: float
    steps_measured: int
    read: float
    memory: int
    worker_memory: int
    parameters: tuple[int, int]
    checkpoint: int
    device: str
    busy: float
    own_group: float
    look: float


class _Watched:
    """A reader whose consumer's waiting is measured, and whose sets are remembered by their scans."""

    def __init__(self, reader: Iterator[ContrastiveSet]) -> None:
        self._reader = reader
        self.waited = 0.0
        self.scans: list[np.ndarray] = []

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> ContrastiveSet:
        started = time.perf_counter()
        one = next(self._reader)
        self.waited += time.perf_counter() - started
        self.scans.append(one.scan.numpy())
        return one


class _Counter:
    """Takes what is written to it, and only counts."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: bytes) -> int:
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        """There is nothing to do."""


def measure_cost(recipe: PretrainRecipe, archive: Archive, accelerator: Accelerator, probe: Probe) -> Cost:
    """Take a few steps of a fresh network, which is thrown away.

    Args:
        recipe: of one process, with a rank's share as its batch.
    """
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(recipe.seed)
    network = build_network(recipe, accelerator)
    optimizer = build_optimizer(recipe, network)
    criterion = build_loss(recipe.objective, recipe.temperature, recipe.head.output).to(device)
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    sets = ContrastiveSets(archive.scans, recipe, 0)
    read = min(timed(lambda: sets.read(0)), timed(lambda: sets.read(1)))
    # what the processes have ready when the first step ends would hide that they are slower than the network
    ahead = 2 * recipe.data.workers // recipe.accumulate
    indices = range((1 + ahead + _STEPS) * recipe.accumulate)
    seconds: list[float] = []
    waited: list[float] = []
    with reading(sets, indices, recipe.data.workers, pin=device.type == "cuda") as reader:
        watched = _Watched(reader)

        def take(step: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            add_gradients(recipe, archive, watched, step, wrapped, criterion, accelerator)
            gradient_norm(network, optimizer, accelerator)
            optimizer.step()

        for step in range(1 + ahead + _STEPS):
            before = watched.waited
            took = timed(lambda: take(step))  # noqa: B023  called at once
            if step:
                seconds.append(took)
                waited.append(watched.waited - before)
            if sum(seconds) > ENOUGH_SECONDS:
                break
    look = timed(lambda: probe.judge(network.encoder)) if probe.looks else 0.0
    written = _Counter()
    torch.save(training_state(1, network, optimizer, accelerator) | {"loss": loss_state(criterion)}, written)  # type: ignore[arg-type]
    last = slice(-_STEPS, None)
    return Cost(
        step=float(np.median(seconds[last])),
        waited=float(np.median(waited[last])),
        steps_measured=len(seconds[last]),
        read=read,
        memory=peak_memory(device),
        worker_memory=peak_memory_of_workers() if recipe.data.workers else 0,
        parameters=(_count(network.encoder), _count(network) - _count(network.encoder)),
        checkpoint=written.count,
        device=device.type,
        busy=load(),
        own_group=_own_group(archive, watched.scans),
        look=look,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(math.prod(one.shape) for one in module.parameters())


def _own_group(archive: Archive, sets: list[np.ndarray]) -> float:
    """The mean over scans of how many others in their set are of their group."""
    others = []
    for scans in sets:
        _, place, counts = np.unique(archive.groups[scans], return_inverse=True, return_counts=True)
        others.append(counts[place] - 1)
    return float(np.concatenate(others).mean())
