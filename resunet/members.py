"""From finished runs to one ensemble: what its members must have in common, and the record of all that they have seen."""

from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from resunet.checkpoint import WEIGHTS, LabelledGroups, ModelConfig, Provenance, model_folder, read_config
from resunet.data.evidence import Evidence
from resunet.data.leakage import ARCHIVE, NO_GROUP_EVIDENCE, merge_archives, read_archive, write_archive
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.files import folder_aside, joined_sha256, refuse_taken, sha256
from resunet.machine import versions
from resunet.model import load_model

# What members may differ in; all else of their config.json must be equal. What each one's val chose for it says nothing of all.
_OWN = {"spacing", "provenance", "allowed", "postprocessing", "operating_point"}


def make_ensemble(runs: Sequence[Path], out: Path) -> Path:
    """Write the ensemble of finished runs as a model directory; `out`.

    Args:
        runs: run directories or model directories of segmenters.
        out: a new folder.

    Raises:
        InputError: `out` exists, or as `join_members`.
    """
    refuse_taken(out)
    ensemble, archive = join_members(runs)
    write_ensemble(out, ensemble, archive)
    return out


def join_members(runs: Sequence[Path]) -> tuple[Ensemble, Evidence]:
    """The ensemble of finished runs, and what any member was trained on.

    Raises:
        InputError: fewer than two, one twice, one that is no segmenter or has no record of what it has seen, or networks that
            differ in architecture, classes, regions, normalisation or channels.
    """
    if len(runs) < 2:
        raise InputError(f"an ensemble has at least two members, {len(runs)} given. Name more runs.")
    folders = [model_folder(run) for run in runs]
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.architecture.name == Ensemble.kind:
            raise InputError(f"{folder}: is an ensemble itself. Name the runs of its members instead.")
        if config.classes is None:
            raise InputError(f"{folder}: is an encoder, which segments nothing. Fine-tune it, and name those runs.")
        if not (folder / ARCHIVE).is_file():
            raise InputError(
                f"{folder}: has no {ARCHIVE}, so that nobody could tell what the ensemble was trained on. Give a run of "
                "resunet finetune, or the model/ folder that it wrote."
            )
        _refuse_differences(folders[0], configs[0], folder, config)
    weights = [sha256(folder / WEIGHTS) for folder in folders]
    for number, digest in enumerate(weights):
        if digest in weights[:number]:
            raise InputError(f"{folders[number]}: has the weights of {folders[weights.index(digest)]}. Name each run once.")
    archives = [read_archive(folder) for folder in folders]
    ensemble = Ensemble([load_model(folder) for folder in folders]).eval()
    allowed = [one for config in configs for one in config.allowed]
    if len({archive.salt_fingerprint for archive in archives}) > 1:
        allowed.append(NO_GROUP_EVIDENCE)
    ensemble.config = _joined(configs, weights, ensemble, list(dict.fromkeys(allowed)))
    return ensemble, reduce(merge_archives, archives)


def write_ensemble(folder: Path, ensemble: Ensemble, archive: Evidence) -> None:
    """config.json, model.safetensors and archive.parquet, whole or not at all."""
    with folder_aside(folder) as aside:
        ensemble.save_pretrained(aside)
        write_archive(aside / ARCHIVE, archive)


def _refuse_differences(first: Path, its: ModelConfig, other: Path, theirs: ModelConfig) -> None:
    ours, given = (_flat(config.model_dump(mode="json", exclude=_OWN)) for config in (its, theirs))
    differing = sorted(key for key in ours.keys() | given.keys() if ours.get(key) != given.get(key))
    if differing:
        lines = "\n".join(f"  {key}: {ours.get(key)} there, {given.get(key)} here" for key in differing)
        raise InputError(
            f"{other}: cannot be in one ensemble with {first}:\n{lines}\n"
            "Members see a scan alike and answer alike: train them with the same architecture, channels, classes, regions and "
            "normalisation."
        )


def _joined(configs: Sequence[ModelConfig], weights: Sequence[str], ensemble: Ensemble, allowed: list[str]) -> ModelConfig:
    known = [config.provenance for config in configs]
    data = [one.data_sha256 for one in known if one.data_sha256 is not None]
    planes = [config.spacing for config in configs if config.spacing is not None]
    return ModelConfig(
        **configs[0].model_dump(exclude={*_OWN, "architecture"}),
        architecture=ensemble.config.architecture,
        spacing=tuple(float(s) for s in np.median(planes, axis=0)) if len(planes) == len(configs) else None,
        provenance=Provenance(
            data_sha256=joined_sha256(list(dict.fromkeys(data))) if len(data) == len(configs) else None,
            recipe_sha256=_common([one.recipe_sha256 for one in known]),
            parent_sha256=_common([one.parent_sha256 for one in known]),
            members_sha256=tuple(weights),
            teacher_sha256=_common([one.teacher_sha256 for one in known]),
            labels=join_labels([labels for one in known for labels in one.labels]),
            versions=versions(),
        ),
        allowed=allowed,
    )


def join_labels(labels: Iterable[LabelledGroups]) -> tuple[LabelledGroups, ...]:
    """Labelled groups, each once, for each salt."""
    by_salt: dict[str, set[str]] = {}
    for one in labels:
        by_salt.setdefault(one.salt_fingerprint, set()).update(one.groups)
    return tuple(
        LabelledGroups(groups=tuple(sorted(groups)), salt_fingerprint=salt) for salt, groups in sorted(by_salt.items())
    )


def _common(values: Sequence[str | None]) -> str | None:
    """What all have; None where they differ."""
    return values[0] if len(set(values)) == 1 else None


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; classes as a list, because their order is that of the logits; regions whole."""
    if not isinstance(values, dict) or key == "regions":
        return {key: values}
    if key == "classes":
        return {key: list(values.items())}
    return {name: one for part, its in values.items() for name, one in _flat(its, f"{key}.{part}" if key else part).items()}
