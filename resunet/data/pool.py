"""Work on untrusted files in processes with a limit of time and memory: what brings a reader down costs its file only."""

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import TimeoutError as TaskTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, Generic, TypeVar

import psutil
import threadpoolctl
from pebble import ProcessExpired, ProcessPool

from resunet.errors import EnvironmentFault, InputError

Item = TypeVar("Item")
Passed = TypeVar("Passed")
Result = TypeVar("Result")

_AHEAD = 3  # chunks waiting for each worker
_RESTART = 2000  # chunks a worker lives: what native readers leak goes with it
_PR_SET_PDEATHSIG = 1  # prctl(2)
# Permissions and disks: another day the file may be read.
_OUTSIDE = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN})


@dataclass(frozen=True)
class Limits:
    """What one item may cost. seconds: of time; gib: of memory beyond what a worker needs anyway."""

    seconds: float = 120.0
    gib: float = 4.0

    def __str__(self) -> str:
        return f"{self.seconds:g} s, {self.gib:g} GiB"


@dataclass(frozen=True)
class Fault:
    """Why there is no result.

    under: None where the item itself is at fault; the limits where others might let it pass; "" where it may pass at any time,
        as a file whose permissions are corrected.
    """

    reason: str
    under: str | None = None


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of a chunk. items: those that passed, in order; result: what was gathered of them; faults: of the others."""

    items: list[Item]
    result: Result | None
    faults: list[tuple[Item, Fault]]


def start_early() -> None:
    """Start the process that workers are forked from; it imports the readers while the caller goes on with something else."""
    forkserver.set_forkserver_preload(["resunet.data.describe"])
    forkserver.ensure_running()


def guarded_map(
    step: Callable[[Item], Passed],
    gather: Callable[[Iterator[Passed]], Result],
    chunks: Sequence[Sequence[Item]],
    workers: int,
    limits: Limits,
) -> Generator[Outcome[Item, Result], None, None]:
    """`gather` of what `step` gives for every item of a chunk; chunks as they end, in no particular order.

    An item at which `step` raises has a fault and does not get to `gather`, which takes the others one by one. A chunk whose
    worker dies or takes too long, or whose `gather` raises, is done again item by item, so that only the item at fault is lost.

    Raises:
        EnvironmentFault: workers cannot be started, or die without work.
    """
    start_early()
    waiting = deque(chunks)
    alone: deque[Sequence[Item]] = deque()
    context = multiprocessing.get_context("forkserver")
    with ProcessPool(workers, _RESTART, _prepare_worker, (limits,), context) as pool:
        try:
            running: dict[Any, Sequence[Item]] = {}
            while waiting or alone or running:
                while (waiting or alone) and len(running) < _AHEAD * workers:
                    chunk = alone.popleft() if alone else waiting.popleft()
                    running[pool.schedule(_work, (step, gather, chunk, limits), timeout=limits.seconds)] = chunk
                done = _first_done(running)
                chunk = running.pop(done)
                if _was_stopped(done):
                    waiting.appendleft(chunk)
                    continue
                result, fault, faults = (None, _fault_of(done, limits), {}) if done.exception() else done.result()
                if fault is None:
                    passed = [item for place, item in enumerate(chunk) if place not in faults]
                    yield Outcome(passed, result, [(chunk[place], its) for place, its in faults.items()])
                elif len(chunk) > 1:
                    alone.extend([item] for item in chunk)
                else:
                    yield Outcome([], None, [(chunk[0], fault)])
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "the reading processes end before they read anything. Is memory short? Give fewer --workers, or more --memory."
            ) from error
        finally:
            pool.stop()


def _first_done(running: dict[Any, Any]) -> Any:
    return next(iter(wait(running, return_when=FIRST_COMPLETED).done))


def _was_stopped(future: Any) -> bool:
    """Whether somebody ended the worker: no file does that."""
    error = future.exception()
    return isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGTERM


def _fault_of(future: Any, limits: Limits) -> Fault:
    """Why a chunk as a whole gave nothing."""
    error = future.exception()
    if isinstance(error, TaskTimeout):
        return Fault(f"reading it took longer than {limits.seconds:g} s", str(limits))
    if isinstance(error, ProcessExpired):
        return Fault(f"reading it brought the reader down ({_signal_name(error.exitcode)})", str(limits))
    if isinstance(error, MemoryError):
        return _memory_fault(limits)
    raise error


def _memory_fault(limits: Limits) -> Fault:
    return Fault(f"reading it needs more than {limits.gib:g} GiB", str(limits))


def _signal_name(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def _prepare_worker(limits: Limits) -> None:
    """In a worker, before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, also from inside a native call
    _end_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # codecs written in C print what they think of a file
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # a worker is a core
    threadpoolctl.threadpool_limits(1)
    gc.freeze()  # what was imported stays: no collection looks through it again
    limit = psutil.Process().memory_info().vms + int(limits.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_parent() -> None:
    """No worker outlives a parent that was killed, not even one that a native call holds for ever.

    Elsewhere than on Linux a native call that does not let Python run holds it until it returns.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # sent when the fork server ends, which ends with the parent
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(
    step: Callable[[Item], Passed], gather: Callable[[Iterator[Passed]], Result], chunk: Sequence[Item], limits: Limits
) -> tuple[Result | None, Fault | None, dict[int, Fault]]:
    """What was gathered, or why it was not; and the faults of items, by their place."""
    faults: dict[int, Fault] = {}

    def passed() -> Iterator[Passed]:
        for place, item in enumerate(chunk):
            found, fault = _one(step, item, limits)
            if fault is not None:
                faults[place] = fault
            else:
                yield found

    result, fault = _one(gather, passed(), limits)
    return result, fault, faults


def _one(function: Callable[[Any], Any], item: Any, limits: Limits) -> tuple[Any, Fault | None]:
    try:
        return function(item), None
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError):
            return None, _memory_fault(limits)
        outside = isinstance(cause, OSError) and cause.errno in _OUTSIDE
        return None, Fault(str(error), "" if outside else None)
    except MemoryError:
        return None, _memory_fault(limits)
    except Exception as error:  # a reader's own error types are many; none may stop an index
        return None, Fault(f"reading it failed unexpectedly: {type(error).__name__}")
