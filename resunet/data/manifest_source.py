"""A manifest as `data.source`: its rows as cases, made one at a time, so that a million of them cost little memory."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resunet.data.cases import Case, Known
from resunet.data.evidence import Evidence, evidence_of
from resunet.data.images import stem_of
from resunet.data.manifest import Manifest, beside
from resunet.data.splits import PARTS

_COLUMNS = ("id", "group", "file_sha256", "shape", "channels", "percentiles", "mask", "position")


class _Columns:
    """What cases are made of, read once for all parts of a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.table = manifest.columns(*_COLUMNS).combine_chunks()

    def row(self, row: int) -> dict[str, Any]:
        return {name: self.table.column(name)[row].as_py() for name in _COLUMNS}

    @cached_property
    def names(self) -> list[str]:
        """What `keep` calls each row: its first file's path below the folder that all share, without its ending if that will do."""
        files = self.manifest.first_files()
        root = os.path.commonpath([file.parent for file in files])
        paths = [file.relative_to(root) for file in files]
        names = [str(path.parent / stem_of(path)) for path in paths]
        often = Counter(names)
        return [name if often[name] == 1 else str(path) for name, path in zip(names, paths, strict=True)]

    def stamps(self, file_id: str) -> tuple[tuple[int, int], ...]:
        """Size and time of change of an id's files, in order."""
        ids, stamps = self._stamps
        key = np.bytes_(file_id)
        first, last = np.searchsorted(ids, key, "left"), np.searchsorted(ids, key, "right")
        return tuple((int(size), int(time)) for size, time in stamps[first:last])

    @cached_property
    def _stamps(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        table = pq.read_table(beside(self.manifest.path, "paths.parquet"), columns=["id", "size", "mtime_ns"])
        stamps = np.stack(
            [table.column(name).fill_null(-1).to_numpy() for name in ("size", "mtime_ns")], axis=1
        )  # masks have none
        return table.column("id").to_numpy().astype("S32"), stamps


class ManifestCases(Sequence[Case]):
    """Rows of a manifest as cases.

    Args:
        columns: of the manifest.
        rows: which rows, in this order.
        parts: one a row: an index into PARTS, or −1.
        keep: name cases by their files (`_Columns.names`). Groups have no names here but their HMACs.
    """

    def __init__(self, columns: _Columns, rows: NDArray[np.int64], parts: NDArray[np.int8], keep: bool) -> None:
        self._columns, self.rows, self.parts, self._keep = columns, rows, parts, keep

    @property
    def manifest(self) -> Manifest:
        return self._columns.manifest

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> "ManifestCases": ...
    def __getitem__(self, index: int | slice) -> "Case | ManifestCases":
        if isinstance(index, slice):
            return self._taken(np.arange(len(self))[index])
        row = int(self.rows[index])
        values = self._columns.row(row)
        files, part = self.manifest.files(row), int(self.parts[index])
        return Case(
            id=self._columns.names[row] if self._keep else values["id"],
            group=values["group"],
            group_hmac=values["group"],
            group_name=values["group"],
            part=PARTS[part] if part >= 0 else None,
            files=files,
            mask=self.manifest.files_of(values["mask"])[0] if values["mask"] is not None else None,
            stem=stem_of(files[0]),
            known=Known(
                file_sha256=values["file_sha256"],
                shape=tuple(values["shape"]),
                channels=values["channels"],
                percentiles=tuple(values["percentiles"]),
                stamps=self._columns.stamps(values["id"]),
            ),
            position=values["position"],
        )

    def of_part(self, *names: str | None) -> "ManifestCases":
        """The cases of some parts; None are those without one."""
        wanted = [PARTS.index(name) if name is not None else -1 for name in names]
        return self._taken(np.flatnonzero(np.isin(self.parts, wanted)))

    def group_names(self, labelled: bool) -> list[str]:
        """The groups of the cases without a part, one a case; of those with a mask, or of all."""
        chosen = (self.parts < 0) & (self._has_mask() if labelled else np.ones(len(self), bool))
        names: list[str] = self._columns.table.column("group").take(pa.array(self.rows[chosen])).to_pylist()
        return names

    def with_parts(self, part_of: Mapping[str, str]) -> "ManifestCases":
        """Cases without a part in that of their group; groups that are not named go to the pool."""
        groups = self._columns.table.column("group").take(pa.array(self.rows)).combine_chunks().dictionary_encode()
        codes = np.array([PARTS.index(part_of.get(name, "pool")) for name in groups.dictionary.to_pylist()], np.int8)
        parts = np.where(self.parts < 0, codes[groups.indices.to_numpy()], self.parts).astype(np.int8)
        return ManifestCases(self._columns, self.rows, parts, self._keep)

    @property
    def split(self) -> bool:
        """Some case is in a part already."""
        return bool((self.parts >= 0).any())

    def labelled(self) -> "ManifestCases":
        """The cases with a mask."""
        return self._taken(np.flatnonzero(self._has_mask()))

    def evidence(self) -> Evidence:
        """What the leakage guard compares, in the order of the cases."""
        whole = evidence_of(self.manifest)
        thumbnail = whole.thumbnail
        assert thumbnail is not None
        rows = self.rows
        return Evidence(whole.table.take(pa.array(rows)), whole.salt_fingerprint, lambda i: thumbnail(int(rows[i])))

    def _has_mask(self) -> NDArray[np.bool_]:
        has: NDArray[np.bool_] = self._columns.table.column("mask").is_valid().to_numpy()[self.rows]
        return has

    def _taken(self, places: NDArray[np.int64]) -> "ManifestCases":
        return ManifestCases(self._columns, self.rows[places], self.parts[places], self._keep)


def list_manifest(manifest: Manifest, keep: bool) -> ManifestCases:
    """All rows, in the parts that the manifest gives them."""
    split = manifest.column("split").to_pylist()
    parts = np.array([PARTS.index(part) if part is not None else -1 for part in split], np.int8)
    return ManifestCases(_Columns(manifest), np.arange(manifest.num_rows), parts, keep)
