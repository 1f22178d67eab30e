"""The objects that a prediction got wrong, as a person looks at them: the largest first, each with a crop around it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from finetune.evaluation.metrics import CaseMeasures
from finetune.evaluation.overlay import grey_picture, square
from finetune.evaluation.targets import Targets
from finetune.evaluation.wrong import WrongLesion, wrong_lesions
from resunet.data.cases import IGNORE, LoadedCase, take_slice
from resunet.pictures import COLOURS, side_by_side
from resunet.plain import number_of

SHOWN = 12  # of each kind
_PANEL = 112  # pixels a side of a thumbnail's parts
_SMALLEST_CROP = 28  # pixels of the scan
_OTHERS = (255, 255, 255)

Kind = Literal["missed", "false"]


@dataclass(frozen=True)
class WrongObject:
    """One object and its picture: scan, truth and prediction, the object's outline in its colour, others' in white.

    target: which of the `Targets` it is of. size: voxels; volume: mm³, of an image mm², None where nobody gave a spacing. index:
    the slice that is shown, None of an image.
    """

    kind: Kind
    case_id: str
    target: int
    size: int
    volume: float | None
    is_volume: bool
    index: int | None
    picture: NDArray[np.uint8]


@dataclass(frozen=True)
class Wanted:
    """Which objects of a case are shown: for (kind, target) how many, the largest first."""

    counts: dict[tuple[Kind, int], int]


def sizes_of(measures: CaseMeasures, kind: Kind) -> Iterable[tuple[int, int]]:
    """(voxels, target) of every object of a case that is wrong."""
    for target, its in enumerate(measures.classes):
        if kind == "false":
            yield from ((size, target) for size in its.false_sizes)
        else:
            yield from ((size, target) for size, found in zip(its.lesion_sizes, its.lesion_found, strict=True) if not found)


def largest_wrong(cases: Sequence[CaseMeasures], shown: int = SHOWN) -> dict[int, Wanted]:
    """The cases, by their position, that hold the `shown` largest missed objects or the `shown` largest false ones."""
    wanted: dict[int, Wanted] = {}
    for kind in ("missed", "false"):
        every = [(-size, i, target) for i, case in enumerate(cases) for size, target in sizes_of(case, kind)]
        for _, i, target in sorted(every)[:shown]:
            counts = wanted.setdefault(i, Wanted({})).counts
            counts[kind, target] = counts.get((kind, target), 0) + 1
    return wanted


def wrong_objects(
    case: LoadedCase, predicted: NDArray[np.uint8], voxel: float, wanted: Wanted, targets: Targets
) -> list[WrongObject]:
    """The wanted objects of a case with their pictures. voxel: mm³, of an image mm²."""
    assert case.labels is not None
    lesions = {
        target: sorted(
            wrong_lesions(targets.mask(case.labels, target), targets.mask(predicted, target), case.axis),
            key=lambda one: -one.voxels,
        )
        for target in {target for _, target in wanted.counts}
    }
    found = []
    for (kind, target), count in wanted.counts.items():
        its = [one for one in lesions[target] if one.kind == kind]
        assert len(its) >= count, "the same prediction as was measured"
        found += [
            WrongObject(
                kind=kind,
                case_id=case.case.id,
                target=target,
                size=one.voxels,
                volume=one.voxels * voxel if case.in_mm else None,
                is_volume=case.axis is not None,
                index=None if case.axis is None else one.index,
                picture=_thumbnail(case, predicted, one),
            )
            for one in its[:count]
        ]
    return found


def _thumbnail(case: LoadedCase, predicted: NDArray[np.uint8], lesion: WrongLesion) -> NDArray[np.uint8]:
    """Scan, truth and prediction around an object, (y, x, 3)."""
    truth, guess = case.label_slice(lesion.index), take_slice(predicted, case.axis, lesion.index)
    side = max(_SMALLEST_CROP, *(2 * (part.stop - part.start) for part in lesion.box))
    box = square(lesion.box, side, truth.shape)
    own = lesion.region(truth.shape)[box]
    truth, guess = truth[box], guess[box]
    grey = grey_picture(case, lesion.index)[box]
    factor = _PANEL / max(own.shape)
    size = (round(own.shape[1] * factor), round(own.shape[0] * factor))
    panel = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX))
    counted = truth != IGNORE

    def outlined(labels: NDArray[np.uint8], holds_it: bool) -> NDArray[np.uint8]:
        others = counted & (labels != 0) & ~(own if holds_it else np.zeros_like(own))
        out = _outline(panel, _resized(others, size), _OTHERS, 1)
        return _outline(out, _resized(own, size), COLOURS[lesion.kind], 2) if holds_it else out

    missed = lesion.kind == "missed"
    return side_by_side([panel, outlined(truth, missed), outlined(guess, not missed)])


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def _outline(
    picture: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int], width: int
) -> NDArray[np.uint8]:
    """A line inside the rim of a mask."""
    out = picture.copy()
    out[mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=1)] = colour
    return out


def caption_of(one: WrongObject, targets: Targets) -> str:
    """An object in words: what it is, size, case."""
    unit = "mm³" if one.is_volume else "mm²"
    size = number_of(one.size, "voxel" if one.is_volume else "pixel")
    place = "" if one.index is None else f", slice {one.index}"
    volume = "" if one.volume is None else f", {one.volume:,.4g} {unit}"
    return f"{targets.names[one.target]}: {size}{volume}; {one.case_id}{place}"
