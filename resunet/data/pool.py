"""Work on untrusted files in processes with a limit of time and memory: what brings a reader down costs its file only."""

import contextlib
import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import TimeoutError as TaskTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import psutil
import threadpoolctl
from pebble import ProcessExpired, ProcessPool

from resunet.errors import EnvironmentFault, InputError

Item = TypeVar("Item")
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
    """One item's result, or why there is none."""

    item: Item
    result: Result | None
    fault: Fault | None = None


def guarded_map(
    steps: Sequence[Callable[[Any], Any]],
    chunks: Sequence[Sequence[Item]],
    workers: int,
    limits: Limits,
) -> Generator[list[Outcome[Item, Any]], None, None]:
    """`steps`, each applied to what the one before gave, for every item of every chunk; chunks as they end, in no particular order.

    A chunk whose worker dies or takes too long is done again item by item, so that only the item at fault is lost. The items of
    a chunk take each step together: small ones are a quarter faster where code and tables stay in the cache.

    Raises:
        EnvironmentFault: workers cannot be started, or die without work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resunet.data.describe"])
    waiting = deque(chunks)
    alone: deque[Sequence[Item]] = deque()
    with ProcessPool(workers, _RESTART, _prepare_worker, (limits,), context) as pool:
        try:
            running: dict[Any, Sequence[Item]] = {}
            while waiting or alone or running:
                while (waiting or alone) and len(running) < _AHEAD * workers:
                    chunk = alone.popleft() if alone else waiting.popleft()
                    running[pool.schedule(_work, (tuple(steps), chunk, limits), timeout=limits.seconds)] = chunk
                done = _first_done(running)
                chunk = running.pop(done)
                if _was_stopped(done):
                    waiting.appendleft(chunk)
                    continue
                fault = _fault_of(done, limits)
                if fault is None:
                    yield [Outcome(item, *found) for item, found in zip(chunk, done.result(), strict=True)]
                elif len(chunk) > 1:
                    alone.extend([item] for item in chunk)
                else:
                    yield [Outcome(chunk[0], None, fault)]
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


def _fault_of(future: Any, limits: Limits) -> Fault | None:
    """Why a chunk as a whole gave nothing; None where it did."""
    error = future.exception()
    if error is None:
        return None
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


def _work(steps: Sequence[Callable[[Any], Any]], chunk: Sequence[Any], limits: Limits) -> list[tuple[Any, Fault | None]]:
    done: list[tuple[Any, Fault | None]] = [(item, None) for item in chunk]
    for step in steps:
        done = [one if one[1] is not None else _one(step, one[0], limits) for one in done]
    return done


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
