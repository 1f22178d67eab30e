"""An nnU-Net raw data set (version 2), read as it is.

SOURCE/dataset.json              channel_names, labels, file_ending, numTraining
SOURCE/imagesTr/CASE_0000.nii.gz one file a channel, CASE_0001.nii.gz the next; colour images hold theirs in one file
SOURCE/labelsTr/CASE.nii.gz      the masks
SOURCE/imagesTs, labelsTs        the same for the cases that are held out: part 'test', never pretrained on
SOURCE/groups.csv, splits.json   as in `resunet.data.folder`, by CASE: nnU-Net itself knows no patients

nnU-Net's own splits_final.json is not looked for: its folds know no patients either. Format:
https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from resunet.data.images import IMAGES, READABLE, TIFFS, channel_count
from resunet.data.listing import Entry, Listing, complain, read_groups, read_positions
from resunet.data.splits import PARTS, check_disjoint, read_splits
from resunet.errors import InputError
from resunet.plain import number_of

_IGNORE = "ignore"  # nnU-Net's name for what nobody labelled
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class _ListedCase:
    images: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class DatasetJson:
    """What dataset.json says; keys that only nnU-Net's own training uses are passed over.

    labels: name → mask values; more than one are a region.
    dataset: training cases that lie elsewhere, instead of imagesTr and labelsTr.
    """

    channel_names: Mapping[str, str]
    labels: Mapping[str, frozenset[int]]
    file_ending: str
    num_training: int | None = None
    dataset: Mapping[str, _ListedCase] | None = None


def is_nnunet(root: Path) -> bool:
    """Whether a folder is laid out as nnU-Net wants it."""
    return (root / "imagesTr").is_dir() or ((root / "dataset.json").is_file() and not (root / "images").is_dir())


def channels_of(root: Path) -> int:
    """How many channels the data set's own dataset.json names."""
    return len(_read_dataset_json(root / "dataset.json").channel_names)


def list_nnunet(
    root: Path,
    channels: str | int,
    masks: bool,
    classes: Mapping[int, str] | None = None,
    ignore: Sequence[int] = (),
    splits: Path | None = None,
) -> Listing:
    """List an nnU-Net raw data set; nothing is read but dataset.json, groups.csv, splits.json and spacings beside TIFFs.

    Args:
        channels: data.channels; must be the number that dataset.json names.
        masks: every training case must have a mask, and every mask a case; test cases without one are left out.
        splits: read instead of the data set's own splits.json.
        classes, ignore: of the recipe; with `masks` they must cover exactly what dataset.json's labels say.

    Raises:
        InputError: dataset.json is missing, of version 1, or contradicts the files or the recipe; cases without all their
            channels or their mask; groups.csv and splits.json that do not fit.
    """
    description = root / "dataset.json"
    about = _read_dataset_json(description)
    _check_channels(description, about, channels)
    remarks = _check_classes(description, about.labels, classes, ignore) if masks and classes is not None else []
    train, test = _training_cases(root, about), _cases(root / "imagesTs", root / "labelsTs", about)
    twice = sorted(set(train) & set(test))
    complain(root, "cases are both for training and in imagesTs", twice, "Remove or rename one of each.")
    found = train | test
    groups = read_groups(root / "groups.csv", found)
    labelled = any(entry.mask for entry in train.values())
    given = read_splits(splits or root / "splits.json", found)
    if given is not None:
        check_disjoint(given, {case: groups.get(case, case) for case in given})
        parts = _Parts({case: given.get(case) for case in found}, ())
    else:
        if groups:
            check_disjoint({case: "imagesTr" if case in train else "imagesTs" for case in found}, groups)
        parts = _own_parts(train, test, labelled)
    if parts.open_parts == ("pool", "val"):
        remarks.append("No splits.json: imagesTs is the test part, imagesTr is split by group into pool and val.")
    if masks:
        needed = train if given is None else given
        bare = [case for case in found if case in needed and found[case].mask is None]
        complain(root, "training or listed cases without a mask", bare, "Add the masks, or remove the images.")
        if left_out := sum(entry.mask is None for entry in found.values()):
            remarks.append(f"{left_out} cases have no mask: they are left out.")
    entries = {
        case: replace(entry, part=parts.part_of[case], mask=entry.mask if masks else None)
        for case, entry in found.items()
        if entry.mask is not None or not masks
    }
    masked = frozenset(case for case, entry in found.items() if entry.mask)
    return Listing(entries, groups, parts.open_parts, masked, tuple(remarks), read_positions(root / "groups.csv"))


class _Parts(NamedTuple):
    """A part for each case, and the parts that `assign_parts` has still to make of those without."""

    part_of: Mapping[str, str | None]
    open_parts: tuple[str, ...]


def _own_parts(train: Mapping[str, Entry], test: Mapping[str, Entry], labelled: bool) -> _Parts:
    """What the folders say. imagesTs is held out whether it has masks or not; without them imagesTr has to give a test part."""
    held_out = dict.fromkeys(test, "test")
    if not labelled:
        return _Parts(dict.fromkeys(train, "pool") | held_out, ())
    tested = any(entry.mask is not None for entry in test.values())
    return _Parts({case: held_out.get(case) for case in (*train, *test)}, ("pool", "val") if tested else PARTS)


