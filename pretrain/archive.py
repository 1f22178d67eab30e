"""What a pretraining run reads: the scans of its source, prepared for random crops, and that nothing held out is among them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from numpy.typing import NDArray
from platformdirs import user_cache_path

from pretrain.recipe import ArchiveSettings, PretrainRecipe
from resunet.config import Called
from resunet.data.cases import Case
from resunet.data.evidence import Evidence, comparable_groups
from resunet.data.leakage import NO_GROUP_EVIDENCE, find_leaks, refuse_leaks
from resunet.data.manifest_source import ManifestCases
from resunet.data.preparing import Looked, Prepared, evidence_of_scans, look_at_cases, prepare_scans
from resunet.data.scans import Scans
from resunet.data.source import Source, assign_parts, open_source
from resunet.data.store import Store
from resunet.errors import InputError
from resunet.progress import say
from resunet.ranks import in_shares, on_every_rank


@dataclass(frozen=True)
class Archive:
    """The scans, and what the guard and a reader of the results have to know of them.

    groups: a number for each scan's patient or item, the same on every rank.
    evidence: of the scans that are trained on, without thumbnails.
    digest: sha256 over the sorted hashes of the files: which images these are, whatever they are called.
    allowed: what the recipe let pass; complete on the main rank.
    """

    scans: Scans
    groups: NDArray[np.int64]
    evidence: Evidence
    digest: str
    notes: list[str]
    allowed: list[str]
    held_out_digest: str | None  # of data.held_out

    @property
    def num_groups(self) -> int:
        return len(self.evidence.table.column("group").unique())


def read_archive(recipe: PretrainRecipe, accelerator: Accelerator) -> Archive:
    """Check and prepare the recipe's archive; every rank reads its own share of the files.

    Raises:
        InputError: whatever is wrong with the source or a file of it; for a network of volumes, that there are none.
        CheckFailed: held-out images are in it.
        EnvironmentFault: the store's disk.
    """
    # to stratify, a folder's masks are needed; a manifest knows them, and opened with masks it would be its labelled scans only
    source = open_source(recipe.data, masks=recipe.data.stratify and recipe.data.source.suffix != ".parquet")
    if source.labelled:  # leave out what fine-tuning will hold out
        source = assign_parts(source, recipe.data.split_seed, recipe.data.stratify)
    other = _open_held_out(recipe.data)  # before much is read
    cases = source.part("pool") if len(source.part("pool", "val", "test")) else source.cases
    store = on_every_rank(partial(_open_store, recipe.data.store), accelerator)
    prepared = _prepare(recipe, cases, store, accelerator)
    if recipe.objective.position_threshold is not None:
        _refuse_without_places(recipe.objective.position_threshold, cases, prepared)
    evidence = _evidence(source, cases, [one.looked for one in prepared if one.looked is not None])
    groups, notes = _group_numbers(evidence), source.notes()
    if recipe.model.spatial_dims == 3:
        evidence, left_out = _of_volumes(evidence, cases, prepared, accelerator.is_main_process)
        notes += left_out
    allowed: list[str] = []
    held_out_digest = None
    for its_source in [source] if other is None else [source, other]:
        held_out = its_source.part("val", "test") if its_source is source else its_source.part("val", "test", None)
        its = _held_out_evidence(recipe, its_source, held_out, accelerator)
        held_out_digest = _digest(its) if its_source is other else None
        leaks = find_leaks(evidence, its) if accelerator.is_main_process else []
        refuse = partial(refuse_leaks, leaks, held_out, "held-out", "the pretraining archive", "leak" in recipe.allow)
        allowed += on_every_rank(refuse, accelerator)
        if not comparable_groups(evidence, its):
            allowed.append(NO_GROUP_EVIDENCE)
    return Archive(
        scans=Scans(cases, prepared, recipe.data.channels, recipe.normalisation, store, recipe.model.spatial_dims),
        groups=groups,
        evidence=replace(evidence, thumbnail=None),
        digest=_digest(evidence),
        notes=notes,
        allowed=allowed,
        held_out_digest=held_out_digest,
    )


def _digest(evidence: Evidence) -> str:
    """Of files, in whatever order they are read."""
    return sha256("".join(sorted(evidence.table.column("file_sha256").to_pylist())).encode()).hexdigest()


def _open_store(folder: Path | None) -> Store:
    """The store; where it is made, nobody else may look into it: it holds patients' scans."""
    folder = folder or user_cache_path("resunet") / "store"
    with suppress(OSError):  # Store says what is wrong
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Store(folder)


