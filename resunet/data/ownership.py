"""Whose a scan is and what belongs to it: id, group, mask and split, from DICOM headers and the source's side files."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from resunet.data.dicom import DicomHeader
from resunet.data.identity import Salt
from resunet.data.images import READABLE, suffix_of
from resunet.data.listing import read_groups, read_positions
from resunet.data.manifest import path_text
from resunet.data.splits import check_disjoint, read_splits
from resunet.data.walk import FoundFile, Tree, walk
from resunet.errors import InputError
from resunet.progress import say

_CHANNEL = re.compile(r"_\d{4}$")  # nnU-Net's number of a channel
Value = TypeVar("Value", str, float)
_ENDINGS = frozenset((*READABLE, ".dcm", ".ima", ".dicom", ".dic"))


class Owned(NamedTuple):
    """What a row says of a scan beside its facts. grouped: somebody said whose it is; mask: its file; position: groups.csv's."""

    id: str
    group: str
    grouped: bool
    study: str
    series: str
    mask: str | None
    split: str | None
    position: float | None = None


@dataclass(frozen=True)
class _Root:
    """A source: the folder that its images' stems are relative to, and what lies beside it, by stem."""

    images: str
    groups: Mapping[str, str]
    splits: Mapping[str, str]
    masks: Mapping[str, str]
    positions: Mapping[str, float]

    @property
    def says_something(self) -> bool:
        """Whether anything of its files depends on it."""
        return bool(self.groups or self.splits or self.masks) or self.images.endswith("imagesTr")

    def stems(self, path: str) -> tuple[str, ...]:
        """What side files may call a file: its path below the folder, without a format's ending or with it."""
        below = path[len(self.images) + 1 :]
        stem = _without_ending(below)
        stem = _CHANNEL.sub("", stem) if self.images.endswith("imagesTr") else stem
        return (stem, below)


class Ownership:
    """Answers for the files of some sources.

    Args:
        sources: absolute.
        tree: what is below them.
        masks: a folder of masks with the images' stems, for all sources; without it each set's own masks/ or labelsTr/.

    Raises:
        InputError: a source's groups.csv or splits.json that cannot be used, or no masks in `masks`.
    """

    def __init__(self, sources: Sequence[Path], tree: Tree, masks: Path | None, salt: Salt) -> None:
        self.salt = salt
        folders = {source if source.is_dir() else source.parent: None for source in sources}
        self._base = os.path.commonpath(list(folders))
        self._below = self._base.rstrip(os.sep) + os.sep
        given = _masks_by_stem(masks) if masks is not None else None
        if masks is not None and not given:
            raise InputError(f"--masks {masks}: no masks there. Formats read: {', '.join(READABLE)}.")
        self._roots: dict[str, list[_Root]] = {}  # by the folder of the images
        self._links = tree.links
        self._folders: dict[str, str] = {}  # folder → the same without links
        self._above: dict[str, tuple[_Root, ...]] = {}  # folder → roots that its files are below, the innermost first
        for folder in folders:
            self._add(_root(folder, tree.files, given))
        for folder in tree.sets:
            if folder not in folders:
                try:
                    self._add(_root(folder, tree.files, None if given is None else {}))
                except InputError as error:  # somewhere in an archive that nobody tidied it may be something else
                    say(f"not used: {error}")

    def _add(self, root: _Root) -> None:
        self._roots.setdefault(root.images, []).append(root)

    def mask_id(self, mask: str) -> str:
        """The id of a mask's file."""
        return self.salt.identify("mask", self._below_base(mask))

    def of(self, files: Sequence[str], header: DicomHeader | None) -> Owned:
        """Of a scan's files and its DICOM header, with HMACs in place of names."""
        first = files[0]
        roots = [(root, root.stems(first)) for root in self._roots_of(first)]
        group, grouped = self._group(first, roots, header)
        return Owned(
            id=self.salt.identify("file", self._below_base(first)),
            group=group,
            grouped=grouped,
            study=header.study if header is not None else "",
            series=header.series if header is not None else "",
            mask=_first((root.masks, stems) for root, stems in roots),
            split=_first((root.splits, stems) for root, stems in roots),
            position=_first((root.positions, stems) for root, stems in roots),
        )

    def _group(self, first: str, roots: Sequence[tuple[_Root, Sequence[str]]], header: DicomHeader | None) -> tuple[str, bool]:
        """groups.csv has the first word, then the header; a study is of one patient, whoever that is."""
        name = _first((root.groups, stems) for root, stems in roots)
        if name is not None:
            return self.salt.identify("group", name), True
        if header is not None and (header.patient or header.study):
            return header.patient or header.study, bool(header.patient)
        if any(root.images.endswith("imagesTr") for root, _ in roots):  # the channels of a case are of one patient
            first = _CHANNEL.sub("_0000", _without_ending(first)) + suffix_of(Path(first))
        # `identity.own_group`, also of a name that is no UTF-8
        return self.salt.identify("path", path_text(self._real(first))), False

    def _real(self, path: str) -> str:
        """The path without links: of a folder's files, all but the links in one go."""
        folder, _, name = path.rpartition(os.sep)
        if path in self._links:
            return os.path.realpath(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder or os.sep)
        return f"{self._folders[folder].rstrip(os.sep)}{os.sep}{name}"

    def _roots_of(self, path: str) -> tuple[_Root, ...]:
        folder = path.rpartition(os.sep)[0]
        if folder not in self._above:
            own = (root for root in self._roots.get(folder, []) if root.says_something)
            self._above[folder] = (*own, *(self._roots_of(folder) if folder else ()))
        return self._above[folder]

    def _below_base(self, path: str) -> str:
        inside = path.startswith(self._below)
        return path_text(path[len(self._below) :] if inside else os.path.relpath(path, self._base))


