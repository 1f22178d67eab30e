"""What a segmentation is judged by: every foreground class, or regions that are unions of classes and may overlap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resunet.data.cases import IGNORE
from resunet.regions import members_of

FOUND, FALSE, MISSED = 1, 2, 3


@dataclass(frozen=True)
class Targets:
    """names[i] is the union of the class indices members[i]. class_names: of every index, the background first."""

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """The background included."""
        return len(self.class_names)

    @property
    def are_classes(self) -> bool:
        """Target i is class index i + 1, for all i."""
        return self.members == tuple((index,) for index in range(1, self.num_classes))

    def mask(self, labels: NDArray[np.integer], target: int) -> NDArray[np.uint8]:
        """1 where class indices belong to a target, `IGNORE` where they are that, else 0."""
        table = np.zeros(IGNORE + 1, np.uint8)
        table[list(self.members[target])] = 1
        table[IGNORE] = IGNORE
        mask: NDArray[np.uint8] = table[labels]
        return mask

    def described(self) -> str:
        """Regions in words: whole = edema + core; core = core."""
        parts = (" + ".join(self.class_names[index] for index in its) for its in self.members)
        return "; ".join(f"{name} = {part}" for name, part in zip(self.names, parts, strict=True))

    def alike(self) -> list[str]:
        """Classes that belong to the same targets, in words: neither the loss nor a figure tells them apart."""
        by_targets: dict[tuple[bool, ...], list[str]] = {}
        for index, name in enumerate(self.class_names):
            by_targets.setdefault(tuple(index in its for its in self.members), []).append(name)
        return [" and ".join(names) for names in by_targets.values() if len(names) > 1]

    def errors(self, truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """FOUND, FALSE or MISSED for every pixel; 0 for background on both sides and for what the truth ignores.

        FALSE: it is predicted to be of a target that it is not of. MISSED: it is not, but is of one that is not predicted.
        """
        inside = np.zeros((self.num_classes, len(self.members)), bool)
        for target, its in enumerate(self.members):
            inside[list(its), target] = True
        true, guess = inside[:, None], inside[None]
        table = np.zeros((IGNORE + 1, IGNORE + 1), np.uint8)
        kinds = np.where((guess & ~true).any(axis=2), FALSE, np.where((true & ~guess).any(axis=2), MISSED, FOUND))
        kinds[0, 0] = 0
        table[: self.num_classes, : self.num_classes] = kinds
        errors: NDArray[np.uint8] = table[truth, predicted]
        return errors


def targets_of(classes: Mapping[int, str], regions: Mapping[str, Sequence[str]] | None = None) -> Targets:
    """The regions of some classes, or the classes but the background where there are none."""
    class_names = tuple(classes.values())
    if regions is None:
        return Targets(class_names[1:], tuple((index,) for index in range(1, len(class_names))), class_names)
    return Targets(tuple(regions), members_of(classes, regions), class_names)
