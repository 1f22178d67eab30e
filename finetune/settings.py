"""The sections of the fine-tuning recipe: what is labelled, the network, augmentation, losses, teachers, the optimiser."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from resunet.architecture import (
    MOBILE_BACKBONE,
    MemberArchitecture,
    MobileResUNetArchitecture,
    ResUNetArchitecture,
    UNetArchitecture,
    Widths,
)
from resunet.blocks import NormKind
from resunet.config import Classes, DataSettings, Frozen, Precision, Probability, Range
from resunet.intensity import IntensitySettings
from resunet.light_settings import LIGHT, LightSettings
from resunet.regions import Regions, members_of, refuse_wrong_regions

_DEFAULT_CHANNELS = ResUNetArchitecture().channels


def _all_is_null(value: Any) -> Any:
    return None if value == "all" else value


class LabelledSettings(DataSettings):
    """What is labelled, how, and how much of it is used."""

    classes: Classes = Field(description="raw mask value → name, background first")
    regions: Regions | None = Field(
        None,
        description="name → classes that it is the union of; regions may overlap. The loss and all figures are then of the regions "
        "instead of the classes; masks and predictions stay maps of the classes. null: of the classes",
    )
    ignore: tuple[int, ...] = Field((), description="raw mask values that nobody labelled: left out of every count")
    labelled: Annotated[float | None, BeforeValidator(_all_is_null)] = Field(
        None, gt=0, description="share of the pool's groups below 1, or a number of groups (1: one group); all or null: all"
    )
    draw: int = Field(0, ge=0, description="which of the nested random draws of groups")
    draw_by: Literal["random", "kcenter", "typicality"] = Field(
        "random",
        description="how training groups are drawn: by chance, or as resunet suggest would choose them in the embedding of "
        "draw_encoder, nested too: kcenter from a random start that draw sets, typicality from clusters that draw seeds, so that "
        "its draws are much alike; val is drawn by chance",
    )
    draw_encoder: Path | None = Field(
        None, description="for draw_by: a pretraining run or a model directory; it sees the pool only"
    )
    folds: int | None = Field(
        None, ge=2, description="cross-validation: pool and val are divided into so many folds by group; null: none"
    )
    fold: int | None = Field(None, ge=0, description="with folds: train only this one, from 0, into OUT/fold-K; null: all")

    @field_validator("labelled")
    @classmethod
    def _whole_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and value != round(value):
            raise ValueError("a share is below 1, a number of groups is whole")
        return value

    @model_validator(mode="after")
    def _regions_are_of_classes(self) -> "LabelledSettings":
        if self.regions is not None:
            refuse_wrong_regions(self.classes, self.regions)
        return self

    @model_validator(mode="after")
    def _drawn_by_something(self) -> "LabelledSettings":
        if (self.draw_by == "random") != (self.draw_encoder is None):
            todo = (
                "set data.draw_encoder to a pretraining run"
                if self.draw_encoder is None
                else "set data.draw_by, or leave it out"
            )
            raise ValueError(f"draw_by={self.draw_by}, draw_encoder={self.draw_encoder}: one goes with the other; {todo}")
        return self

    @model_validator(mode="after")
    def _fold_exists(self) -> "LabelledSettings":
        if self.fold is not None and (self.folds is None or self.fold >= self.folds):
            allowed = (
                "set data.folds too" if self.folds is None else f"with data.folds={self.folds} it is at most {self.folds - 1}"
            )
            raise ValueError(f"fold={self.fold}: {allowed}")
        return self

    @model_validator(mode="after")
    def _no_overlap(self) -> "LabelledSettings":
        both = sorted(set(self.ignore) & set(self.classes))
        if both:
            raise ValueError(f"ignore={list(self.ignore)}: {both} are classes too; a value is one or the other")
        return self

    @property
    def remedy(self) -> str:
        """What to do where a class has too few labelled cases."""
        if self.labelled is not None:
            return f"data.labelled={self.labelled:g} takes some of the pool's groups: raise it, to all, or set data.stratify"
        return "Choose another split (resunet split --stratify), or label more"

    def region_members(self) -> tuple[tuple[int, ...], ...] | None:
        """The class indices of every region; None without regions."""
        return None if self.regions is None else members_of(self.classes, self.regions)


class NetworkSettings(LightSettings):
    """The network's shape; channels in and classes out follow from the data."""

    name: Literal["resunet", "unet", "mobile_resunet"] = "resunet"
    channels: Widths | None = Field(
        None,
        description="null: 32 to 512, and 64 to 1024 for the plain U-Net; of mobile_resunet the decoder's four widths, finest "
        "first, null: the encoder's, 32 at least",
    )
    units: int = Field(2, ge=1, description="residual units a level (resunet)")
    spatial_dims: Literal[2, 3] = Field(2, description="2: images, and volumes slice by slice; 3: volumes as they are")
    norm: NormKind | None = Field(None, description="null: the encoder's, and batch from scratch")
    squeeze_excite: bool = Field(False, description="on the skips (resunet, mobile_resunet)")
    statistics: Literal["running", "frozen", "precise"] = Field(
        "running",
        description="of batch norm. running: averages over the last batches; frozen: a transferred encoder keeps those of "
        "pretraining, its scale and shift train; precise: recomputed over statistics_batches training batches before every "
        "validation (Wu & Johnson 2021, arXiv 2105.07576)",
    )
    statistics_batches: int = Field(32, ge=1, description="of `batch` patches, for precise statistics")

    @model_validator(mode="after")
    def _only_what_the_unet_has(self) -> "NetworkSettings":
        if self.name == "unet" and (self.squeeze_excite or self.units != 2):
            raise ValueError("name='unet': the plain U-Net has neither units nor squeeze_excite; leave them out")
        return self

    @property
    def stride(self) -> int:
        """Of the coarsest level."""
        if self.name == LIGHT:
            return self.output_stride or 32
        return int(2 ** (len(self.channels or _DEFAULT_CHANNELS) - 1))

    def architecture(self, in_channels: int, num_classes: int, norm: NormKind) -> MemberArchitecture:
        assert self.channels is not None, "resolve() comes first"
        if self.name == LIGHT:
            return MobileResUNetArchitecture(
                in_channels=in_channels,
                num_classes=num_classes,
                backbone=self.backbone or MOBILE_BACKBONE,
                channels=self.channels,
                output_stride=self.output_stride or 32,
                squeeze_excite=self.squeeze_excite,
            )
        if self.name == "unet":
            return UNetArchitecture(
                spatial_dims=self.spatial_dims,
                in_channels=in_channels,
                num_classes=num_classes,
                channels=self.channels,
                norm=norm,
            )
        return ResUNetArchitecture(
            spatial_dims=self.spatial_dims,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=self.channels,
            units=self.units,
            norm=norm,
            squeeze_excite=self.squeeze_excite,
        )


