"""What a source holds, by its owner's own names: files and masks by stem, and who each is of (groups.csv).

The names stay here and in splits: what goes into a record is made of them by `resunet.data.source`.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    labelled: there are masks, whether or not they were asked for.
    remarks: what a reader of the results has to know beside groups and splits.
    """

    entries: Mapping[str, Entry]
    groups: Mapping[str, str]
    open_parts: tuple[str, ...]
    labelled: bool
    remarks: tuple[str, ...] = ()


def read_groups(path: Path, stems: Iterable[str] = ()) -> dict[str, str]:
    """groups.csv: stem → group; empty where there is no such file.

    Raises:
        InputError: not UTF-8, other columns, a stem twice or without a group, or one of `stems` without a row.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        if not {"stem", "group"} <= set(reader.fieldnames or ()):
            raise InputError(f"{path}: the columns are {reader.fieldnames}; it must have stem and group.")
        rows = [(row["stem"], row["group"]) for row in reader]
    groups = dict(rows)
    twice = sorted(stem for stem, count in Counter(stem for stem, _ in rows).items() if count > 1)
    complain(path, "stems that are listed twice", twice, "List each once.")
    complain(path, "images without a row", sorted(set(stems) - set(groups)), "Add a row stem,group for each.")
    empty = sorted(stem for stem, group in groups.items() if not group)
    complain(path, "rows without a group", empty, "Give each its patient or item.")
    return groups


def complain(path: Path, what: str, stems: Sequence[str], todo: str) -> None:
    """Raise InputError if there are such stems: their number, the first few, and what to do."""
    if stems:
        shown = ", ".join(stems[:5]) + (", …" if len(stems) > 5 else "")
        raise InputError(f"{path}: {len(stems)} {what}: {shown}. {todo}")
