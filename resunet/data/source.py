"""What `data.source` may be: a folder of scans, with or without masks, groups and splits.

SOURCE/images/…    one file a case, in sub-folders too; or, without images/, every readable file below
SOURCE/masks/…     the same stems (only fine-tuning and evaluation need them)
SOURCE/groups.csv  stem,group: the patient or the physical item; without it every image is its own group
SOURCE/splits.json {"pool": [stem, …], "val": […], "test": […]}; without it `assign_parts` makes one by group
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resunet.config import DataSettings
from resunet.data.cases import Case
from resunet.data.identity import Salt, load_salt
from resunet.data.images import READABLE, stem_of, suffix_of
from resunet.data.splits import PARTS, check_disjoint, split_groups
from resunet.errors import InputError


@dataclass(frozen=True)
class Source:
    """The cases of a source, sorted by stem, and what its owner said of them."""

    cases: tuple[Case, ...]
    has_groups: bool
    has_splits: bool
    salt: Salt

    def part(self, name: str) -> list[Case]:
        """The cases of one part of the split."""
        return [case for case in self.cases if case.part == name]

    def notes(self) -> list[str]:
        """What a reader of the results has to know about groups and splits."""
        notes = []
        if not self.has_groups:
            notes.append("No groups.csv: each image is its own group, so that images of one patient may be on both sides.")
        unlisted = sum(case.part is None for case in self.cases)
        if self.has_splits and unlisted:
            notes.append(f"splits.json lists {unlisted} of the images in no part: they are left out.")
        if not self.has_splits:
            notes.append("No splits.json: the source comes without a split.")
        return notes


def open_source(settings: DataSettings, masks: bool) -> Source:
    """List a source; nothing is read but groups.csv and splits.json.

    Args:
        masks: every image must have a mask, and every mask an image.

    Raises:
        InputError: no such folder, no images, an image without mask, two images of one stem, or groups.csv and
            splits.json that do not fit the images.
    """
    root = settings.source
    if not root.is_dir():
        raise InputError(
            f"data.source={root}: no such folder. Give a folder with images/ (and masks/, groups.csv, splits.json)."
        )
    folder = root / "images" if (root / "images").is_dir() else root
    images = _by_stem(folder)
    if not images:
        raise InputError(f"data.source={root}: no image in {folder}. Formats read: {', '.join(READABLE)}.")
    masks_by_stem = _masks(root, images) if masks else {}
    groups = _read_groups(root / "groups.csv", images)
    parts = _read_splits(root / "splits.json", images)
    if parts is not None:
        check_disjoint(parts, {stem: groups[stem] if groups else stem for stem in parts})
    salt = load_salt(settings.salt_file)
    keep = settings.names == "keep"
    cases = []
    for stem, image in sorted(images.items()):
        group = groups[stem] if groups else stem
        # without groups.csv a stem says nothing about who it is: equal stems of two folders are not one patient
        group_hmac = salt.identify("group", group) if groups else salt.identify("path", str(image.resolve()))
        cases.append(
            Case(
                id=stem if keep else salt.identify("file", stem),
                group=group if keep else group_hmac,
                group_hmac=group_hmac,
                group_name=group,
                part=parts.get(stem) if parts is not None else None,
                image=image,
                mask=masks_by_stem.get(stem),
            )
        )
    return Source(tuple(cases), has_groups=bool(groups), has_splits=parts is not None, salt=salt)


def assign_parts(source: Source, seed: int) -> Source:
    """The source with a part for every case: its own split, or one made by group from the seed."""
    if source.has_splits:
        return source
    part_of = split_groups([case.group_name for case in source.cases], seed)
    return replace(source, cases=tuple(replace(case, part=part_of[case.group_name]) for case in source.cases))


def _by_stem(folder: Path) -> dict[str, Path]:
    """Readable files below a folder by their path in it without the ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or suffix_of(path) not in READABLE or path.name.startswith("."):
            continue
        if path.relative_to(folder).parts[0] == "masks":  # of a source without images/
            continue
        stem = str(path.parent.relative_to(folder) / stem_of(path))
        if stem in found:
            raise InputError(f"{path}: {found[stem].name} has the same stem. A case is one file: remove or rename one.")
        found[stem] = path
    return found


def _masks(root: Path, images: dict[str, Path]) -> dict[str, Path]:
    masks = _by_stem(root / "masks")
    if not masks:
        raise InputError(
            f"data.source={root}: no mask in {root / 'masks'}. Labelled data has images/ and masks/ with the same stems."
        )
    bare, orphaned = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    _complain(root / "masks", "images without a mask", bare, "Add the masks, or remove the images.")
    _complain(root / "images", "masks without an image", orphaned, "Add the images, or remove the masks.")
    return masks


def _read_groups(path: Path, images: dict[str, Path]) -> dict[str, str]:
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
    _complain(path, "stems that are listed twice", twice, "List each once.")
    _complain(path, "images without a row", sorted(set(images) - set(groups)), "Add a row stem,group for each.")
    empty = sorted(stem for stem, group in groups.items() if not group)
    _complain(path, "rows without a group", empty, "Give each its patient or item.")
    return groups


def _read_splits(path: Path, images: dict[str, Path]) -> dict[str, str] | None:
    if not path.is_file():
        return None
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(splits, dict) or set(splits) != set(PARTS) or not all(isinstance(s, list) for s in splits.values()):
        raise InputError(f'{path}: must be {{"pool": [stems], "val": [stems], "test": [stems]}}.')
    stems = [str(stem) for part in PARTS for stem in splits[part]]
    _complain(path, "stems without an image", sorted(set(stems) - set(images)), "Correct the file, or add the images.")
    twice = sorted(stem for stem, count in Counter(stems).items() if count > 1)
    _complain(path, "stems that are listed twice", twice, "List each once.")
    return {str(stem): part for part in PARTS for stem in splits[part]}


def _complain(path: Path, what: str, stems: Sequence[str], todo: str) -> None:
    if stems:
        shown = ", ".join(stems[:5]) + (", …" if len(stems) > 5 else "")
        raise InputError(f"{path}: {len(stems)} {what}: {shown}. {todo}")