class ElasticSettings(Frozen):
    """Simard's elastic deformation; see `finetune.training.augment`. The defaults move a pixel by about half a pixel."""

    probability: Probability = 0.5
    sigma: float = Field(10.0, gt=0, description="pixels, of the Gaussian that smooths the field")
    alpha: float = Field(30.0, ge=0, description="pixels, factor on the smoothed field; as strong in 3D as in 2D")


class PatchIntensities(IntensitySettings):
    """As the views of pretraining have them, each with a probability of its own; by default none."""

    intensity: Probability = Field(0.0, description="of scale, shift and gamma")
    blur: Probability = 0.0
    noise: Probability = 0.0


class AugmentSettings(Frozen):
    """What every training patch goes through, image and mask alike; see `finetune.training.augment`."""

    rotation: float = Field(15.0, ge=0, le=180, description="degrees, either way; of volumes about every axis")
    elastic: ElasticSettings = ElasticSettings()
    contrast: Range = Field((0.8, 1.2), description="factor on the deviation from the patch's mean")
    flip: Probability = Field(0.5, description="of the last axis: left–right, in sagittal slices anterior–posterior")

    zoom: Range = Field((0.7, 1.4), description="magnification, where there is one; of thick slices within them")
    zoom_probability: Probability = 0.0
    shift: float = Field(
        0.0, ge=0, le=0.5, description="share of a side by which a patch is moved, at most: where it is all of a scan"
    )
    intensity: PatchIntensities = PatchIntensities()

    @field_validator("contrast", "zoom")
    @classmethod
    def _positive(cls, value: Range) -> Range:
        if value[0] <= 0:
            raise ValueError(f"{list(value)}: two numbers above 0")
        return value


