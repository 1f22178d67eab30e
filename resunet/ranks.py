"""Work that several ranks divide: each reads its share, all get the whole, and what fails on one fails on all."""

from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from resunet.errors import InputError, ResUNetError
from resunet.progress import progress
from resunet.runs import disk_faults
from resunet.training import any_rank

T = TypeVar("T")


def on_every_rank(work: Callable[[], T], accelerator: Accelerator) -> T:
    """What this rank's `work`, in which ranks do not meet, gives.

    Raises:
        ResUNetError: of the first rank where it failed, on all of them. Rank 0 tells the user, and nobody waits for a rank
            that has left.
    """
    error: ResUNetError | None = None
    try:
        result = work()
    except ResUNetError as failed:
        error = failed
    if any_rank(error is not None, accelerator):
        errors = [error] if accelerator.num_processes == 1 else gather_object([error])
        first = next(one for one in errors if one is not None)
        first.known_to_all = True
        raise first
    return result


def by_main_rank(work: Callable[[], object], folder: Path, accelerator: Accelerator) -> None:
    """What only the main rank does: write to the run directory. All ranks call it.

    Raises:
        ResUNetError: what `work` raises, and what the disk refuses, on every rank.
    """

    def mine() -> None:
        if accelerator.is_main_process:
            with disk_faults(folder):
                work()

    on_every_rank(mine, accelerator)


def refuse_other_steps(first: int, folder: Path, accelerator: Accelerator) -> None:
    """Ranks read the last checkpoint each for themselves: all must have found the same.

    Raises:
        InputError: they did not, on every rank.
    """
    if accelerator.num_processes == 1:
        return
    steps = gather_object([first])
    if len(set(steps)) > 1:
        raise other_folder(folder, f": they continue after steps {', '.join(map(str, steps))}")


def other_folder(folder: Path, seen: str = "") -> InputError:
    """What to say where ranks do not see one run directory."""
    return InputError(
        f"out={folder}: is not the same folder for all ranks{seen}. Put it on a disk that all machines share, under one path."
    )


def in_shares(work: Callable[[range], Iterator[T]], count: int, label: str, accelerator: Accelerator) -> list[T]:
    """The results for 0 … count − 1, of which each rank works out its share.

    Args:
        work: the results for some of them, in their order.

    Raises:
        ResUNetError: see `on_every_rank`.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = range(rank, count, ranks)
    quiet = not accelerator.is_main_process
    mine = on_every_rank(lambda: list(progress(work(share), len(share), label, quiet=quiet)), accelerator)
    if ranks == 1:
        return mine
    return [one for _, one in sorted(gather_object(list(zip(share, mine, strict=True))), key=itemgetter(0))]
