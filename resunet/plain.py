"""Plain text for a terminal: headed blocks, tables, bullets, counts, durations, sizes."""

import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH = 110


def blocks(parts: Sequence[tuple[str, str]]) -> str:
    """Headings, underlined, each over its body."""
    return "\n\n".join(f"{heading}\n{'-' * len(heading)}\n{body}" for heading, body in parts)


def bullet(mark: str, text: str) -> str:
    """A wrapped paragraph; lines after the first stay as they are."""
    first, *rest = text.split("\n")
    return "\n".join([*textwrap.wrap(first, WIDTH, initial_indent=f"{mark} ", subsequent_indent="  "), *rest])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def duration(seconds: float) -> str:
    """Such as '3.2 s', '12 min', '2.5 h'."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def number_of(count: int, noun: str) -> str:
    """Such as '1 file', '12,000 files'; of a noun whose plural ends in s."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def times(values: Sequence[float] | NDArray) -> str:
    """Such as '128 × 96'."""
    return " × ".join(f"{value:.4g}" for value in values)


def value_range(values: NDArray) -> str:
    """Of some rows, what each column goes from and to, to be put behind their median."""
    low, high = values.min(axis=0), values.max(axis=0)
    return f", all the same: {times(low)}" if np.allclose(low, high) else f", from {times(low)} to {times(high)}"
