"""How a model's probabilities become masks, as its directory says it: post-processing and an operating point, both from val."""

from pydantic import Field

from resunet.config import Frozen


class ClassRule(Frozen):
    """Which predicted objects of a class are removed; see `resunet.runtime.remove_objects`."""

    name: str
    largest_only: bool = Field(False, description="all but the largest object are removed")
    smallest: int = Field(1, ge=1, description="voxels; objects with fewer are removed")

    def described(self) -> str:
        parts = ["only the largest object is kept"] * self.largest_only
        parts += [f"objects below {self.smallest} voxels are removed"] * (self.smallest > 1)
        return f"{self.name}: {' and '.join(parts)}"


class Postprocessing(Frozen):
    """Rules that raised Dice on val and lost no lesion there; no rules where none did. Dice and recall: before and after."""

    rules: tuple[ClassRule, ...]
    val_groups: int
    val_dice: tuple[float | None, float | None]
    val_lesion_recall: tuple[float | None, float | None]

    def described(self) -> str:
        """What it does and what speaks for it, in sentences."""
        if not self.rules:
            return f"None: on val ({self.val_groups} groups) no rule raised Dice without losing a lesion."
        dice, recall = (
            " to ".join("undefined" if value is None else f"{value:.4f}" for value in pair)
            for pair in (self.val_dice, self.val_lesion_recall)
        )
        rules = "; ".join(rule.described() for rule in self.rules)
        return (
            f"{rules}. Chosen on val ({self.val_groups} groups), where Dice went from {dice} and the share of lesions found "
            f"from {recall}. Probabilities are as the network gives them."
        )


class OperatingPoint(Frozen):
    """A case raises an alarm if its greatest foreground probability is above `threshold`."""

    threshold: float = Field(ge=0, le=1)
    budget: float = Field(gt=0, lt=1000, description="false alarms per 1,000 cases without target that were allowed")
    clean: int = Field(ge=1, description="val cases without target")
    alarmed: int = Field(ge=0, description="those of them that raise an alarm")
