"""Groups as points: which patients or items an archive has, where they lie among the embeddings, and who is labelled."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resunet.data.splits import read_splits
from resunet.embedding.table import Embeddings
from resunet.errors import InputError


@dataclass(frozen=True)
class Groups:
    """The groups that may be labelled or are.

    names: HMACs, sorted.
    points: (n, D) unit vectors: the mean direction of a group's scans.
    rows: of each group, which rows of the table are its scans.
    labelled: (n,) whether somebody labelled it, or some of its scans.
    masked: (n,) whether a scan of it has a mask, whatever was said of who is labelled.
    held_out: groups of val and test, which are left out.
    empty: groups without any content, which are left out.
    """

    names: list[str]
    points: NDArray[np.float64]
    rows: list[list[int]]
    labelled: NDArray[np.bool_]
    masked: NDArray[np.bool_]
    held_out: int
    empty: int


def groups_of(embeddings: Embeddings, masked: set[str], held_out: set[str], labelled: set[str] | None = None) -> Groups:
    """The groups of a table.

    Args:
        masked: HMACs of the groups with a mask. The table's own column is of the time when it was made.
        held_out: HMACs of the groups to leave out: those of val and test.
        labelled: HMACs of the groups that count as labelled; None: those with a mask.
    """
    group = embeddings.column("group")
    is_labelled = masked if labelled is None else labelled
    rows, vectors = embeddings.vectors()
    directions = unit(vectors)
    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows.tolist()):
        if group[row] not in held_out:
            members.setdefault(group[row], []).append(place)
    names = sorted(members)
    points = np.array([directions[members[name]].mean(axis=0) for name in names]).reshape(len(names), -1)
    return Groups(
        names=names,
        points=unit(points),
        rows=[rows[members[name]].tolist() for name in names],
        labelled=np.array([name in is_labelled for name in names], bool),
        masked=np.array([name in masked for name in names], bool),
        held_out=len(held_out),
        empty=len(set(group) - held_out - set(names)),
    )


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Vectors of length 1, as contrastive training compares them; zeros stay zeros."""
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)
    return scaled


@dataclass(frozen=True)
class Listed:
    """What a file says of groups, as it names them: stems of a splits.json, or groups.

    labelled: whose labels there are.
    held_out: that must not be labelled for training.
    """

    by: str
    labelled: list[str]
    held_out: list[str]


def read_labelled_list(path: Path) -> Listed:
    """Who is labelled: a splits.json (its pool; val and test are held out), a CSV with a column group, or a group a line.

    Raises:
        InputError: no such file, or none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labelled {path}: cannot be read as text: {error}") from error
    if path.suffix == ".json":
        parts = read_splits(path)
        assert parts is not None
        pool = [stem for stem, part in parts.items() if part == "pool"]
        return Listed("stem", pool, [stem for stem, part in parts.items() if part != "pool"])
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if "group" not in (reader.fieldnames or ()):
            raise InputError(f"--labelled {path}: the columns are {reader.fieldnames}; one must be called group.")
        return Listed("group", [row["group"] for row in reader], [])
    return Listed("group", [line.strip() for line in text.splitlines() if line.strip()], [])
