"""The recipe of a compression: how far to prune and by what, whether to quantise, and what the gate lets pass."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from finetune.quantisation.settings import QuantiseSettings
from resunet.config import Frozen, NewFolder, WandbSettings

Share = Annotated[float, Field(gt=0, lt=1)]


class PruneSettings(Frozen):
    """How far, in how many bites, and which channels go first."""

    parameters: Share | None = Field(0.4, description="share of the parameters that may stay; null: no such target")
    macs: Share | None = Field(0.4, description="share of the multiply-adds that may stay; null: no such target")
    bites: int = Field(3, ge=1, description="so many times a little is pruned and the rest trained again")
    retries: int = Field(2, ge=0, description="smaller bites, each half of the one before, that are tried after a refusal")
    importance: Literal["magnitude", "taylor", "batch_norm"] = Field(
        "magnitude",
        description="of a channel: the norm of its weights in all its layers; what the loss would lose, on training batches "
        "(Molchanov et al. 2019); the scale of its batch norms (Liu et al. 2017)",
    )
    batches: int = Field(16, ge=1, description="training batches that importance=taylor is taken on")
    round_to: int = Field(8, ge=1, description="widths are multiples of it, which engines compute faster; 1: any")
    least: Share = Field(0.1, description="share of its channels that every layer keeps at least")
    steps: int = Field(400, ge=1, description="of training after every bite")
    last_steps: int | None = Field(None, ge=1, description="after the last bite; null: as after the others")
    lr: float | None = Field(None, gt=0, description="of that training; null: half of the run's")
    teacher: bool = Field(True, description="that training learns from the unpruned network, too, by its logits")
    sensitivity: tuple[Share, ...] = Field(
        (0.25, 0.5),
        description="of every layer alone these shares of its channels are removed, and val Dice is looked at without training; "
        "the table says which layers hurt, and they are spared. []: no table, and all are taken to hurt alike",
    )
    sensitivity_cases: int = Field(64, ge=1, description="val cases that are looked at for it, spread over the groups")

    @model_validator(mode="after")
    def _some_target(self) -> "PruneSettings":
        if self.parameters is None and self.macs is None:
            raise ValueError("neither parameters nor macs: there is no target; give one, or prune=null")
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> "PruneSettings":
        defaults = type(self).model_fields
        if self.importance != "taylor" and self.batches != defaults["batches"].default:
            raise ValueError(f"batches={self.batches}: is of importance='taylor', not {self.importance!r}; leave it out")
        if not self.sensitivity and self.sensitivity_cases != defaults["sensitivity_cases"].default:
            raise ValueError(
                f"sensitivity_cases={self.sensitivity_cases}: nothing is looked at with sensitivity=[]; leave it out"
            )
        return self

    @field_validator("sensitivity")
    @classmethod
    def _ascending(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(shares)))


class GateSettings(Frozen):
    """What a step may cost on val, measured against the network that came in."""

    dice: float = Field(0.02, ge=0, lt=1, description="a step is refused if Dice falls by this much, relatively, or more")
    class_dice: float = Field(
        0.1,
        ge=0,
        le=1,
        description="or, of several classes, if that of any one falls so in the cases that hold it; 1 judges none",
    )
    recall: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="or if the recall of the smallest objects falls by more, absolutely, on the mean over groups",
    )


class CompressRecipe(Frozen):
    """Everything `resunet compress` reads."""

    run: Path = Field(description="a finished fine-tuning run: its network, data, augmentation and loss")
    out: NewFolder
    resume: bool = Field(False, description="continue: what is finished stays")
    seed: int = Field(0, ge=0, description="of the trainings between")
    prune: PruneSettings | None = Field(PruneSettings(), description="null: nothing is pruned")
    quantise: QuantiseSettings | None = Field(
        None, description="what pruning leaves, to INT8, in the end; null: it stays float32"
    )
    gate: GateSettings = GateSettings()
    evaluate_test: bool = Field(
        True, description="in the end, once, of both networks; false while val still chooses between recipes"
    )
    wandb: WandbSettings = WandbSettings()

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompressRecipe":
        if self.prune is None and self.quantise is None:
            raise ValueError("prune=null and quantise=null: there is nothing to do")
        return self
