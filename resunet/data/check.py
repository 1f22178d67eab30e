"""`resunet index --check A --against B`: which images of B are in A, one pair a line."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resunet.data.evidence import Pairs, comparable_groups, evidence_of, find_pairs
from resunet.data.manifest import Manifest, open_manifest
from resunet.errors import InputError
from resunet.files import file_aside, refuse_taken
from resunet.progress import say


def check(archive: Path, held_out: Path, out: Path | None) -> int:
    """Print the pairs, write them to `out` by id; how many there are.

    Raises:
        InputError: a manifest that cannot be read, or `out` that exists.
    """
    if out is not None:
        refuse_taken(out, what="file")
    one, other = open_manifest(archive), open_manifest(held_out)
    record, held = evidence_of(one), evidence_of(other)
    if not comparable_groups(record, held):
        say(f"group evidence unavailable: {archive} and {held_out} were made with different salts; hashes and looks compare")
    pairs = find_pairs(record, held)
    names, other_names = _names(one, pairs.archive), _names(other, pairs.held_out)
    for pair in range(len(pairs)):
        print("\t".join([names[pair], other_names[pair], "; ".join(pairs.evidence(slice(pair, pair + 1)))]))
    found = len(set(pairs.held_out.tolist()))
    say(
        f"{found:,} of {other.num_rows:,} images of {held_out} are among the {one.num_rows:,} of {archive} ({len(pairs):,} pairs)"
    )
    if out is not None:
        _write(out, pairs, one, other)
    return len(pairs)


def _names(manifest: Manifest, rows: NDArray[np.int64]) -> list[str]:
    """The path of each row's first file, on one line whatever is in it; where the paths are not at hand, the ids."""
    try:
        paths = [str(manifest.files(int(row))[0]) for row in rows]
    except InputError as error:
        say(f"{error} Scans are named by their ids.")
        ids: list[str] = manifest.column("id").take(pa.array(rows)).to_pylist()
        return ids
    return [path if path.isprintable() else ascii(path)[1:-1] for path in paths]


def _write(out: Path, pairs: Pairs, archive: Manifest, held_out: Manifest) -> None:
    table = pa.table(
        {
            "archive_id": archive.column("id").take(pa.array(pairs.archive)),
            "held_out_id": held_out.column("id").take(pa.array(pairs.held_out)),
            **{column: pa.array(shared) for column, shared in pairs.shared.items()},
            "distance": pa.array(pairs.distance, from_pandas=True),
            "correlation": pa.array(pairs.correlation, from_pandas=True),
        }
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(out) as aside:
        pq.write_table(table, aside)
