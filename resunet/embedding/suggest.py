"""`resunet suggest`: which groups to label next, so that what is labelled covers the archive."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from resunet.checkpoint import WEIGHTS, model_folder
from resunet.config import Called
from resunet.data.cases import Case
from resunet.data.source import Source
from resunet.embedding.coverage import Chosen, Method, choose, cover, random_covers
from resunet.embedding.embed import EmbedRequest, load_embedder, open_to_embed, write_embeddings
from resunet.embedding.features import Embedder
from resunet.embedding.groups import Groups, groups_of, read_labelled_list, unit
from resunet.embedding.picture import thumbnail
from resunet.embedding.sheet import Suggestions, write_sheet
from resunet.embedding.table import Embeddings, read_embeddings
from resunet.errors import InputError
from resunet.files import folder_aside, refuse_taken, sha256
from resunet.runtime import normalise

_DRAWS = 100  # random choices that the suggestions stand beside
_SIDE = 224  # pixels, of a picture on the sheet
EMBEDDINGS, SUGGESTIONS, LABELLED = "embeddings.parquet", "suggestions.csv", "labelled.csv"


class SuggestRequest(EmbedRequest):
    """What `resunet suggest` takes beside model and output."""

    called: ClassVar = Called("SOURCE ", salt_file="--salt-file ")
    budget: int = Field(ge=1, description="groups to suggest")
    method: Method = "typicality"
    labelled: Path | None = Field(None, description="who is labelled; null: groups with a mask")
    embeddings: Path | None = Field(None, description="of the same model and source, by resunet embed; null: they are computed")


@dataclass(frozen=True)
class Suggested:
    """lines: a scan each, for the terminal: rank, group, path. faults: a message for each scan that could not be embedded."""

    lines: list[str]
    faults: tuple[str, ...]


def suggest(model: Path, out: Path, request: SuggestRequest) -> Suggested:
    """Write suggestions.csv, labelled.csv, report.html and embeddings.parquet into `out`.

    labelled.csv: who will be labelled when the suggested groups are, for `--labelled` of the next round. The lines for the terminal
    hold paths, the files do not.

    Args:
        model: a pretraining or fine-tuning run, or a model directory.
        out: a folder that does not exist.

    Raises:
        InputError: the model, the source, `out`, embeddings of something else, or fewer unlabelled groups than the budget.
        EnvironmentFault: fp16 without a GPU.
    """
    refuse_taken(out)
    given = _given(model, request)
    embedder = load_embedder(model, request)
    source = open_to_embed(embedder, request)
    faults: tuple[str, ...] = ()
    with folder_aside(out) as aside:
        if given is None:
            faults = write_embeddings(model, embedder, source, aside / EMBEDDINGS, request).faults
            given = read_embeddings(aside / EMBEDDINGS)
        cases = _cases_of(source, given, request)
        groups = _groups(source, given, request)
        free = int((~groups.labelled).sum())
        if request.budget > free:
            raise InputError(
                f"--budget {request.budget}: there are {free} unlabelled groups outside val and test"
                + (
                    f" ({int(groups.labelled.sum())} are labelled; --labelled says otherwise)."
                    if groups.labelled.any()
                    else "."
                )
            )
        chosen = choose(request.method, groups.points, groups.labelled, request.budget)
        found = _suggestions(embedder, given, cases, groups, chosen, request, source)
        _write_csv(aside / SUGGESTIONS, given, groups, chosen)
        _write_labelled(aside / LABELLED, groups, chosen)
        write_sheet(aside / "report.html", found)
    lines = [
        f"{place}\t{groups.names[number]}\t{cases[row].where()}"
        for place, number in enumerate(chosen.order, 1)
        for row in groups.rows[number]
    ]
    return Suggested(lines, faults)


def _given(model: Path, request: SuggestRequest) -> Embeddings | None:
    """The embeddings that were given, if they are this model's."""
    if request.embeddings is None:
        return None
    found = read_embeddings(request.embeddings)
    if found.record.row != "scan":
        raise InputError(f"--embeddings {request.embeddings}: has a row a slice. Make it without --per-slice.")
    if found.record.model_sha256 != sha256(model_folder(model) / WEIGHTS):
        raise InputError(f"--embeddings {request.embeddings}: is of another model than {model}. Leave it out, or make it anew.")
    return found


def _cases_of(source: Source, given: Embeddings, request: SuggestRequest) -> list[Case]:
    """The case of every row of the table."""
    case_of = {case.id: case for case in source.cases}
    ids = given.column("id")
    if given.record.salt_fingerprint != source.salt_fingerprint or not set(ids) <= set(case_of):
        raise InputError(
            f"--embeddings {request.embeddings}: has scans that {request.source} does not have (or ids of another salt). Make it "
            f"anew: resunet embed MODEL --data {request.source}"
        )
    return [case_of[one] for one in ids]


