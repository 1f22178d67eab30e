"""One probe scan with what the probe made of it before the first step and at the last, for a person to compare."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.probe.scans import ProbeScan, ProbeScans
from resunet.data.cases import IGNORE
from resunet.files import file_aside
from resunet.pictures import grey_of, label_picture, side_by_side, tint

_FOLDER = "probe"
_WIDTH = 256  # pixels that a small scan is enlarged to


def save_prediction(out: Path, scans: ProbeScans, predicted: Sequence[NDArray[np.uint8]], step: int) -> None:
    """probe/first.png before the first step, probe/last.png after any other: class indices of the scan that is shown."""
    number = _shown(scans)
    scan, grid = scans.scans[number], predicted[number]
    rows = [np.arange(n) * have // n for n, have in zip(scan.labels.shape, grid.shape, strict=True)]
    folder = out / _FOLDER
    folder.mkdir(exist_ok=True)
    with file_aside(folder / ("first.png" if step == 0 else "last.png")) as aside:
        Image.fromarray(_flat(scan, grid[np.ix_(*rows)])).save(aside, "PNG")


def draw_predictions(out: Path, scans: ProbeScans) -> NDArray[np.uint8]:
    """The scan beside its truth, and below them the two predictions in the colours of errors; a wrong class is a false alarm."""
    scan = scans.scans[_shown(scans)]
    values = scan.values if scan.labels.ndim == 2 else scan.values[:, _layer(scan)]
    truth, grey = _flat(scan, scan.labels), grey_of(values)
    row = [grey, label_picture(grey, truth)]
    for name in ("first.png", "last.png"):
        with Image.open(out / _FOLDER / name) as file:
            row.append(_errors(grey, truth, np.asarray(file)))
    scale = max(1, _WIDTH // grey.shape[1])
    large = [picture.repeat(scale, axis=0).repeat(scale, axis=1) for picture in row]
    halves = [side_by_side(large[:2]), side_by_side(large[2:])]
    gap = np.full((4, *halves[0].shape[1:]), 255, np.uint8)
    return np.concatenate([halves[0], gap, halves[1]])


def _errors(grey: NDArray[np.uint8], truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.uint8]:
    counted, right = truth != IGNORE, truth == predicted
    found = {"found": right & (truth > 0), "false": ~right & (predicted > 0), "missed": ~right & (predicted == 0)}
    return tint(grey, {name: where & counted for name, where in found.items()})


def _shown(scans: ProbeScans) -> int:
    """The scan with most foreground."""
    return int(np.argmax([np.count_nonzero((scan.labels > 0) & (scan.labels != IGNORE)) for scan in scans.scans]))


def _layer(scan: ProbeScan) -> int:
    """Of a volume, the layer with most foreground."""
    return int(np.argmax(((scan.labels > 0) & (scan.labels != IGNORE)).sum(axis=(1, 2))))


def _flat(scan: ProbeScan, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return labels if labels.ndim == 2 else labels[_layer(scan)]
