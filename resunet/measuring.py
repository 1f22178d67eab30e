"""What work costs on this machine: seconds, memory, and what else it was doing meanwhile."""

import os
import resource
import sys
import time
from collections.abc import Callable

import torch

GIB = 2**30
ENOUGH_SECONDS = 20.0  # of measured steps: fewer of them where one takes long
BUSY = 1.25  # load for each core


def timed(action: Callable[[], object]) -> float:
    """Seconds, work on a GPU included."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process at its peak on a CPU, its data included; of the device's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident(resource.RUSAGE_SELF)


def peak_memory_of_workers() -> int:
    """Bytes that the largest process of those held that this one has started and that have ended; 0 for none."""
    return _resident(resource.RUSAGE_CHILDREN)


def load() -> float:
    """Processes that want a core, this one's threads among them, for each core there is."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _resident(whose: int) -> int:
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
