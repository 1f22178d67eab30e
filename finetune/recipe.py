"""The fine-tuning recipe: every key, its range and its default."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from resunet.architecture import ResUNetArchitecture, UNetArchitecture, Widths
from resunet.blocks import NormKind
from resunet.config import DataSettings, Frozen, Normalisation, Recipe

Range = tuple[float, float]
Probability = Annotated[float, Field(ge=0, le=1)]


class LabelledSettings(DataSettings):
    """What is labelled, how, and how much of it is used."""

    classes: dict[int, str] = Field(description="raw mask value → name, background first")
    ignore: tuple[int, ...] = Field((), description="raw mask values that nobody labelled: left out of every count")
    labelled: float | None = Field(
        None, gt=0, description="share of the pool's groups below 1, or a number of groups; null: all"
    )
    draw: int = Field(0, ge=0, description="which of the nested random draws of groups")

    @field_validator("labelled")
    @classmethod
    def _whole_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != round(value):
            raise ValueError("a share is below 1, a number of groups is whole")
        return value

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: dict[int, str]) -> dict[int, str]:
        if not 2 <= len(classes) <= 254:
            raise ValueError("needs the background and at least one class, for example {0: background, 255: tumour}")
        if len(set(classes.values())) < len(classes):
            raise ValueError("two values have one name; give every class its own")
        return classes

    @model_validator(mode="after")
    def _no_overlap(self) -> "LabelledSettings":
        both = sorted(set(self.ignore) & set(self.classes))
        if both:
            raise ValueError(f"ignore={list(self.ignore)}: {both} are classes too; a value is one or the other")
        return self


class NetworkSettings(Frozen):
    """The network's shape; channels in and classes out follow from the data."""

    name: Literal["resunet", "unet"] = "resunet"
    channels: Widths | None = Field(None, description="null: 32 to 512, and 64 to 1024 for the plain U-Net")
    units: int = Field(2, ge=1, description="residual units a level (resunet)")
    norm: NormKind | None = Field(None, description="null: the encoder's, and batch from scratch")
    squeeze_excite: bool = Field(False, description="on the skips (resunet)")

    @model_validator(mode="after")
    def _only_what_the_unet_has(self) -> "NetworkSettings":
        if self.name == "unet" and (self.squeeze_excite or self.units != 2):
            raise ValueError("name='unet': the plain U-Net has neither units nor squeeze_excite; leave them out")
        return self

    def architecture(self, in_channels: int, num_classes: int, norm: NormKind) -> ResUNetArchitecture | UNetArchitecture:
        assert self.channels is not None, "resolve() comes first"
        if self.name == "unet":
            return UNetArchitecture(in_channels=in_channels, num_classes=num_classes, channels=self.channels, norm=norm)
        return ResUNetArchitecture(
            in_channels=in_channels,
            num_classes=num_classes,
            channels=self.channels,
            units=self.units,
            norm=norm,
            squeeze_excite=self.squeeze_excite,
        )


class ElasticSettings(Frozen):
    """Simard's elastic deformation; see `finetune.augment`. The defaults move a pixel by about half a pixel."""

    probability: Probability = 0.5
    sigma: float = Field(10.0, gt=0, description="pixels, of the Gaussian that smooths the field")
    alpha: float = Field(30.0, ge=0, description="pixels, factor on the smoothed field")


class AugmentSettings(Frozen):
    """What every training patch goes through, image and mask alike; see `finetune.augment`."""

    rotation: float = Field(15.0, ge=0, le=180, description="degrees, either way")
    elastic: ElasticSettings = ElasticSettings()
    contrast: Range = Field((0.8, 1.2), description="factor on the deviation from the patch's mean")
    flip: Probability = Field(0.5, description="left–right")

    @field_validator("contrast")
    @classmethod
    def _ordered(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"{list(value)}: two numbers above 0, the first not above the second")
        return value


class LossSettings(Frozen):
    """Focal + Dice, and for small objects a Dice of every component; see `finetune.losses`."""

    gamma: float = Field(2.0, ge=0)
    focal_weight: float = Field(1.0, ge=0)
    dice_weight: float = Field(1.0, ge=0)
    component_weight: float = Field(
        0.0, ge=0, description="of the Dice of single components: small ones count as much as large"
    )
    class_weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="class name → weight in focal and Dice; classes that are not named have 1"
    )

    @model_validator(mode="after")
    def _some_term(self) -> "LossSettings":
        if not (self.focal_weight or self.dice_weight or self.component_weight):
            raise ValueError("all weights are 0; one term must have some")
        return self


class OptimizerSettings(Frozen):
    """AdamW."""

    lr: float = Field(1e-3, gt=0, description="at the end of the warm-up")
    weight_decay: float = Field(1e-2, ge=0, description="not on norms and biases")
    encoder_lr_factor: float = Field(1.0, gt=0, description="on the learning rate, for a transferred encoder")
    decoder_first: float = Field(0.0, ge=0, lt=1, description="share of steps in which a transferred encoder stands still")
    clip: float = Field(12.0, gt=0, description="largest norm of the gradient")


class FinetuneRecipe(Recipe):
    """Everything `resunet finetune` reads."""

    data: LabelledSettings
    encoder: Path | None = Field(None, description="a pretraining run or a model directory; null: from scratch")
    allow: tuple[Literal["leak", "input_channels"], ...] = ()
    normalisation: Normalisation | None = Field(None, description="null: the encoder's, and percentiles from scratch")
    model: NetworkSettings = NetworkSettings()
    batch: int = Field(8, ge=1, description="patches a step, over all ranks")
    accumulate: int = Field(1, ge=1, description="batches an optimiser step")
    patch: tuple[int, int] = Field((128, 128), description="pixels, (y, x)")
    foreground: Probability = Field(0.33, description="share of patches that are centred on a pixel of a class")
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validate_every: int = Field(50, ge=1)
    evaluate_test: bool = Field(True, description="at the end; false while val still chooses between recipes")

    @field_validator("patch")
    @classmethod
    def _patch_has_room(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 8:
            raise ValueError(f"{list(value)}: at least 8 pixels a side")
        return value

    @model_validator(mode="after")
    def _weighted_classes_exist(self) -> "FinetuneRecipe":
        unknown = sorted(set(self.loss.class_weights or {}) - set(self.data.classes.values()))
        if unknown:
            raise ValueError(f"loss.class_weights names {unknown}; the classes are {list(self.data.classes.values())}")
        return self

    @model_validator(mode="after")
    def _encoder_fits(self) -> "FinetuneRecipe":
        if self.encoder is not None and self.model.name != "resunet":
            raise ValueError(f"encoder={self.encoder}: model.name={self.model.name!r} has no place for it; use 'resunet'")
        return self
