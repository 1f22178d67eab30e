"""What the labelled data are: sizes, spacing, intensities, classes, objects. Facts only; `planning.plan` draws conclusions."""

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray

from resunet.data.cases import IGNORE, LoadedCase
from resunet.runtime import percentile_intensity, percentiles

PERCENTILES = (0.0, 0.5, 50.0, 99.5, 100.0)  # of a scan's raw values
CLIP = (0.5, 99.5)  # the percentiles that normalisation clips to by default


@dataclass(frozen=True)
class ClassFacts:
    """One foreground class in one case.

    pixels: how many, and above, below: how many of them lie beyond the percentiles `CLIP` of the scan in a channel.
    clipped: how many lie beyond what the recipe's own normalisation keeps.
    objects: sizes in pixels of its connected components (8- or 26-connected, as evaluation counts), smallest first.
    """

    pixels: int
    above: int
    below: int
    clipped: int
    objects: NDArray[np.int64]


@dataclass(frozen=True)
class CaseFacts:
    """One case.

    spacing: mm in array order, all 1 where `in_mm` is False: the file does not say.
    plane, plane_spacing: of the slices that the network sees, (y, x).
    pixels: labelled ones, background included.
    percentiles: of the raw values of all channels, at `PERCENTILES`.
    """

    group: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    in_mm: bool
    plane: tuple[int, int]
    plane_spacing: tuple[float, float]
    slices: int
    slices_with_foreground: int
    pixels: int
    percentiles: tuple[float, ...]
    classes: tuple[ClassFacts, ...]

    @property
    def voxel(self) -> float:
        """mm² or mm³ of a pixel."""
        return float(np.prod(self.spacing))


@dataclass(frozen=True)
class PartFacts:
    """The cases of one part: 'train', 'val' or 'test'."""

    name: str
    cases: tuple[CaseFacts, ...]

    @property
    def groups(self) -> set[str]:
        return {case.group for case in self.cases}

    @property
    def in_mm(self) -> bool:
        """Every case's file gives its spacing."""
        return bool(self.cases) and all(case.in_mm for case in self.cases)

    @property
    def dimensions(self) -> int:
        return max(len(case.size) for case in self.cases)

    def share(self, index: int) -> float:
        """Of all labelled pixels, those of foreground class `index` (from 0)."""
        return sum(case.classes[index].pixels for case in self.cases) / max(1, sum(case.pixels for case in self.cases))

    def cases_with(self, index: int) -> int:
        return sum(case.classes[index].pixels > 0 for case in self.cases)

    def beyond(self, index: int, side: str) -> float:
        """Of the class's pixels, those 'above' or 'below' the percentiles `CLIP`, or 'clipped' by the recipe."""
        pixels = sum(case.classes[index].pixels for case in self.cases)
        return float(sum(getattr(case.classes[index], side) for case in self.cases) / max(1, pixels))

    def object_counts(self, index: int) -> NDArray[np.int64]:
        """Objects of the class in each case that has any."""
        return np.array([len(case.classes[index].objects) for case in self.cases if case.classes[index].pixels], np.int64)

    def object_pixels(self, index: int) -> NDArray[np.int64]:
        """Sizes of all objects of the class, sorted."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *(case.classes[index].objects for case in self.cases)]))

    def object_volumes(self, index: int) -> NDArray[np.float64]:
        """The same in mm² or mm³, of cases whose files give their spacing."""
        sizes = [case.classes[index].objects * case.voxel for case in self.cases if case.in_mm]
        return np.sort(np.concatenate([np.empty(0), *sizes]))


def part_facts(name: str, cases: Sequence[LoadedCase], num_classes: int) -> PartFacts:
    """The facts of loaded cases; classes are counted with the background, which has none of its own."""
    return PartFacts(name, tuple(_case_facts(case, num_classes) for case in cases))


def _case_facts(case: LoadedCase, num_classes: int) -> CaseFacts:
    assert case.labels is not None
    labels = case.labels
    raw = percentile_intensity(case.values, *CLIP)
    foreground = (labels != 0) & (labels != IGNORE)
    here = case.values[:, foreground].astype(np.float32)  # (C, n)
    above = np.any([values > channel.high for values, channel in zip(here, raw, strict=True)], axis=0)
    below = np.any([values < channel.low for values, channel in zip(here, raw, strict=True)], axis=0)
    clipped = np.any(
        [(values > kept.high) | (values < kept.low) for values, kept in zip(here, case.intensities, strict=True)], axis=0
    )
    kinds = labels[foreground]
    masked = np.where(labels == IGNORE, 0, labels)
    component = cc3d.connected_components(masked, connectivity=8 if masked.ndim == 2 else 26)[foreground]
    sizes = np.bincount(component, minlength=1)
    kind_of = np.zeros(len(sizes), np.uint8)
    kind_of[component] = kinds
    classes = []
    for index in range(1, num_classes):
        its = kinds == index
        classes.append(
            ClassFacts(
                pixels=int(its.sum()),
                above=int(above[its].sum()),
                below=int(below[its].sum()),
                clipped=int(clipped[its].sum()),
                objects=np.sort(sizes[1:][kind_of[1:] == index]).astype(np.int64),
            )
        )
    axes = tuple(axis for axis in range(labels.ndim) if axis != case.axis)
    with_foreground = foreground.any(axis=axes) if case.axis is not None else foreground.any()
    return CaseFacts(
        group=case.case.group,
        size=case.size,
        spacing=case.spacing,
        in_mm=case.in_mm,
        plane=(case.size[axes[0]], case.size[axes[1]]),
        plane_spacing=(case.spacing[axes[0]], case.spacing[axes[1]]),
        slices=case.num_slices,
        slices_with_foreground=int(np.sum(with_foreground)),
        pixels=int((labels != IGNORE).sum()),
        percentiles=tuple(percentiles(case.values, PERCENTILES)),
        classes=tuple(classes),
    )
