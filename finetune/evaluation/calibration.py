"""Whether a probability means what it says: reliability and ECE of the foreground, voxel by voxel, from histograms.

Nothing but counts is kept of a case, whatever its size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.lesions import components_of
from finetune.evaluation.statistics import figure
from resunet.data.cases import IGNORE

BINS = 20  # of equal width; the first is background that the network is sure of

POLICY = (
    f"Of the probability that a voxel is of any foreground class, over all voxels that are not ignored, in {BINS} bins of equal "
    "width. ece: the mean distance between the bins' mean probability and the share of foreground in them, weighted by "
    "voxels; each group has one from all its voxels, the figure is over groups. Background that the network is sure of is "
    f"most of a scan and makes it small: ece_foreground leaves out the first bin, probabilities below {1 / BINS:g}. bins: all "
    "voxels of all cases."
)


@dataclass
class Probabilities:
    """What is kept of the foreground probabilities of a case.

    voxels, summed, positive: (BINS,) how many voxels, the sum of their probabilities, how many of them are foreground.
    peak: the greatest probability; peak_on_target: the greatest of the truth's foreground. −1 where there is no such voxel.
    object_peaks: the greatest of each object of the truth.
    """

    voxels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    summed: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))
    positive: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    peak: float = -1.0
    peak_on_target: float = -1.0
    object_peaks: tuple[float, ...] = ()

    def add(self, truth: NDArray[np.integer], probability: NDArray[np.float32]) -> None:
        """A case or a part of it: class indices with IGNORE, and foreground probabilities, of one shape."""
        evaluated = truth != IGNORE
        p, target = probability[evaluated], truth[evaluated] > 0
        if not p.size:
            return
        index = np.minimum((p * BINS).astype(np.intp), BINS - 1)
        self.voxels += np.bincount(index, minlength=BINS)
        self.summed += np.bincount(index, weights=p, minlength=BINS)
        self.positive += np.bincount(index[target], minlength=BINS)
        self.peak = max(self.peak, float(p.max()))
        if target.any():
            self.peak_on_target = max(self.peak_on_target, float(p[target].max()))

    def add_objects(self, truth: NDArray[np.uint8], probability: NDArray[np.float32]) -> None:
        """A whole case; its objects are those of `finetune.evaluation.lesions`."""
        known = np.where(truth == IGNORE, 0, truth)
        components = components_of(known)
        greatest = np.zeros(int(components.max(initial=0)) + 1, probability.dtype)
        inside = np.flatnonzero(components)  # of a large scan few voxels are: sorting all of them costs more than predicting it
        np.maximum.at(greatest, components.ravel()[inside], probability.ravel()[inside])
        self.object_peaks += tuple(greatest[1:].tolist())

    def ece(self, first: int = 0) -> float | None:
        """The expected calibration error over the bins from `first`; None if they are empty."""
        voxels = int(self.voxels[first:].sum())
        return float(np.abs(self.summed - self.positive)[first:].sum()) / voxels if voxels else None


def pooled(records: Sequence[Probabilities]) -> Probabilities:
    """Several cases as one."""
    return Probabilities(
        voxels=np.sum([one.voxels for one in records], axis=0, dtype=np.int64),
        summed=np.sum([one.summed for one in records], axis=0, dtype=np.float64),
        positive=np.sum([one.positive for one in records], axis=0, dtype=np.int64),
        peak=max(one.peak for one in records),
        peak_on_target=max(one.peak_on_target for one in records),
        object_peaks=tuple(peak for one in records for peak in one.object_peaks),
    )


def summarise_calibration(by_group: Mapping[str, Sequence[Probabilities]]) -> dict[str, Any] | None:
    """summary.json's calibration from the cases of every group; None without cases."""
    groups = {group: pooled(records) for group, records in by_group.items() if records}
    if not groups:
        return None

    def over_groups(first: int) -> dict[str, Any]:
        return figure({group: [] if (ece := its.ece(first)) is None else [ece] for group, its in groups.items()}, (0.0, 1.0))

    everything = pooled(list(groups.values()))
    return {
        "ece": over_groups(0),
        "ece_foreground": over_groups(1),
        "bins": [
            {
                "range": [i / BINS, (i + 1) / BINS],
                "voxels": int(voxels),
                "probability": float(everything.summed[i] / voxels) if voxels else None,
                "observed": float(everything.positive[i] / voxels) if voxels else None,
            }
            for i, voxels in enumerate(everything.voxels)
        ],
        "policy": POLICY,
    }
