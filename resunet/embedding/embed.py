"""`resunet embed`: an archive → E.parquet. One process."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from resunet.checkpoint import WEIGHTS, model_folder
from resunet.config import Called, DataSettings
from resunet.data.cases import Case
from resunet.data.source import Source, open_source
from resunet.embedding.features import Embedder, EmbeddingSettings, ScanFeatures, embed_cases
from resunet.embedding.table import EmbeddingRecord, writing_embeddings
from resunet.errors import InputError
from resunet.feature_extractor import load_encoder
from resunet.files import refuse_taken, sha256
from resunet.progress import progress, say


class EmbedRequest(EmbeddingSettings):
    """What `resunet embed` takes beside model and output."""

    called: ClassVar = Called("--data ", salt_file="--salt-file ")
    source: Path
    splits: Path | None = None
    names: Literal["hash", "keep"] = "hash"
    salt_file: Path | None = None
    per_slice: bool = False


@dataclass(frozen=True)
class Embedded:
    """What an embedding came to. faults: a message for each scan that is not in the table."""

    out: Path
    scans: int
    faults: tuple[str, ...]


def embed(model: Path, out: Path, request: EmbedRequest) -> Embedded:
    """Embed every scan of a source; scans that cannot be read are said as they come up, left out, and returned.

    Args:
        model: a pretraining or fine-tuning run, or a model directory.
        out: a file that does not exist.

    Raises:
        InputError: the model, the source, `out`, or not one scan that could be read.
        EnvironmentFault: fp16 without a GPU.
    """
    refuse_taken(out, what="file")
    embedder = load_embedder(model, request)
    source = open_to_embed(embedder, request)
    return write_embeddings(model, embedder, source, out, request)


def load_embedder(model: Path, settings: EmbeddingSettings) -> Embedder:
    """The encoder of a model, ready to embed.

    Raises:
        InputError: no such model, or several ranks.
        EnvironmentFault: fp16 without a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("embedding is the work of one process: start it without a launcher.")
    return Embedder(*load_encoder(model), settings)


def open_to_embed(embedder: Embedder, request: EmbedRequest) -> Source:
    """The source, read as the encoder was trained; masks are not.

    Raises:
        InputError: whatever is wrong with it.
    """
    settings = DataSettings(
        source=request.source,
        splits=request.splits,
        channels=embedder.config.input_channels,
        names=request.names,
        salt_file=request.salt_file,
    )
    return open_source(settings, masks=False, called=request.called)


def write_embeddings(model: Path, embedder: Embedder, source: Source, out: Path, request: EmbedRequest) -> Embedded:
    """E.parquet of an open source; see `embed`."""
    if request.per_slice and embedder.spatial_dims == 3:
        raise InputError("--per-slice: the model is one of volumes (spatial_dims=3), which sees no slices. Leave it out.")
    record = EmbeddingRecord(
        model_sha256=sha256(model_folder(model) / WEIGHTS),
        salt_fingerprint=source.salt_fingerprint,
        dims=embedder.dims,
        spatial_dims=embedder.spatial_dims,
        input_channels=embedder.config.input_channels,
        normalisation=embedder.config.normalisation,
        longest=embedder.longest,
        precision=request.precision,
        row="slice" if request.per_slice else "scan",
        names=request.names,
        groups_known=source.has_groups,
        has_splits=source.has_splits,
    )
    cases = SortedCases(source.cases)
    faults: list[str] = []

    def fault(message: str) -> None:
        faults.append(message)
        say(message)

    rows = scan_rows if request.per_slice is False else slice_rows
    say(f"one process on {embedder.device.type}, {len(cases):,} scans, {request.precision}, batch {request.batch}")
    with writing_embeddings(out, record) as writer:
        found = progress(embed_cases(embedder, cases, fault), len(cases), "embed")
        for case, features in zip(cases, found, strict=True):
            if features is not None:
                writer.add(rows(case, source.has_mask(case), features))
        if len(faults) == len(cases):
            raise InputError(f"none of {len(faults)} scans could be embedded; the first: {faults[0]}")
    return Embedded(out, len(cases) - len(faults), tuple(faults))


class SortedCases(Sequence[Case]):
    """Cases by their ids, without holding them: a manifest makes each when it is asked for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases
        ids = [case.id for case in cases]
        self._order = sorted(range(len(ids)), key=ids.__getitem__)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Case:  # type: ignore[override]
        return self._cases[self._order[place]]


def scan_rows(case: Case, labelled: bool, features: ScanFeatures) -> list[dict[str, Any]]:
    """One row, the mean over the pieces."""
    return [_row(case, labelled) | {"slices": len(features.vectors), "embedding": features.mean}]


def slice_rows(case: Case, labelled: bool, features: ScanFeatures) -> list[dict[str, Any]]:
    """A row a slice with content."""
    return [
        _row(case, labelled) | {"slice": index, "position": _place(case, features, i), "embedding": features.vectors[i]}
        for i, index in enumerate(features.indices)
    ]


def _place(case: Case, features: ScanFeatures, piece: int) -> float | None:
    """Of a slice in its volume, or what an image's case says."""
    position = features.positions[piece]
    return case.position if math.isnan(position) else position


def _row(case: Case, labelled: bool) -> dict[str, Any]:
    return {"id": case.id, "group": case.group_hmac, "split": case.part, "labelled": labelled}