def pseudonymous(header: DicomHeader, salt: Salt) -> DicomHeader:
    """A header with HMACs in place of what names a person or a day; equal values stay equal, so that it groups as before.

    A patient's HMAC is that of a group of the same name.
    """

    def hidden(kind: str, value: str) -> str:
        return salt.identify(kind, value) if value else ""

    return replace(
        header,
        patient=hidden("group", header.patient),
        study=hidden("study", header.study),
        series=hidden("series", header.series),
        phases=tuple(hidden("phase", phase)[:16] for phase in header.phases),
    )


def refuse_torn_groups(owned: Iterable[tuple[str, Owned]]) -> None:
    """No patient in two parts of the split, whoever said which scans are theirs.

    Args:
        owned: of each scan its first file, for the message, and what is known of it.

    Raises:
        InputError: with two files of one group.
    """
    seen: dict[str, tuple[str, str]] = {}
    for path, one in owned:
        if one.split is None:
            continue
        other, part = seen.setdefault(one.group, (path, one.split))
        if part != one.split:
            raise InputError(
                f"{path} is in {one.split}, {other} in {part}: both are of one patient or item, as DICOM headers or groups.csv "
                "say. A patient or item belongs to one part: correct splits.json or groups.csv."
            )


def _root(folder: Path, files: Sequence[FoundFile], masks: Mapping[str, str] | None) -> _Root:
    images = next((folder / name for name in ("images", "imagesTr") if (folder / name).is_dir()), folder)
    groups = read_groups(folder / "groups.csv")  # an archive's list need not be complete
    root = _Root(str(images), groups, {}, masks or {}, read_positions(folder / "groups.csv"))
    if (folder / "splits.json").is_file():
        below = f"{images}{os.sep}"
        stems = (stem for file in files if file.path.startswith(below) for stem in root.stems(file.path))
        splits = read_splits(folder / "splits.json", stems) or {}
        check_disjoint(splits, {stem: groups.get(stem, stem) for stem in splits})
        root = replace(root, splits=splits)
    if masks is None:
        beside = next((folder / name for name in ("masks", "labelsTr") if images != folder and (folder / name).is_dir()), None)
        root = replace(root, masks=_masks_by_stem(beside) if beside is not None else {})
    return root


def _masks_by_stem(folder: Path) -> dict[str, str]:
    start = len(str(folder)) + 1  # absolute, as what is found below it
    return {_without_ending(f.path[start:]): f.path for f in walk([folder]).files if suffix_of(Path(f.path)) in READABLE}


def _without_ending(path: str) -> str:
    """Without the ending of a format; the last number of a UID is none."""
    if path.lower().endswith(".nii.gz"):
        return path[:-7]
    stem, _, ending = path.rpartition(".")
    return stem if f".{ending.lower()}" in _ENDINGS else path


def _first(answers: Iterable[tuple[Mapping[str, Value], Sequence[str]]]) -> Value | None:
    """The first of the values that some stem has."""
    return next((values[stem] for values, stems in answers if values for stem in stems if stem in values), None)
