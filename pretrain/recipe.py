"""The pretraining recipe: every key, its range and its default."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pretrain.probe.settings import ProbeSettings
from resunet.architecture import MOBILE_BACKBONE, EncoderArchitecture, MobileEncoderArchitecture, Widths
from resunet.blocks import NormKind
from resunet.config import Classes, DataSettings, Frozen, Normalisation, PercentileZScore, Probability, Range, Recipe
from resunet.intensity import IntensitySettings
from resunet.light_settings import LIGHT, LightSettings
from resunet.mobile import channels_of

Side = Annotated[int, Field(ge=8)]
Sides = Side | Annotated[tuple[Side, ...], Field(min_length=2, max_length=3)]

_OF_VOLUMES = {"size": 64, "window": 128}  # what these keys of the views are in 3D where the recipe does not say


class ArchiveSettings(DataSettings):
    """What is pretrained on: the pool of a source that has splits, else all of it."""

    classes: Classes | None = Field(
        None, description="raw mask value → name, as in fine-tuning: the probe's, where it has none; only a probe reads masks"
    )
    ignore: tuple[int, ...] = Field((), description="raw mask values that nobody labelled: the probe's, where it has none")
    held_out: str | None = Field(None, description="a source whose val and test (without splits: all) must not be in it")
    store: Path | None = Field(None, description="where decoded volumes are kept; default: the user's cache")
    workers: int = Field(2, ge=0, description="processes that read, for each rank; 0: the rank itself")


class EncoderSettings(LightSettings):
    """The encoder's shape; its input channels follow from data.channels. Keys as in fine-tuning."""

    name: Literal["resunet", "mobile_resunet"] = Field("resunet", description="the segmenter whose encoder it is")
    channels: Widths | None = Field(
        EncoderArchitecture().channels,
        description="of mobile_resunet those of the decoder that dense trains, four, finest first; null: as wide as "
        "the encoder's, 32 at least",
    )
    units: int = Field(2, ge=1)
    spatial_dims: Literal[2, 3] = Field(
        2, description="2: images, and volumes slice by slice; 3: volumes as they are, images and single slices are left out"
    )
    norm: NormKind = "batch"
    squeeze_excite: bool = Field(False, description="on the skips of the decoder that dense trains")

    @model_validator(mode="before")
    @classmethod
    def _channels_of_the_kind(cls, values: Any) -> Any:
        light = isinstance(values, dict) and values.get("name") == LIGHT
        return {"channels": None} | values if light else values

    @model_validator(mode="after")
    def _channels_of_its_own(self) -> "EncoderSettings":
        if self.channels is None and self.name != LIGHT:
            raise ValueError(f"channels=null: only name='{LIGHT}' has widths of its own; name them, finest first")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the encoder's levels, finest first; the last is the embedding's."""
        if self.name == LIGHT:
            return channels_of(self.backbone or MOBILE_BACKBONE)
        assert self.channels is not None
        return self.channels

    def decoder_stride(self, level: int) -> int:
        """Of a level of the decoder."""
        return min(2 ** (level + 1), self.output_stride or 32) if self.name == LIGHT else int(2**level)

    def architecture(self, in_channels: int) -> EncoderArchitecture | MobileEncoderArchitecture:
        if self.name == LIGHT:
            return MobileEncoderArchitecture(
                in_channels=in_channels, backbone=self.backbone or MOBILE_BACKBONE, output_stride=self.output_stride or 32
            )
        assert self.channels is not None
        return EncoderArchitecture(
            spatial_dims=self.spatial_dims, in_channels=in_channels, channels=self.channels, units=self.units, norm=self.norm
        )


class ViewSettings(IntensitySettings):
    """The views of a scan; see `pretrain.views`. Intensities are in standard deviations of the scan."""

    size: Sides = Field(96, description="pixels of a view: a number for all sides, or (y, x), of volumes (z, y, x); in 3D 64")
    window: Sides = Field(
        512, description="pixels, as size; of a larger scan this much around content is read for both views; in 3D 128"
    )
    voxels: Literal["cubes", "scan"] = Field(
        "cubes",
        description="of views of volumes. cubes: as long as wide in mm, whatever the spacing; scan: of the proportions of the "
        "scan's own, as the patches of fine-tuning have them",
    )
    scale: Range = Field((0.2, 1.0), description="share of the scan's area or volume that a crop covers")
    ratio: Range = Field(
        (0.75, 4 / 3), description="proportions of a crop over those of a view: width over height, and over depth"
    )
    flip: Probability = Field(0.5, description="along each axis")
    rotation: float = Field(
        15.0, ge=0, le=180, description="degrees, either way; of volumes about every axis in mm, of thick slices within them"
    )

    @model_validator(mode="after")
    def _positive(self) -> "ViewSettings":
        for name in ("scale", "ratio"):
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"{name}={list(getattr(self, name))} must be above 0")
        if self.scale[1] > 1:
            raise ValueError(f"scale={list(self.scale)}: a crop covers at most the whole scan (1)")
        return self

    def sides(self, spatial_dims: int) -> tuple[int, ...]:
        """Of a view, in array order."""
        return _sides(self.size, spatial_dims)

    def sides_of_window(self, spatial_dims: int) -> tuple[int, ...]:
        """Of what is read for both views at most, in array order."""
        return _sides(self.window, spatial_dims)


def _sides(given: Sides, spatial_dims: int) -> tuple[int, ...]:
    return (given,) * spatial_dims if isinstance(given, int) else given


class HeadSettings(Frozen):
    """SimCLR's projection head (lightly): two linear layers, thrown away after pretraining."""

    hidden: int = Field(512, ge=1)
    output: int = Field(128, ge=1)
    batch_norm: bool = Field(True, description="between the layers; its statistics are those of what goes through together")


