"""Masks that another program made, as predictions: one a case, on its image's grid, in the truth's values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.metrics import measure_targets
from finetune.evaluation.outputs import FLAGS, EvaluateRequest, Measured, cases_of_split, new_folder, write
from finetune.evaluation.targets import targets_of
from resunet.config import PercentileZScore
from resunet.data.cases import Case, LoadedCase, encode_labels, load_cases
from resunet.data.images import READABLE, read_mask, read_scan, stem_of, suffix_of
from resunet.data.nnunet import channels_of, is_nnunet
from resunet.data.source import open_source
from resunet.errors import InputError
from resunet.progress import progress, say

R = TypeVar("R")
Progress = Callable[[Iterable[R], int], Iterable[R]]

_UNKNOWN = "Not known: the masks are counted as the other program made them."
_SHOWN = 20
_MOST_CLASSES = 254
_SAME_SPACING = 1e-3  # of it
_WITHOUT_SPACING = ("png", "jpeg", "tiff", "bmp")
_ENDINGS = (*(f".{one}" for one in _WITHOUT_SPACING), ".jpg", ".tif")


@dataclass(frozen=True)
class Predictions:
    """The masks of some cases. of: case id → file; extra: files that belong to none of the source's cases."""

    of: Mapping[str, Path]
    extra: tuple[Path, ...]

    def read(self, case: LoadedCase, classes: Mapping[int, str]) -> NDArray[np.uint8]:
        """The class indices predicted for a case.

        Raises:
            InputError: unreadable, another shape or spacing than the image, or a value that the truth does not have.
        """
        path = self.of[case.case.id]
        mask = read_mask(path)
        if mask.values.shape != case.size:
            raise InputError(
                f"{path}: the prediction is {_size(mask.values.shape)}, its image {_size(case.size)}. Write predictions on their "
                "image's own grid."
            )
        compared = mask.format not in _WITHOUT_SPACING and not case.case.files[0].name.lower().endswith(_ENDINGS)
        if compared and not np.allclose(mask.spacing, case.spacing, rtol=_SAME_SPACING, atol=0):
            raise InputError(
                f"{path}: the prediction has a spacing of {_numbers(mask.spacing)} mm, its image {_numbers(case.spacing)} mm. "
                "Write predictions with their image's geometry."
            )
        strange = sorted({int(value) for value in np.unique(mask.values)} - set(classes))
        if strange:
            raise InputError(
                f"{path}: the prediction holds {_listed(map(str, strange))}, the source's masks only "
                f"{_listed(map(str, classes))}. Write predictions with the masks' own values."
            )
        return encode_labels(mask.values, classes, (), path)