class LossSettings(Frozen):
    """Focal + Dice, and for small objects a Dice of every component; see `resunet.losses`."""

    gamma: float = Field(2.0, ge=0)
    focal_weight: float = Field(1.0, ge=0)
    dice_weight: float = Field(1.0, ge=0)
    component_weight: float = Field(
        0.0, ge=0, description="of the Dice of single components: small ones count as much as large"
    )
    class_weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="class name → weight in focal and Dice, with data.regions region name → weight; what is not named has 1",
    )
    deep_supervision: bool = Field(
        False, description="the decoder's coarser levels learn too, each at half the weight of the finer (nnU-Net)"
    )

    @model_validator(mode="after")
    def _some_term(self) -> "LossSettings":
        if not (self.focal_weight or self.dice_weight or self.component_weight):
            raise ValueError("all weights are 0; one term must have some")
        return self


class DistillationSettings(Frozen):
    """What is learned from a teacher beside the labels; see `finetune.distillation`."""

    temperature: float = Field(2.0, gt=0, description="by which both networks' logits are divided (Hinton et al. 2015)")
    logits_weight: float = Field(1.0, ge=0, description="of the teacher's softened probabilities")
    dice_weight: float = Field(
        1.0, ge=0, description="of the relative difference of the probabilities, as Dice counts it (Wang et al. 2023)"
    )
    attention_weight: float = Field(
        0.0, ge=0, description="of the attention maps of the decoder's levels (Zagoruyko & Komodakis 2017)"
    )
    unlabelled: float = Field(
        0.5, ge=0, lt=1, description="share of a batch that is cut from scans of the pool that this draw did not label"
    )
    precision: Precision | None = Field(
        None, description="of the teacher; null: that of the student, which may be another network's best"
    )

    @model_validator(mode="after")
    def _some_term(self) -> "DistillationSettings":
        if not (self.logits_weight or self.dice_weight or self.attention_weight):
            raise ValueError("all weights are 0: nothing would be learned from the teacher")
        if not self.logits_weight and self.temperature != 2.0:
            raise ValueError(f"temperature={self.temperature:g}: is of the logits, and logits_weight is 0; leave it out")
        return self


class ConsistencySettings(IntensitySettings):
    """What is learned from unlabelled scans, beside the labels; see `finetune.training.consistency`. The intensities are those of
    what the network sees, in standard deviations of the scan."""

    weight: float = Field(1.0, gt=0, description="of the divergence from the moving average's probabilities")
    dice_weight: float = Field(
        0.0, ge=0, description="beside the divergence, of the relative difference of the probabilities, as Dice counts it"
    )
    ramp: Probability = Field(0.3, description="share of steps over which the weight rises from nearly 0")
    unlabelled: float = Field(
        0.5, gt=0, lt=1, description="share of a batch that is cut from scans of the pool that this draw did not label"
    )
    cutmix: Probability = Field(0.5, description="of a box of another unlabelled patch of the batch, pasted into one")
    cutmix_area: Range = Field((0.02, 0.4), description="of the box, as a share of the patch")
    intensity_scale: Range = (0.5, 1.5)
    intensity_shift: Range = (-0.5, 0.5)
    noise_sigma: Range = (0.0, 0.3)

    @model_validator(mode="after")
    def _boxes_within(self) -> "ConsistencySettings":
        if not 0 < self.cutmix_area[0] <= self.cutmix_area[1] <= 1:
            raise ValueError(f"cutmix_area={list(self.cutmix_area)} must lie above 0 and not above 1")
        return self


class OptimizerSettings(Frozen):
    """AdamW."""

    lr: float = Field(1e-3, gt=0, description="at the end of the warm-up")
    weight_decay: float = Field(1e-2, ge=0, description="not on norms and biases")
    decay: Literal["cosine", "polynomial"] = Field(
        "cosine", description="after the warm-up; polynomial: (1 − progress)^0.9 (nnU-Net)"
    )
    encoder_lr_factor: float = Field(
        1.0,
        gt=0,
        description="on the learning rate, for a transferred encoder (discriminative rates: Howard & Ruder 2018, arXiv 1801.06146)",
    )
    decoder_first: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of steps in which a transferred encoder stands still (after Kumar et al. 2022, arXiv 2202.10054)",
    )
    sawtooth: bool = Field(
        False,
        description="the rate rises and falls while the decoder goes first, then again for the whole network (Wald et al. 2024, "
        "arXiv 2412.17041); from scratch, once",
    )
    clip: float = Field(12.0, gt=0, description="largest norm of the gradient")

    @model_validator(mode="after")
    def _sawtooth_has_two_teeth(self) -> "OptimizerSettings":
        if self.sawtooth and not self.decoder_first:
            raise ValueError("sawtooth=true: needs decoder_first above 0, its first tooth's share of steps; for example 0.1")
        return self
