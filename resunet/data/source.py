"""What `data.source` may be, and its cases: a folder of scans, an nnU-Net raw data set, or a manifest.

See `resunet.data.folder` and `resunet.data.nnunet` for the layouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from resunet.config import Called, DataSettings
from resunet.data.cases import Case
from resunet.data.folder import list_folder
from resunet.data.identity import Salt, load_salt, own_group
from resunet.data.listing import Listing
from resunet.data.manifest import open_manifest
from resunet.data.manifest_source import ManifestCases, list_manifest
from resunet.data.nnunet import channels_of, is_nnunet, list_nnunet
from resunet.data.splits import PARTS, draw_groups, first_groups, fold_groups, split_groups, write_splits
from resunet.data.strata import read_strata
from resunet.errors import InputError
from resunet.plain import number_of
from resunet.progress import say

_KEYS = Called()
_ACCEPTED = (
    "a folder with images/ (and masks/, groups.csv, splits.json), an nnU-Net raw data set (dataset.json, imagesTr/, labelsTr/), "
    "or a manifest (M.parquet, of resunet index)"
)


@dataclass(frozen=True)
class Source:
    """The cases of a source, sorted by stem, and what its owner said of them.

    open_parts: the parts that `assign_parts` makes of the cases without one: all where the owner gave no split, () where
        splits.json did, and something between where only the test cases are known.
    labelled: there are masks, whether or not they were asked for.
    remarks: what a reader of the results has to know beside groups and splits.
    masked: stems of the cases that have a mask, whether or not masks were asked for; not of a manifest, whose cases know.
    """

    cases: Sequence[Case]
    has_groups: bool
    open_parts: tuple[str, ...]
    salt: Salt
    labelled: bool = False
    remarks: tuple[str, ...] = ()
    masked: frozenset[str] = frozenset()

    def has_mask(self, case: Case) -> bool:
        """Somebody labelled a case, whether or not masks were asked for."""
        return case.mask is not None or case.stem in self.masked

    @property
    def salt_fingerprint(self) -> str:
        """Of the salt that made the groups' HMACs: of a manifest, the one that it was made with."""
        return self.cases.manifest.salt_fingerprint if isinstance(self.cases, ManifestCases) else self.salt.fingerprint

    @property
    def has_splits(self) -> bool:
        """The owner said which cases are for testing, at least."""
        return self.open_parts != PARTS

    def part(self, *names: str | None) -> Sequence[Case]:
        """The cases of one part of the split, or of several; None are those without one."""
        if isinstance(self.cases, ManifestCases):
            return self.cases.of_part(*names)
        return [case for case in self.cases if case.part in names]

    def stems(self) -> dict[str, list[str]]:
        """part → its cases as the source names them: what `write_splits` writes."""
        return {part: [case.stem for case in self.part(part)] for part in PARTS}

    def notes(self) -> list[str]:
        """What a reader of the results has to know about groups and splits."""
        notes = []
        if not self.has_groups:
            notes.append("No groups.csv: each image is its own group, so that images of one patient may be on both sides.")
        unlisted = len(self.part(None))
        if not self.open_parts and unlisted:
            notes.append(f"splits.json lists {unlisted} of the images in no part: they are left out.")
        if not self.has_splits:
            notes.append("No splits.json: the source comes without a split.")
        return notes + list(self.remarks)


def open_source(
    settings: DataSettings,
    masks: bool,
    classes: Mapping[int, str] | None = None,
    ignore: Sequence[int] = (),
    called: Called = _KEYS,
) -> Source:
    """List a source; no image and no mask is read.

    Args:
        masks: every case must have a mask, and every mask a case.
        called: for messages.
        classes: raw mask value → name, and `ignore`: compared with what the source itself says of its masks, where it does.

    Raises:
        InputError: nothing of that kind there, or what is there does not fit together or to the settings; see
            `list_folder` and `list_nnunet`.
    """
    root, splits = settings.source, settings.splits
    if splits is not None and not splits.is_file():
        raise InputError(f"{called.splits}{splits}: no such file. resunet split {root} --out {splits} makes one.")
    if root.suffix == ".parquet":
        return _from_manifest(settings, masks, called)
    if not root.is_dir():
        raise InputError(f"{called.source}{root}: no such folder. Give {_ACCEPTED}.")
    if is_nnunet(root):
        listing = list_nnunet(root, settings.channels, masks, classes, ignore, splits)
    else:
        listing = list_folder(root, masks, splits, called.source)
    return _with_ids(listing, load_salt(settings.salt_file, called.salt_file), keep=settings.names == "keep")


def assign_parts(source: Source, seed: int, stratify: bool = False) -> Source:
    """The source with a part for every case: its own split, or one made by group from the seed.

    The one place that makes a split: pretraining leaves out what fine-tuning holds out because both come here.

    Args:
        stratify: balanced over what the masks hold; the source must have been opened with its masks.

    Raises:
        InputError: too few groups, or with `stratify` a mask that cannot be read.
    """
    if not source.open_parts:
        return source
    if isinstance(source.cases, ManifestCases):
        # of labelled and unlabelled scans the labelled groups are split, and all others are for pretraining
        groups = source.cases.group_names(source.labelled)
        strata = read_strata(source.cases.labelled()) if stratify else None
        return replace(source, cases=source.cases.with_parts(split_groups(groups, seed, strata, source.open_parts)))
    without = [case for case in source.cases if case.part is None]
    strata = read_strata(without) if stratify else None
    part_of = split_groups([case.group_name for case in without], seed, strata, source.open_parts)
    cases = (replace(case, part=case.part or part_of[case.group_name]) for case in source.cases)
    return replace(source, cases=tuple(cases))