def find_predictions(folder: Path, cases: Sequence[Case], known: Sequence[Case]) -> Predictions:
    """The masks below a folder for some of a source's cases, by their stems.

    known: all cases of the source: a mask for one of them that is not among `cases` is not extra.

    Raises:
        InputError: no mask, two of one stem, cases that share a stem, or cases without a mask: all that fit into a message.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or suffix_of(path) not in READABLE or path.name.startswith("."):
            continue
        stem = str(path.parent.relative_to(folder) / stem_of(path))
        if stem in files:
            raise InputError(f"{path}: {files[stem].name} has the same stem. A prediction is one file: remove one.")
        files[stem] = path
    if not files:
        raise InputError(
            f"{folder}: holds neither a model (config.json) nor masks. Give a fine-tuning run, a model directory, or a folder "
            f"of predictions with the images' stems ({', '.join(READABLE)})."
        )
    stems = [case.stem for case in cases]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []:
        raise InputError(f"{len(twice)} stems belong to several cases: {_listed(twice)}. Predictions are matched by stem.")
    if missing := [stem for stem in stems if stem not in files]:
        raise InputError(
            f"{folder}: has no prediction for {len(missing)} of {len(stems)} cases: {_listed(missing)}. Predict them too: a case "
            "that is left out is no better than a missed one."
        )
    every = {case.stem for case in known}
    extra = tuple(path for stem, path in files.items() if stem not in every)
    return Predictions({case.id: files[case.stem] for case in cases}, extra)


def classes_of_masks(root: Path, cases: Sequence[Case], ignore: Sequence[int], progress: Progress[set[int]]) -> dict[int, str]:
    """The values found in the masks of a source, 0 the background first, each named by itself; `ignore` left out.

    Raises:
        InputError: an unreadable mask, nothing but background, or too many values for classes.
    """
    with ThreadPoolExecutor() as pool:
        found: set[int] = set().union(*progress(pool.map(_values, [case.mask for case in cases]), len(cases)))
    values = sorted(found - set(ignore) - {0})
    if not values:
        raise InputError(f"{FLAGS.source}{root}: the masks hold nothing but background: there is no class to evaluate.")
    if len(values) >= _MOST_CLASSES:
        raise InputError(
            f"{FLAGS.source}{root}: the masks hold {len(values)} values besides 0; at most {_MOST_CLASSES - 1} classes can be "
            "evaluated. Are they numbers of objects? Write classes instead."
        )
    return {0: "background"} | {value: str(value) for value in values}


def evaluate_masks(folder: Path, request: EvaluateRequest, out: Path | None) -> Path:
    """Evaluate masks that another program made; see `finetune.evaluation.evaluate.evaluate`."""
    out = new_folder(
        out if out is not None else folder.resolve().with_name(f"{folder.resolve().name}-evaluation-{request.split}")
    )
    if request.false_alarms_per_1000 is not None:
        raise InputError(
            f"--false-alarms-per-1000 {request.false_alarms_per_1000:g}: {folder} holds masks and no model: there are no "
            "probabilities to set a threshold for. Leave the option out."
        )
    channels = channels_of(request.source) if is_nnunet(request.source) else request.channels
    source = open_source(request.model_copy(update={"channels": channels}), masks=True, called=FLAGS)
    cases, notes = cases_of_split(source, request)
    predictions = find_predictions(folder, cases, source.cases)
    notes.append(f"The predictions are masks of another program, {len(cases)} of them. What it was trained on is not known.")
    if predictions.extra:
        names = f": {', '.join(path.name for path in predictions.extra[:20])}"
        notes.append(f"{len(predictions.extra)} predictions belong to no case{names if request.names == 'keep' else ''}.")
    for note in notes:
        say(note)
    classes = classes_of_masks(
        request.source, source.cases, request.ignore, lambda items, total: progress(items, total, "read masks")
    )
    loaded = load_cases(
        cases,
        _channels_to_show(cases[0]),
        PercentileZScore(),
        classes,
        request.ignore,
        progress=lambda items, total: progress(items, total, "read"),
    )
    measured, targets = [], targets_of(classes)
    for case in progress(loaded, len(loaded), "evaluate"):
        assert case.labels is not None
        predicted = predictions.read(case, classes)
        measured.append(Measured(case, measure_targets(case.labels, predicted, targets, case.spacing, request.tolerance)))
    title = f"Evaluation of masks on {request.split}"

    def predict(case: LoadedCase) -> NDArray[np.uint8]:
        return predictions.read(case, classes)

    write(out, measured, targets, request.split, notes, None, predict, postprocessing=_UNKNOWN, title=title)
    return out


def _channels_to_show(case: Case) -> str | int:
    """Channels for a picture: grey where that can be made of them, else as many as the first case has."""
    if case.file_per_channel:
        return len(case.files)
    count = read_scan(case.files if len(case.files) > 1 else case.files[0], None).values.shape[0]
    return "grey" if count in (1, 3) else count


def _values(path: Path | None) -> set[int]:
    assert path is not None, "the source was opened with masks=True"
    return {int(value) for value in np.unique(read_mask(path).values)}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _size(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