class ObjectiveSettings(Frozen):
    """What is contrasted with what; see `pretrain.objective` and `pretrain.losses`."""

    weight: float = Field(1.0, ge=0, description="of this loss beside that of dense; 0: that alone")
    loss: Literal["nt_xent", "decoupled"] = Field(
        "nt_xent", description="decoupled: positives are not in the denominator (lightly's DCL)"
    )
    memory_bank: int | None = Field(
        None,
        ge=1,
        description="projections of earlier sets that are the negatives, in place of the set's own; a multiple of batch",
    )
    same_group: Literal["negative", "ignore"] = Field(
        "negative", description="ignore: other scans and slices of a group (a patient) are no negatives"
    )
    position_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="slices of other groups, along the same axis, whose places in their volumes (0 to 1) differ by less are "
        "positives; of what body part or sequence a volume is nobody asks: for archives of one kind of scan",
    )

    @model_validator(mode="after")
    def _together(self) -> "ObjectiveSettings":
        if self.loss == "decoupled" and self.memory_bank is not None:
            raise ValueError("loss=decoupled has no memory bank: set memory_bank=null or loss=nt_xent")
        if self.knows_scans and (self.loss == "decoupled" or self.memory_bank is not None):
            raise ValueError(
                "same_group=ignore and position_threshold are for loss=nt_xent without a memory bank, which keeps no groups"
            )
        if self.position_threshold is not None and self.same_group == "negative":
            raise ValueError(
                "position_threshold with same_group=negative would attract slices of other patients and repel the neighbours of "
                "the same one: set same_group=ignore"
            )
        return self

    @property
    def knows_scans(self) -> bool:
        """Groups or positions decide what is contrasted."""
        return self.same_group == "ignore" or self.position_threshold is not None


class DenseSettings(Frozen):
    """Contrast of single places, which trains a decoder too; see `pretrain.dense`."""

    weight: float = Field(1.0, gt=0, description="of the dense loss beside that of objective")
    temperature: float = Field(0.1, ge=0.001)
    level: int = Field(
        1,
        ge=0,
        description="of the decoder, whose features are contrasted; 0: full resolution, 1: half, …; of mobile_resunet 0: half, …",
    )
    points: int = Field(48, ge=1, description="places of a scan that both views show, at most")
    pairs: int = Field(2048, ge=2, description="places contrasted in a set, at most, over all ranks and as many of every scan")
    hidden: int = Field(128, ge=1, description="of the projection of a place: two layers, thrown away after pretraining")
    output: int = Field(64, ge=1)


class OptimizerSettings(Frozen):
    name: Literal["adamw", "lars"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="at the end of the warm-up; see lr_scaling")
    lr_scaling: Literal["none", "sqrt_batch"] = Field(
        "none", description="sqrt_batch: the rate is lr · √batch (SimCLR with LARS: lr 0.075)"
    )
    weight_decay: float = Field(1e-4, ge=0, description="not on norms and biases")

    @model_validator(mode="after")
    def _lars_decays(self) -> "OptimizerSettings":
        if self.name == "lars" and not self.weight_decay:
            raise ValueError(
                "name=lars with weight_decay=0 is plain momentum: lightly's LARS adapts the rate of what decays only. Set "
                "weight_decay=1e-6, as SimCLR has it"
            )
        return self