def _read_dataset_json(path: Path) -> DatasetJson:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: is missing, beside imagesTr/. An nnU-Net raw data set has it; a plain folder has images/ and masks/."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if isinstance(values, dict) and "modality" in values and "channel_names" not in values:
        raise InputError(
            f"{path}: names 'modality' and no 'channel_names': nnU-Net version 1 or the Medical Segmentation Decathlon. "
            "nnUNetv2_convert_old_nnUNet_dataset or nnUNetv2_convert_MSD_dataset makes version 2 of it."
        )
    about = _described(values, path)
    expected = [str(i) for i in range(len(about.channel_names))]
    if not expected or sorted(about.channel_names, key=lambda key: (len(key), key)) != expected:
        raise InputError(f"{path}: channel_names={about.channel_names}: the keys must be 0, 1, 2 and so on.")
    if about.file_ending.lower() not in READABLE:
        raise InputError(f"{path}: file_ending={about.file_ending!r}: formats read: {', '.join(READABLE)}.")
    return about


def _described(values: Any, path: Path) -> DatasetJson:
    """dataset.json's values, checked.

    Raises:
        InputError: every key that is missing or of another kind, a line each.
    """
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a dictionary, not {type(values).__name__}.")
    faults: list[str] = []

    def table(key: str) -> dict[str, Any]:
        if isinstance(its := values.get(key), dict):
            return its
        faults.append(_fault(key, its, "dictionary"))
        return {}

    channels, labels = table("channel_names"), table("labels")
    ending, count = values.get("file_ending"), values.get("numTraining")
    faults += [_fault(f"channel_names.{key}", its, "string") for key, its in channels.items() if not isinstance(its, str)]
    if not isinstance(ending, str):
        faults.append(_fault("file_ending", ending, "string"))
    if count is not None and not _is_whole(count):
        faults.append(_fault("numTraining", count, "integer"))
    listed = table("dataset") if values.get("dataset") is not None else None
    regions = {name: its if isinstance(its, list) and its else [its] for name, its in labels.items()}
    faults += [
        _fault(f"labels.{name}.{i}", value, "integer")
        for name, its in regions.items()
        for i, value in enumerate(its)
        if not _is_whole(value)
    ]
    for case, its in (listed or {}).items():
        images, label = (its.get("images"), its.get("label")) if isinstance(its, dict) else (None, None)
        if not isinstance(images, list) or not all(isinstance(one, str) for one in (*images, label)):
            faults.append(_fault(f"dataset.{case}", its, 'dictionary with "images", a list of paths, and "label", a path'))
    if faults:
        raise InputError(f"{path} is not valid:\n" + "\n".join(faults))
    return DatasetJson(
        channel_names=channels,
        labels={name: frozenset(map(int, its)) for name, its in regions.items()},
        file_ending=str(ending),
        num_training=None if count is None else int(count),
        dataset=listed and {case: _ListedCase(tuple(its["images"]), its["label"]) for case, its in listed.items()},
    )


def _fault(key: str, value: Any, wanted: str) -> str:
    return f"  {key}: is required" if value is None else f"  {key}={value!r}: Input should be a valid {wanted}"


