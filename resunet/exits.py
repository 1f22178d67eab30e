"""From an exception to an exit code and one message; what every entry point ends with."""

import errno
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from resunet.errors import EnvironmentFault, ResUNetError, Stopped

# What gloo, NCCL and the store say of a rank that is no longer there.
_LOST = re.compile(
    r"[Cc]onnection (was )?(closed|reset) by|remote process (exited|has)|Broken pipe|NCCL communicator was aborted"
)
_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT}
    | {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
)

_NO_MEMORY = (
    "memory ran out. Set a smaller batch and, in fine-tuning, more accumulate for it or a smaller patch; in pretraining, where the "
    "batch is what is contrasted, cache_chunk or a smaller views.size."
)


def exit_code_of(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    """Run a command, which may return an exit code of its own, and leave the other ranks in order.

    A `ResUNetError` becomes its message on standard error and its exit code; so do a disk that refuses, memory that runs out and a
    rank that is lost. Rank 0 speaks for all; another rank only of a fault of its own machine, which rank 0 cannot know of. Anything
    else is a bug of ours and shows its traceback.
    """
    main = is_main_rank()  # a command may turn ranks into workers of their own
    try:
        with stopped_by_sigterm("what takes resume=true goes on with it"):
            return _exit_code(command, arguments, main)
    finally:
        _leave_ranks()


@contextmanager
def stopped_by_sigterm(then: str) -> Iterator[None]:
    """SIGTERM raises Stopped where it arrives, with what to do then; a training's loop takes it over, to save first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = os.getpid()

    def stop(signum: int, frame: types.FrameType | None) -> None:
        if os.getpid() != ours:  # a child that was forked; it has nothing to tell
            os._exit(128 + signum)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped(f"stopped by SIGTERM; {then}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str], main: bool) -> int:
    try:
        return command(arguments) or 0
    except ResUNetError as error:
        return _tell(error, main)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _tell(
            EnvironmentFault(f"{error.filename or 'the disk'}: {error.strerror}. Free space, or name another folder."), main
        )
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; by name, so that torch need not be imported to find out
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return _tell(EnvironmentFault(_NO_MEMORY), main)
        if not _has_ranks() or not _LOST.search(str(error)):
            raise
        lost = EnvironmentFault(
            "another rank has left. Its own message, or its machine's log, says why; resume=true continues."
        )
        lost.known_to_all = True
        return _tell(lost, main)


def is_main_rank() -> bool:
    """Whether this process speaks for all; torchrun and accelerate launch set RANK."""
    return os.environ.get("RANK", "0") == "0"


def _leave_ranks() -> None:
    """A process that ends with its group's threads still running may be aborted, and its exit code lost."""
    if _has_ranks():
        sys.modules["torch.distributed"].destroy_process_group()


def _has_ranks() -> bool:
    distributed = sys.modules.get("torch.distributed")  # only who has joined ranks has imported it
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _tell(error: ResUNetError, main: bool) -> int:
    own = isinstance(error, EnvironmentFault) and _has_ranks()
    if main or (is_main_rank() and not error.known_to_all):
        print(f"resunet: {error}", file=sys.stderr, flush=True)
    elif own and not error.known_to_all:
        print(f"resunet: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
    return error.exit_code