class PretrainRecipe(Recipe):
    """Everything `resunet pretrain` reads."""

    data: ArchiveSettings
    normalisation: Normalisation = PercentileZScore()
    model: EncoderSettings = EncoderSettings()
    batch: int = Field(64, ge=2, description="scans in one set, over all ranks: those that are contrasted")
    accumulate: int = Field(1, ge=1, description="sets an optimiser step; adds no negatives")
    cache_chunk: int | None = Field(
        None, ge=1, description="views a forward pass on each rank, with the gradients of the whole set (GradCache); null: all"
    )
    views: ViewSettings = ViewSettings()
    head: HeadSettings = HeadSettings()
    temperature: float = Field(0.2, ge=0.001)
    objective: ObjectiveSettings = ObjectiveSettings()
    dense: DenseSettings | None = Field(
        None, description="contrast of places beside that of scans; a decoder is trained, saved and transferred too. null: none"
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    probe: ProbeSettings | None = Field(None, description="labelled scans by which checkpoints are judged; null: none")
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop", description="of a loss or gradient: skip leaves the step out and says which scans were in it"
    )
    allow: tuple[Literal["leak", "ranks"], ...] = Field(
        (), description="leak: the run goes on, and models and reports say so; ranks: resume with another number of them"
    )

    @model_validator(mode="before")
    @classmethod
    def _views_of_volumes(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(views := values.get("views", {}), dict):
            model = values.get("model")
            dims = model.get("spatial_dims") if isinstance(model, dict) else getattr(model, "spatial_dims", None)
            if dims == 3:
                return values | {"views": _OF_VOLUMES | views}
        return values

    @model_validator(mode="before")
    @classmethod
    def _classes_of_the_probe(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(probe := values.get("probe"), dict) and isinstance(values.get("data"), dict):
            shared = {key: values["data"][key] for key in ("classes", "ignore") if key in values["data"]}
            return values | {"probe": shared | probe}
        return values

    @model_validator(mode="after")
    def _one_side_a_dimension(self) -> "PretrainRecipe":
        dims = self.model.spatial_dims
        for key in ("size", "window"):
            value = getattr(self.views, key)
            if not isinstance(value, int) and len(value) != dims:
                sides = "two, (y, x)" if dims == 2 else "three, (z, y, x)"
                raise ValueError(
                    f"views.{key}={list(value)}: model.spatial_dims={dims} takes one number for all sides, or {sides}"
                )
        if dims == 2 and self.views.voxels == "scan":
            raise ValueError("views.voxels=scan: is of volumes; set model.spatial_dims=3, or leave it out")
        if dims == 3 and self.objective.position_threshold is not None:
            raise ValueError(
                f"objective.position_threshold={self.objective.position_threshold}: compares the places of slices in their "
                "volumes, and model.spatial_dims=3 sees volumes as they are; set it to null"
            )
        return self

    @model_validator(mode="after")
    def _instance_norm_has_positions(self) -> "PretrainRecipe":
        sides, stride = self.views.sides(self.model.spatial_dims), 2 ** (len(self.model.widths) - 1)
        if self.model.norm == "instance" and self.model.name != LIGHT and max(sides) <= stride:
            raise ValueError(
                f"views.size={self.views.size}: is one position at the encoder's last level, of which model.norm=instance has no "
                f"statistics; give it more than {stride}, or set model.norm=group"
            )
        return self

    @model_validator(mode="after")
    def _whole_sets(self) -> "PretrainRecipe":
        bank = self.objective.memory_bank
        if bank is not None and bank % self.batch:
            raise ValueError(
                f"objective.memory_bank={bank} must be a multiple of batch={self.batch}: what overflows at the bank's end is lost"
            )
        if self.cache_chunk is not None and self.batch_statistics:
            raise ValueError(
                f"cache_chunk={self.cache_chunk}: batch norm would have each chunk's statistics, and the gradients would not be "
                "those of the set: set model.norm=group and head.batch_norm=false"
            )
        return self

    @model_validator(mode="after")
    def _decoder_is_trained_by_something(self) -> "PretrainRecipe":
        if self.dense is not None:
            if self.cache_chunk is not None:
                raise ValueError(
                    f"cache_chunk={self.cache_chunk}: dense has no chunks, its loss needs all views at once. Set one to null"
                )
            return self
        if self.objective.weight != 1:
            raise ValueError(
                f"objective.weight={self.objective.weight}: is of a loss beside that of dense; set dense, or leave it out"
            )
        of_decoder = "of the decoder that dense trains; set dense, or leave it out"
        if self.model.squeeze_excite:
            raise ValueError(f"model.squeeze_excite=true: is {of_decoder}")
        if self.model.name == LIGHT and self.model.channels is not None:
            raise ValueError(f"model.channels={list(self.model.channels)}: of name='{LIGHT}' are {of_decoder}")
        return self

    @model_validator(mode="after")
    def _decoder_has_levels(self) -> "PretrainRecipe":
        dense, coarsest = self.dense, len(self.model.widths) - 1
        if dense is not None and dense.level >= coarsest:
            raise ValueError(
                f"dense.level={dense.level}: the decoder of {coarsest + 1} levels (model.channels) has "
                + (f"0 to {coarsest - 1}" if coarsest else "none: give it more")
            )
        if dense is not None and dense.pairs < self.batch:
            raise ValueError(f"dense.pairs={dense.pairs} must be at least batch={self.batch}: one place of every scan")
        return self

    @model_validator(mode="after")
    def _nothing_is_set_for_no_contrast(self) -> "PretrainRecipe":
        if self.objective.weight:
            return self
        ignored = self.objective.model_dump(exclude={"weight"}, exclude_defaults=True)
        if ignored:
            raise ValueError(
                f"objective.weight=0: without the contrast of scans {', '.join(f'objective.{key}' for key in ignored)} would do "
                "nothing; leave it out"
            )
        return self

    @property
    def batch_statistics(self) -> bool:
        """Some layer has the statistics of a batch."""
        return self.model.norm == "batch" or self.head.batch_norm

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.optimizer.lr * (math.sqrt(self.batch) if self.optimizer.lr_scaling == "sqrt_batch" else 1.0)