def _is_whole(value: Any) -> bool:
    """A whole number, or one that was written as text."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdecimal())


def _check_channels(path: Path, about: DatasetJson, channels: str | int) -> None:
    count = len(about.channel_names)
    if channel_count(channels) != count:
        listed = ", ".join(f"{key}: {name}" for key, name in about.channel_names.items())
        raise InputError(
            f"data.channels={channels}: {path} names {number_of(count, 'channel')} ({listed}). Set data.channels={count}."
        )


def _check_classes(
    path: Path, labels: Mapping[str, frozenset[int]], classes: Mapping[int, str], ignore: Sequence[int]
) -> list[str]:
    """Refuse classes that are not those of dataset.json; a remark where it names regions."""
    known = frozenset(value for name, values in labels.items() if name != _IGNORE for value in values)
    ignored = labels.get(_IGNORE, frozenset())
    regions = [f"{name} = {'+'.join(map(str, sorted(values)))}" for name, values in labels.items() if len(values) > 1]
    faults = []
    if missing := sorted((known | ignored) - set(classes) - set(ignore)):
        faults.append(f"the recipe does not say what {_and(missing)} is")
    if unknown := sorted(set(classes) - known):
        faults.append(f"the data set has no class {_and(unknown)}")
    moved = [name for value, name in classes.items() if name in labels and labels[name] != {value}]
    if moved:
        faults.append(f"{_and(moved)} has another value there")
    if 0 in classes and next(iter(classes)) != 0:
        faults.append("0 is the background and has to come first")
    if not faults:
        if not regions:
            return []
        return [
            f"dataset.json names regions ({', '.join(regions)}): here every value is a class; data.regions trains on unions."
        ]
    if regions:
        values = _and(sorted(known))
        wanted = f"Regions ({', '.join(regions)}) belong in data.regions; name every mask value in data.classes: {values}"
    else:
        by_value = sorted((value, name) for name, values in labels.items() if name != _IGNORE for value in values)
        wanted = f"Set 'data.classes={{{', '.join(f'{value}: {name}' for value, name in by_value)}}}'"
    if ignored:
        wanted += f", data.ignore=[{', '.join(map(str, sorted(ignored)))}]"
    given = ", ".join(f"{value}: {name}" for value, name in classes.items())
    listed = ", ".join(f"{name}: {'+'.join(map(str, sorted(values)))}" for name, values in labels.items())
    raise InputError(
        f"data.classes={{{given}}}, data.ignore={list(ignore)}: {path} has the labels {{{listed}}}: {'; '.join(faults)}. {wanted}."
    )


def _training_cases(root: Path, about: DatasetJson) -> dict[str, Entry]:
    cases = _cases(root / "imagesTr", root / "labelsTr", about) if about.dataset is None else _listed_cases(root, about)
    if not cases:
        raise InputError(f"{root / 'imagesTr'}: holds no *_0000{about.file_ending}; that is how dataset.json says files end.")
    if about.num_training is not None and about.num_training != len(cases):
        raise InputError(
            f"{root / 'dataset.json'}: numTraining={about.num_training}, but there are {len(cases)} training cases. "
            "Complete the copy, or correct the number."
        )
    return cases


def _listed_cases(root: Path, about: DatasetJson) -> dict[str, Entry]:
    """The cases under dataset.json's 'dataset', with paths below the root or absolute ones."""
    assert about.dataset is not None
    where = root / "dataset.json"
    images = {case: tuple(root / image for image in listed.images) for case, listed in sorted(about.dataset.items())}
    masks = {case: root / listed.label for case, listed in about.dataset.items()}
    torn = [case for case, files in images.items() if not _are_all_channels(range(len(files)), about)]
    complain(where, f"cases under 'dataset' without {len(about.channel_names)} images", torn, "Correct the lists.")
    gone = [str(path) for case, files in images.items() for path in (*files, masks[case]) if not path.is_file()]
    complain(where, "files under 'dataset' that are not there", gone, "Correct the paths.")
    return {case: _entry(case, files, masks[case], about.file_ending) for case, files in images.items()}


def _cases(images: Path, labels: Path, about: DatasetJson) -> dict[str, Entry]:
    """The cases of imagesTr or imagesTs; with their masks where there are some."""
    ending = about.file_ending
    files: dict[str, dict[int, Path]] = {}
    unnamed = []
    for path in _files(images, ending):
        if match := _CHANNEL.fullmatch(path.name.removesuffix(ending)):
            files.setdefault(match[1], {})[int(match[2])] = path
        else:
            unnamed.append(path.name)
    complain(images, "files whose name does not end in a channel (_0000)", unnamed, "Rename or remove them.")
    torn = [case for case, its in files.items() if not _are_all_channels(its, about)]
    wanted = ", ".join(f"_{i:04}" for i in range(len(about.channel_names)))
    complain(
        images, f"cases without exactly the channels {wanted}", torn, "Correct the files, or channel_names in dataset.json."
    )
    masks = {path.name.removesuffix(ending): path for path in _files(labels, ending)}
    complain(labels, "masks without an image", sorted(set(masks) - set(files)), "Add the images, or remove the masks.")
    in_order = {case: tuple(path for _, path in sorted(its.items())) for case, its in sorted(files.items())}
    return {case: _entry(case, its, masks.get(case), ending) for case, its in in_order.items()}


def _are_all_channels(found: Iterable[int], about: DatasetJson) -> bool:
    """A file for each; or, of a colour image, one file for all three."""
    count, found = len(about.channel_names), set(found)
    return found == set(range(count)) or (found == {0} and count == 3 and about.file_ending.lower() in IMAGES)


def _entry(case: str, files: tuple[Path, ...], mask: Path | None, ending: str) -> Entry:
    spacing = _spacing_beside(files[0].with_name(f"{case}.json")) if ending.lower() in TIFFS else None
    return Entry(files, mask, file_per_channel=len(files) > 1, spacing=spacing)


def _files(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))


def _spacing_beside(path: Path) -> tuple[float, ...] | None:
    """mm in array order, where nnU-Net's TIFF reader looks for it; None without such a file."""
    if not path.is_file():
        return None
    try:
        spacing = tuple(float(value) for value in json.loads(path.read_text(encoding="utf-8"))["spacing"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}: must be {{"spacing": [z, y, x]}}, in mm.') from error
    if not spacing or not all(0 < value < float("inf") for value in spacing):
        raise InputError(f"{path}: spacing={list(spacing)}; every one must be above 0.")
    return spacing


def _and(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:-1])) + (" and " if len(things) > 1 else "") + str(things[-1])
