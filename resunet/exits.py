"""From an exception to an exit code and one message; what every entry point ends with."""

import os
import sys
from collections.abc import Callable, Sequence

from resunet.errors import ResUNetError


def exit_code_of(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    """Run a command, which may return an exit code of its own.

    A `ResUNetError` becomes its message on standard error (from rank 0 only) and its exit code. Anything else is a bug
    of ours and shows its traceback.
    """
    try:
        return command(arguments) or 0
    except ResUNetError as error:
        if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate launch
            print(f"resunet: {error}", file=sys.stderr, flush=True)
        return error.exit_code