def _prepare(recipe: PretrainRecipe, cases: Sequence[Case], store: Store, accelerator: Accelerator) -> list[Prepared]:
    """Of every case, in their order; each rank prepares its share, and every machine's store holds the whole."""

    def prepare(chosen: Sequence[int]) -> Iterator[Prepared]:
        its = (cases[i] for i in chosen)
        return prepare_scans(its, recipe.data.channels, recipe.normalisation, store, recipe.model.spatial_dims)

    prepared = in_shares(prepare, len(cases), "read archive", accelerator)
    stored = sum(1 for one in prepared if one.key)
    if stored and accelerator.is_main_process:
        decoded = sum(one.decoded for one in prepared)
        say(f"store: {decoded:,} of {stored:,} scans decoded into {store.folder}, {stored - decoded:,} were there")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if ranks_here < accelerator.num_processes:  # other machines' ranks may have filled stores of their own
        share = range(accelerator.local_process_index, len(cases), ranks_here)
        missing = [i for i in share if prepared[i].key and prepared[i].key not in store]
        on_every_rank(lambda: list(prepare(missing)), accelerator)
    return prepared


def _refuse_without_places(threshold: float, cases: Sequence[Case], prepared: Sequence[Prepared]) -> None:
    """Raise InputError if no scan has slices whose places are known: nothing would be a positive by its place."""
    if any(one.is_volume for one in prepared) or any(case.position is not None for case in cases):
        return
    raise InputError(
        f"objective.position_threshold={threshold}: no scan of the archive is a volume, and none has a place in one. Add a column "
        "position to the source's groups.csv (stem,group,position; from 0 to 1, or the number of the slice), or set it to null."
    )


def _group_numbers(evidence: Evidence) -> NDArray[np.int64]:
    column = evidence.table.column("group").combine_chunks().dictionary_encode()
    numbers: NDArray[np.int64] = column.indices.to_numpy().astype(np.int64)
    return numbers


def _of_volumes(
    evidence: Evidence, cases: Sequence[Case], prepared: Sequence[Prepared], main: bool
) -> tuple[Evidence, list[str]]:
    """Without the images and single slices, of which an archive may have many, and what is to be said of them.

    Raises:
        InputError: there is nothing else.
    """
    rows = np.flatnonzero([one.is_volume for one in prepared])
    count = len(prepared) - len(rows)
    if not count:
        return evidence, []
    first = cases[next(i for i, one in enumerate(prepared) if not one.is_volume)].where()
    if not len(rows):
        raise InputError(
            f"model.spatial_dims=3: none of the {count} scans of the archive is a volume of more than one slice (the first: "
            f"{first}). Set model.spatial_dims=2, or give volumes: slices in files of their own are one only as a DICOM series."
        )
    note = f"{count:,} of {len(prepared):,} scans are images or single slices, and were left out: model.spatial_dims=3."
    if main:
        say(f"{note} The first: {first}")
    thumbnail = evidence.thumbnail
    assert thumbnail is not None
    return Evidence(evidence.table.take(pa.array(rows)), evidence.salt_fingerprint, lambda i: thumbnail(int(rows[i]))), [note]


def _open_held_out(settings: ArchiveSettings) -> Source | None:
    """data.held_out: without a split all of it must not be in the archive."""
    if settings.held_out is None:
        return None
    data = settings.model_copy(update={"source": Path(settings.held_out), "splits": None})
    return open_source(data, masks=False, called=Called(source="data.held_out="))


def _held_out_evidence(recipe: PretrainRecipe, source: Source, cases: Sequence[Case], accelerator: Accelerator) -> Evidence:
    looked: list[Looked] = []
    if not isinstance(cases, ManifestCases):
        look = partial(_look, cases, recipe.data.channels)
        looked = in_shares(look, len(cases), "read held-out images", accelerator)
    return _evidence(source, cases, looked)


def _look(cases: Sequence[Case], channels: str | int, chosen: Sequence[int]) -> Iterator[Looked]:
    return look_at_cases((cases[i] for i in chosen), channels)


def _evidence(source: Source, cases: Sequence[Case], looked: Sequence[Looked]) -> Evidence:
    if isinstance(cases, ManifestCases):
        return cases.evidence()
    return evidence_of_scans(cases, looked, source.salt_fingerprint)
