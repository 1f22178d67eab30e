"""One of two ranks, in which things fail on one only; started by test_ranks.py. FOLDER/rank-R.json: what each saw."""

import errno
import json
import sys
from pathlib import Path

from accelerate import Accelerator

from resunet.errors import EnvironmentFault, ResUNetError
from resunet.exits import exit_code_of
from resunet.ranks import by_main_rank, refuse_other_steps
from resunet.training import any_rank


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def main(arguments: list[str]) -> None:
    folder, accelerator = Path(arguments[0]), Accelerator(cpu=True)
    rank, seen = accelerator.process_index, []
    by_main_rank(lambda: (folder / f"written-by-{rank}").touch(), folder, accelerator)
    refuse_other_steps(3, folder, accelerator)
    for work in (
        lambda: by_main_rank(full_disk, folder, accelerator),
        lambda: refuse_other_steps(3 * rank, folder, accelerator),
    ):
        try:
            work()
        except ResUNetError as error:
            seen.append([type(error).__name__, str(error), error.known_to_all])
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    if rank == 1:
        raise EnvironmentFault("a fault of its machine")
    any_rank(False, accelerator)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
