"""The recipe's keys of the probe."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from resunet.config import Classes, Frozen


class ProbeSettings(Frozen):
    """A few labelled groups of a source's pool, never of val or test. They are labels: whatever is fine-tuned later counts them."""

    source: Path | None = Field(None, description="a labelled source, as data.source; null: data.source itself")
    classes: Classes = Field(description="raw mask value → name, background first")
    ignore: tuple[int, ...] = Field((), description="raw mask values that nobody labelled")
    groups: int = Field(
        3, ge=1, le=3, description="labelled groups; one is left out at a time (of one group, a block of slices)"
    )
    draw: int = Field(
        0, ge=0, description="the order they are taken from; with the same data.draw they are among the first of a fine-tuning"
    )
    every: int = Field(100, ge=1, description="steps; also before the first and after the last")
    kind: Literal["prototype", "knn"] = Field("knn", description="what a pixel is labelled by: class means, or its neighbours")
    neighbours: int = Field(5, ge=1, description="with kind=knn: labelled pixels that vote")
    choose: Literal["last", "best"] = Field(
        "last", description="the checkpoint that is saved: the last, or of those probed the one with the best Dice (not step 0)"
    )

    @model_validator(mode="after")
    def _no_overlap(self) -> "ProbeSettings":
        if both := sorted(set(self.ignore) & set(self.classes)):
            raise ValueError(f"ignore={list(self.ignore)}: {both} are classes too; a value is one or the other")
        return self
