"""What a source holds, by its owner's own names: files and masks by stem, and who each is of, and where in them (groups.csv).

The names stay here and in splits: what goes into a record is made of them by `resunet.data.source`.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resunet.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One case of a listing.

    files: one file; or, with `file_per_channel`, one a channel in their order.
    part: 'pool', 'val', 'test', or None where the owner did not say.
    spacing: mm in array order, where it stands beside the file and not in it.
    """

    files: tuple[Path, ...]
    mask: Path | None = None
    part: str | None = None
    file_per_channel: bool = False
    spacing: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Listing:
    """A source before anything of it is read.

    entries: by stem.
    groups: stem → patient or item; empty where nobody said.
    open_parts: the parts that have still to be made of the cases without one; none of them where the owner gave a split.
    masked: stems that have a mask, whether or not masks were asked for.
    remarks: what a reader of the results has to know beside groups and splits.
    positions: stem → place of a slice in its volume, 0 to 1, where the owner said.
    """

    entries: Mapping[str, Entry]
    groups: Mapping[str, str]
    open_parts: tuple[str, ...]
    masked: frozenset[str]
    remarks: tuple[str, ...] = ()
    positions: Mapping[str, float] = field(default_factory=dict)


def read_groups(path: Path, stems: Iterable[str] = ()) -> dict[str, str]:
    """groups.csv: stem → group; empty where there is no such file.

    Raises:
        InputError: not UTF-8, other columns, a stem twice or without a group, or one of `stems` without a row.
    """
    if not path.is_file():
        return {}
    rows = _rows(path)
    groups = {row["stem"]: row["group"] for row in rows}
    twice = sorted(stem for stem, count in Counter(row["stem"] for row in rows).items() if count > 1)
    complain(path, "stems that are listed twice", twice, "List each once.")
    complain(path, "images without a row", sorted(set(stems) - set(groups)), "Add a row stem,group for each.")
    empty = sorted(stem for stem, group in groups.items() if not group)
    complain(path, "rows without a group", empty, "Give each its patient or item.")
    return groups


def read_positions(path: Path) -> dict[str, float]:
    """Of groups.csv the column `position`: stem → place of the slice in its volume, 0 for the first and 1 for the last.

    Its numbers are such places, or numbers of slices: all whole, which are then stretched so that the lowest of a group, as the
    file lists it, is 0 and the highest 1. Stems without one are left out, as is the only slice of a group that is numbered;
    so is everything where there is no such column or file.

    Raises:
        InputError: no number, below 0, or numbers of slices among places from 0 to 1.
    """
    if not path.is_file():
        return {}
    rows = [row for row in _rows(path) if (row.get("position") or "").strip()]
    numbers = {row["stem"]: _number(row["position"]) for row in rows}
    broken = sorted(f"{row['stem']} ({row['position']})" for row in rows if not 0 <= numbers[row["stem"]] < math.inf)
    what = "the place of the slice in its volume, from 0 to 1, or its number, from 0 on"
    complain(path, "rows whose position is no number from 0 on", broken, f"Give {what}, or leave it empty.")
    between = sorted(f"{stem} ({number:g})" for stem, number in numbers.items() if number != round(number))
    above = sorted(f"{stem} ({number:g})" for stem, number in numbers.items() if number > 1)
    if between and above:
        raise InputError(
            f"{path}: the column position has numbers of slices, as of {above[0]}, and places between 0 and 1, as of {between[0]}. "
            "It has one of them: give either all slices' whole numbers or all places from 0 to 1."
        )
    return _stretched(rows, numbers) if above else numbers


def _stretched(rows: Sequence[Mapping[str, str]], numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers of slices → from 0 to 1 within their group; groups of one number are left out."""
    of_group: dict[str, list[float]] = {}
    for row in rows:
        of_group.setdefault(row["group"], []).append(numbers[row["stem"]])
    ends = {group: (min(its), max(its)) for group, its in of_group.items()}
    found = {}
    for row in rows:
        low, high = ends[row["group"]]
        if low < high:
            found[row["stem"]] = (numbers[row["stem"]] - low) / (high - low)
    return found


def _number(text: str) -> float:
    """NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        if not {"stem", "group"} <= set(reader.fieldnames or ()):
            raise InputError(f"{path}: the columns are {reader.fieldnames}; it must have stem and group.")
        return list(reader)


def complain(path: Path, what: str, stems: Sequence[str], todo: str) -> None:
    """Raise InputError if there are such stems: their number, the first few, and what to do."""
    if stems:
        shown = ", ".join(stems[:5]) + (", …" if len(stems) > 5 else "")
        raise InputError(f"{path}: {len(stems)} {what}: {shown}. {todo}")