def _groups(source: Source, given: Embeddings, request: SuggestRequest) -> Groups:
    """As the source says it now: embeddings may be older than its masks and its split."""
    masked = {case.group_hmac for case in source.cases if source.has_mask(case)}
    held_out = {case.group_hmac for case in source.cases if case.part in ("val", "test")}
    if request.labelled is None:
        return groups_of(given, masked, held_out)
    listed = read_labelled_list(request.labelled)
    by_name: dict[str, str] = {}
    for case in source.cases:
        if listed.by == "stem":
            by_name[case.stem] = case.group_hmac
        else:
            by_name |= {case.group_name: case.group_hmac, case.group_hmac: case.group_hmac}
            by_name[source.salt.identify("group", case.group_name)] = case.group_hmac
    salted = {name: source.salt.identify("group", name) for name in listed.labelled}  # of a manifest, which knows HMACs only
    found = {name: by_name.get(name, by_name.get(salted[name], "")) for name in listed.labelled}
    unknown = sorted(name for name, group in found.items() if not group)
    if unknown:
        raise InputError(
            f"--labelled {request.labelled}: {len(unknown)} of {len(found)} {listed.by}s are not in {request.source}, for example "
            f"{unknown[0]!r}. Groups are named as in groups.csv, or as in suggestions.csv."
        )
    held_out |= {by_name[name] for name in listed.held_out if name in by_name}
    return groups_of(given, masked, held_out, set(found.values()))


def _suggestions(
    embedder: Embedder,
    given: Embeddings,
    cases: Sequence[Case],
    groups: Groups,
    chosen: Chosen,
    request: SuggestRequest,
    source: Source,
) -> Suggestions:
    labelled = np.flatnonzero(groups.labelled)
    notes = [] if source.has_groups else source.notes()[:1]
    if groups.held_out:
        notes.append(
            f"{groups.held_out} groups of val and test are left out: they are neither suggested nor counted as covered."
        )
    if groups.empty:
        notes.append(f"{groups.empty} groups have no content and are left out.")
    if forgotten := int((groups.masked & ~groups.labelled).sum()):
        notes.append(f"{forgotten} groups have a mask and are not among those that --labelled names: they count as unlabelled.")
    if missing := len(source.cases) - len(cases):
        why = "could not be embedded" if request.embeddings is None else "are not in --embeddings"
        notes.append(f"{missing} scans {why}: they are neither suggested nor counted as covered.")
    return Suggestions(
        method=request.method,
        groups=groups,
        chosen=chosen,
        before=cover(groups.points, labelled) if len(labelled) else None,
        after=cover(groups.points, [*labelled.tolist(), *chosen.order]),
        at_random=random_covers(groups.points, groups.labelled, request.budget, _DRAWS),
        thumbnails=[_typical_slice(embedder, cases[_typical_scan(given, groups, number)]) for number in chosen.order],
        notes=notes,
    )


def _typical_scan(given: Embeddings, groups: Groups, number: int) -> int:
    """The row of a group's scan that is nearest to the group's mean."""
    rows = groups.rows[number]
    vectors = given.table.column("embedding").take(rows).combine_chunks().flatten().to_numpy()
    return rows[int((unit(vectors.reshape(len(rows), -1)) @ groups.points[number]).argmax())]


def _typical_slice(embedder: Embedder, case: Case) -> NDArray[np.uint8]:
    """A picture of the slice that is nearest to the mean of its scan; of a 3D encoder's volume the middle one."""
    scan = embedder.read(case)
    if embedder.spatial_dims == 2:
        features = next(iter(embedder.embed([embedder.pieces(scan)])))
        index = features.indices[int((unit(features.vectors) @ unit(features.vectors).mean(axis=0)).argmax())]
    else:
        assert scan.axis is not None
        index = scan.values.shape[1 + scan.axis] // 2
    values = scan.values if index is None or scan.axis is None else scan.values.take(index, axis=1 + scan.axis)
    return thumbnail(normalise(values, scan.intensities), _SIDE)


def _write_csv(path: Path, given: Embeddings, groups: Groups, chosen: Chosen) -> None:
    ids = given.column("id")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "group", "score", "scans", "ids"])
        for rank, (number, score) in enumerate(zip(chosen.order, chosen.scores, strict=True), 1):
            rows = groups.rows[number]
            shown = "" if np.isnan(score) else f"{score:.6g}"
            writer.writerow([rank, groups.names[number], shown, len(rows), " ".join(ids[row] for row in rows)])


def _write_labelled(path: Path, groups: Groups, chosen: Chosen) -> None:
    """A row for every group that is labelled, and for every one that was suggested."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "suggested"])
        writer.writerows([groups.names[number], 0] for number in np.flatnonzero(groups.labelled))
        writer.writerows([groups.names[number], 1] for number in chosen.order)
