"""A folder of scans, with or without masks, groups and splits.

SOURCE/images/…    one file a case, in sub-folders too; or, without images/, every readable file below
SOURCE/masks/…     the same stems (only fine-tuning and evaluation need them)
SOURCE/groups.csv  stem,group: the patient or the physical item; without it every image is its own group
                   stem,group,position: where a slice is in its volume, see `listing.read_positions`
SOURCE/splits.json {"pool": [stem, …], "val": […], "test": […]}; without it `assign_parts` makes one by group
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from resunet.data.images import READABLE, stem_of, suffix_of
from resunet.data.listing import Entry, Listing, complain, read_groups, read_positions
from resunet.data.splits import PARTS, check_disjoint, read_splits
from resunet.errors import InputError


def list_folder(root: Path, masks: bool, splits: Path | None = None, called: str = "data.source=") -> Listing:
    """List a folder; nothing is read but groups.csv and splits.json.

    Args:
        masks: every image must have a mask, and every mask an image.
        splits: read instead of the folder's own splits.json.
        called: what the user calls the folder, for messages.

    Raises:
        InputError: no images, an image without mask, two images of one stem, or groups.csv and splits.json that do not
            fit the images.
    """
    folder = root / "images" if (root / "images").is_dir() else root
    images = _by_stem(folder)
    if not images:
        raise InputError(
            f"{called}{root}: no image in {folder}. Formats read: {', '.join(READABLE)}. DICOM has to be indexed first: "
            f"resunet index {root} --out M.parquet, then {called}M.parquet."
        )
    mask_of = _masks(root, images, called) if masks else {}
    groups, positions = read_groups(root / "groups.csv", images), read_positions(root / "groups.csv")
    parts = read_splits(splits or root / "splits.json", images)
    if parts is not None:
        check_disjoint(parts, {stem: groups[stem] if groups else stem for stem in parts})
    entries = {stem: Entry((image,), mask_of.get(stem), (parts or {}).get(stem)) for stem, image in sorted(images.items())}
    masked = (
        frozenset(_stem_in(root / "masks", path) for path in _readable(root / "masks")) if not masks else frozenset(mask_of)
    )
    return Listing(entries, groups, PARTS if parts is None else (), masked, positions=positions)


def _by_stem(folder: Path) -> dict[str, Path]:
    """Readable files below a folder by their path in it without the ending."""
    found: dict[str, Path] = {}
    for path in _readable(folder):
        if path.relative_to(folder).parts[0] == "masks":  # of a source without images/
            continue
        stem = _stem_in(folder, path)
        if stem in found:
            raise InputError(f"{path}: {found[stem].name} has the same stem. A case is one file: remove or rename one.")
        found[stem] = path
    return found


def _readable(folder: Path) -> list[Path]:
    """Of any depth; none where there is no such folder."""
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.is_file() and suffix_of(path) in READABLE and not path.name.startswith(".")]


def _stem_in(folder: Path, path: Path) -> str:
    """The path in a folder without the ending."""
    return str(path.parent.relative_to(folder) / stem_of(path))


def _masks(root: Path, images: Mapping[str, Path], called: str) -> dict[str, Path]:
    masks = _by_stem(root / "masks")
    if not masks:
        raise InputError(
            f"{called}{root}: no mask in {root / 'masks'}. Labelled data has images/ and masks/ with the same stems."
        )
    bare, orphaned = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    complain(root / "masks", "images without a mask", bare, _renaming(bare, orphaned) or "Add the masks, or remove the images.")
    complain(root / "images", "masks without an image", orphaned, "Add the images, or remove the masks.")
    return masks


def _renaming(bare: Sequence[str], orphaned: Sequence[str]) -> str | None:
    """What to do if the masks of all images without one only have more to their names: STEM_mask, mask_STEM."""
    for other in orphaned:
        before, found, after = other.partition(bare[0]) if bare else ("", "", "")
        if found and {f"{before}{stem}{after}" for stem in bare} <= set(orphaned):
            return f"There are masks that are called {before}STEM{after}: give them the images' stems."
    return None
