"""The lesions that a prediction got wrong: missed ones of the truth, false ones of the prediction, and where they are.

Found and matched as `finetune.evaluation.metrics` does: connected components of one class, 8-connected in 2D and 26-connected in
3D; a lesion is wrong if it shares no voxel of its class with the other side. What the truth ignores is on neither side.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from finetune.evaluation.lesions import components_of
from resunet.data.cases import IGNORE

Kind = Literal["missed", "false"]


@dataclass(frozen=True)
class WrongLesion:
    """A lesion, and its part in the slice that holds most of it.

    voxels: of all slices. index: of that slice, 0 of an image.
    """

    kind: Kind
    class_index: int
    voxels: int
    index: int
    box: tuple[slice, slice]
    inside: NDArray[np.bool_]  # of the box

    def region(self, size: tuple[int, ...]) -> NDArray[np.bool_]:
        """(y, x) of the slice."""
        region = np.zeros(size, bool)
        region[self.box] = self.inside
        return region


def wrong_lesions(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], axis: int | None) -> list[WrongLesion]:
    """The wrong lesions of a case, missed ones first.

    Args:
        truth, predicted: class indices (y, x) or (z, y, x), and in the truth IGNORE.
        axis: along which a volume is sliced.
    """
    counted = truth != IGNORE
    truth, predicted = np.where(counted, truth, 0), np.where(counted, predicted, 0)
    return [*_wrong("missed", truth, predicted, axis), *_wrong("false", predicted, truth, axis)]


def _wrong(kind: Kind, labels: NDArray[np.uint8], other: NDArray[np.uint8], axis: int | None) -> list[WrongLesion]:
    components = components_of(labels)
    right = set(np.unique(components[(labels > 0) & (labels == other)]).tolist())
    found = []
    for number, box in enumerate(ndimage.find_objects(components), 1):
        if number in right:
            continue
        inside = components[box] == number
        where = np.flatnonzero(inside)[0]
        index = 0
        if axis is not None:
            index = int(inside.sum(axis=tuple(i for i in range(3) if i != axis)).argmax())
        found.append(
            WrongLesion(
                kind=kind,
                class_index=int(labels[box].flat[where]),
                voxels=int(inside.sum()),
                index=index + (0 if axis is None else box[axis].start),
                box=tuple(part for i, part in enumerate(box) if i != axis),
                inside=inside if axis is None else inside.take(index, axis=axis),
            )
        )
    return found
