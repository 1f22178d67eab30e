"""From an exception to an exit code and one message; what every entry point ends with."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

from resunet.errors import EnvironmentFault, ResUNetError

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT})


def exit_code_of(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    """Run a command, which may return an exit code of its own, and leave the other ranks in order.

    A `ResUNetError` becomes its message on standard error (from rank 0 only) and its exit code; so do a disk that
    refuses and memory that runs out. Anything else is a bug of ours and shows its traceback.
    """
    try:
        return _exit_code(command, arguments)
    finally:
        _leave_ranks()


def _exit_code(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    try:
        return command(arguments) or 0
    except ResUNetError as error:
        return _tell(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _tell(EnvironmentFault(f"{error.filename or 'the disk'}: {error.strerror}. Free space, or name another folder."))
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; by name, so that torch need not be imported to find out
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return _tell(EnvironmentFault("memory ran out. Set a smaller batch, patch or views.size, or more accumulate."))


def is_main_rank() -> bool:
    """Whether this process speaks for all; torchrun and accelerate launch set RANK."""
    return os.environ.get("RANK", "0") == "0"


def _leave_ranks() -> None:
    """A process that ends with its group's threads still running may be aborted, and its exit code lost."""
    distributed = sys.modules.get("torch.distributed")  # only who has joined ranks has imported it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _tell(error: ResUNetError) -> int:
    if is_main_rank():
        print(f"resunet: {error}", file=sys.stderr, flush=True)
    return error.exit_code