def draw_labelled(
    source: Source, labelled: float | None, draw: int, stratify: bool = False, order: Sequence[str] | None = None
) -> Source:
    """The source with only the groups of one draw in its pool, and at most as many in val; others lose their part.

    By the source's own names: the draw depends neither on the salt nor on how names are recorded. Labels that choose
    a checkpoint are labels too, which is why val is limited, by the same nested draw.

    Args:
        labelled: share or number of the pool's groups; None: pool and val stay as they are.
        stratify: balanced over what the masks hold; the source must have been opened with its masks.
        order: the pool's groups, all, in the order in which they are labelled; None: the random one of `draw`, which val has
            in any case.

    Raises:
        InputError: more groups than the pool has.
    """
    if labelled is None:
        return source
    pool, val = source.part("pool"), source.part("val")
    strata = read_strata([*pool, *val]) if stratify else None
    names = [case.group_name for case in pool]
    assert order is None or set(order) == set(names)
    drawn = set(draw_groups(names, labelled, draw, strata) if order is None else first_groups(order, labelled))
    if val:
        groups = {case.group_name for case in val}
        drawn |= set(draw_groups(groups, min(len(drawn), len(groups)), draw, strata))

    def part(case: Case) -> str | None:
        return case.part if case.part == "test" or case.group_name in drawn else None

    return replace(source, cases=tuple(replace(case, part=part(case)) for case in source.cases))


def divide(source: Source, folds: int, seed: int, stratify: bool = False) -> dict[str, int]:
    """group, as the source names it → the fold that its pool and val cases are in; test is left as it is.

    After `assign_parts` and `draw_labelled`, whose arguments `seed` and `stratify` are.

    Raises:
        InputError: fewer groups than folds, or with `stratify` a mask that cannot be read.
    """
    cases = source.part("pool", "val")
    strata = read_strata(cases) if stratify else None
    return fold_groups([case.group_name for case in cases], folds, seed, strata)


def hold_out(source: Source, fold_of: Mapping[str, int], fold: int) -> Source:
    """The source with one fold of its pool and val as val, and the others as pool."""

    def part(case: Case) -> str | None:
        if case.part not in ("pool", "val"):
            return case.part
        return "val" if fold_of[case.group_name] == fold else "pool"

    return replace(source, cases=tuple(replace(case, part=part(case)) for case in source.cases))


def write_split(root: Path, out: Path, seed: int, labelled: float | None, draw: int, stratify: bool) -> Path:
    """Write the split that training would make of a folder, or one labelled draw of it, as a splits.json; `out`.

    Raises:
        InputError: the source, too few groups, or `out` that exists.
    """
    # who is where depends on no recipe: nnU-Net's channels are what its own dataset.json says
    channels = channels_of(root) if is_nnunet(root) else "grey"
    source = open_source(DataSettings(source=root, channels=channels), masks=stratify, called=Called(source="SOURCE "))
    if isinstance(source.cases, ManifestCases):
        raise InputError(f"SOURCE {root}: is a manifest. Split what was indexed, and run resunet index again.")
    chosen = draw_labelled(assign_parts(source, seed, stratify), labelled, draw, stratify)
    write_splits(out, chosen.stems())
    counts = {part: (len(chosen.part(part)), len({case.group_name for case in chosen.part(part)})) for part in PARTS}
    say(
        ", ".join(
            f"{part}: {number_of(images, 'image')} of {number_of(groups, 'group')}" for part, (images, groups) in counts.items()
        )
    )
    return out


def _from_manifest(settings: DataSettings, masks: bool, called: Called) -> Source:
    if settings.splits is not None:
        raise InputError(
            f"{called.splits}{settings.splits}: a manifest has its split from the splits.json of what was indexed. Put the file "
            "there and run resunet index again: nothing else is read anew."
        )
    manifest = open_manifest(settings.source)
    everything = list_manifest(manifest, settings.names == "keep")
    labelled = everything.labelled()
    if masks and not len(labelled):
        raise InputError(
            f"{called.source}{settings.source}: no scan of this manifest has a mask. Index it with resunet index --masks DIR."
        )
    return Source(
        cases=labelled if masks else everything,
        has_groups=manifest.groups_known,
        open_parts=() if everything.split else PARTS,
        salt=load_salt(settings.salt_file, called.salt_file),
        labelled=len(labelled) > 0,
    )


def _with_ids(listing: Listing, salt: Salt, keep: bool) -> Source:
    """The listing's cases under the names that a record may show; `keep`: their own."""
    cases = []
    for stem, entry in sorted(listing.entries.items()):
        group = listing.groups.get(stem, stem)
        group_hmac = salt.identify("group", group) if listing.groups else own_group(entry.files[0], salt)
        cases.append(
            Case(
                id=stem if keep else salt.identify("file", stem),
                group=group if keep else group_hmac,
                group_hmac=group_hmac,
                group_name=group,
                part=entry.part,
                files=entry.files,
                mask=entry.mask,
                stem=stem,
                file_per_channel=entry.file_per_channel,
                spacing=entry.spacing,
                position=listing.positions.get(stem),
            )
        )
    return Source(
        tuple(cases), bool(listing.groups), listing.open_parts, salt, bool(listing.masked), listing.remarks, listing.masked
    )
