"""What a person at the terminal sees of long work. Imports no torch."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

from resunet.plain import duration

T = TypeVar("T")
_SILENCE = 600  # seconds


def say(message: str) -> None:
    """A line for the person at the terminal; standard output is kept for results."""
    print(message, file=sys.stderr, flush=True)


def progress(
    items: Iterable[T],
    total: int,
    label: str,
    start: int = 0,
    quiet: bool = False,
    figures: Mapping[str, float] | None = None,
) -> Iterator[T]:
    """A progress bar on a terminal; in a log a plain line at each tenth of the work, and after ten minutes without one.

    `figures` are shown beside it as they are at the time; the caller goes on changing them.
    """

    def shown() -> str:
        return " ".join(f"{name} {value:.3g}" for name, value in (figures or {}).items())

    if quiet:
        yield from items
    elif sys.stderr.isatty():
        with tqdm(total=total, initial=start, desc=label, dynamic_ncols=True, leave=False) as bar:
            for item in items:
                yield item
                bar.set_postfix_str(shown(), refresh=False)
                bar.update()
    else:
        tenth = max(1, total // 10)
        began = told = time.monotonic()
        for done, item in enumerate(items, start + 1):
            yield item
            now = time.monotonic()
            if done % tenth == 0 or done == total or now - told > _SILENCE:
                rest = (now - began) / (done - start) * (total - done)
                left = f", about {duration(rest)} left" if rest > _SILENCE else ""
                say(f"{label} {done}/{total} {shown()}".rstrip() + left)
                told = now
