"""The fine-tuning recipe: every key, its range and its default."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from finetune.inference.window import Inference
from finetune.settings import (
    AugmentSettings,
    ConsistencySettings,
    DistillationSettings,
    LabelledSettings,
    LossSettings,
    NetworkSettings,
    OptimizerSettings,
)
from resunet.config import Normalisation, Precision, Probability, Recipe
from resunet.light_settings import LIGHT

Patch = Annotated[tuple[int, ...], Field(min_length=2, max_length=3)]


class FinetuneRecipe(Recipe):
    """Everything `resunet finetune` reads."""

    data: LabelledSettings
    encoder: Path | None = Field(None, description="a pretraining run or a model directory; null: from scratch")
    transfer: Literal["encoder", "both"] | None = Field(
        None,
        description="encoder: it alone; both: the decoder that was pretrained with it too, or an error; null: whatever there is",
    )
    teacher: Path | None = Field(
        None, description="a run or model directory of a fine-tuned segmenter or ensemble to learn from, too; null: labels only"
    )
    distillation: DistillationSettings = DistillationSettings()
    consistency: ConsistencySettings | None = Field(
        None,
        description="unlabelled scans of the pool are learned from the moving average, whose decay is ema; null: labels only",
    )
    start: Path | None = Field(
        None,
        description="a finished fine-tuning run or its model to go on from, head included, pruned ones too: on more cases, "
        "or on another hospital's; model and normalisation are then its own. null: a fresh network",
    )
    allow: tuple[Literal["leak", "ranks", "input_channels"], ...] = Field(
        (),
        description="leak: the run goes on, and models and reports say so; ranks: resume with another number of them; "
        "input_channels: an encoder of other channels is adapted",
    )
    normalisation: Normalisation | None = Field(
        None, description="null: the encoder's, without one the teacher's, and percentiles from scratch"
    )
    model: NetworkSettings = NetworkSettings()
    batch: int = Field(8, ge=1, description="patches a step, over all ranks")
    accumulate: int = Field(1, ge=1, description="batches an optimiser step")
    patch: Patch = Field(
        (128, 128),
        validate_default=True,
        description="pixels, (y, x); of model.spatial_dims=3 (z, y, x); 128 a side by default, of volumes 64",
    )
    foreground: Probability = Field(0.33, description="share of patches that are centred on a class, each class as often")
    foreground_by: Literal["pixel", "object"] = Field(
        "pixel", description="what is drawn to centre a patch on; object: each connected one as often, however small"
    )
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay a step of the weights' moving average, which is then validated and saved, for example 0.999; null: none",
    )
    validate_every: int = Field(50, ge=1)
    checkpoint: Literal["best", "last"] = Field(
        "best",
        description="which becomes the model: the best of those that val saw, or the last, at the end of the schedule, as nnU-Net "
        "takes it; the best of many looks at few val groups may be an early one by luck",
    )
    memory: float = Field(4.0, gt=0, description="GiB that a process may take when it predicts whole scans of val and test")
    evaluate_test: bool = Field(True, description="at the end; false while val still chooses between recipes")
    # by default none: rules that few val groups choose would stand between two networks that are compared, and a second
    # object that no labelled case had would be removed without a word
    postprocess: Literal["none", "validate"] = Field(
        "none", description="validate: removal of predicted objects, if that raises Dice on val and loses no lesion"
    )
    false_alarms_per_1000: float | None = Field(
        None, gt=0, lt=1000, description="on cases without target: a threshold is chosen on val that keeps to it"
    )

    @model_validator(mode="before")
    @classmethod
    def _patch_of_volumes(cls, values: Any) -> Any:
        if isinstance(values, dict) and "patch" not in values:
            model = values.get("model")
            dims = model.get("spatial_dims") if isinstance(model, dict) else getattr(model, "spatial_dims", None)
            if dims == 3:
                return values | {"patch": (64, 64, 64)}
        return values

    @field_validator("patch")
    @classmethod
    def _patch_fits_the_network(cls, value: Patch, info: ValidationInfo) -> Patch:
        if min(value) < 8:
            raise ValueError(f"{list(value)}: at least 8 pixels a side")
        if (model := info.data.get("model")) is None:  # it has a fault of its own
            return value
        if len(value) != model.spatial_dims:
            sides = "two numbers, (y, x)" if model.spatial_dims == 2 else "three numbers, (z, y, x)"
            raise ValueError(f"model.spatial_dims={model.spatial_dims} takes {sides}")
        if info.data.get("start") is not None and model.channels is None:
            return value  # the start has its own levels: see `finetune.start`
        stride = model.stride
        if max(value) <= stride:
            raise ValueError(
                f"the coarsest level, 1/{stride} of the size, would see it as one position; give it a side above {stride}, or "
                f"{'model.output_stride a smaller one' if model.name == LIGHT else 'model.channels fewer levels'}"
            )
        return value

    @model_validator(mode="after")
    def _weighted_classes_exist(self) -> "FinetuneRecipe":
        what, names = ("classes", self.data.classes.values()) if self.data.regions is None else ("regions", self.data.regions)
        unknown = sorted(set(self.loss.class_weights or {}) - set(names))
        if unknown:
            raise ValueError(f"loss.class_weights names {unknown}; the {what} are {list(names)}")
        return self

    @model_validator(mode="after")
    def _postprocessing_is_of_classes(self) -> "FinetuneRecipe":
        if self.postprocess == "validate" and self.data.regions is not None:
            raise ValueError(
                "postprocess='validate': removes objects of single classes, which would tear holes into data.regions. Leave one of "
                "them out"
            )
        return self

    @model_validator(mode="after")
    def _encoder_fits(self) -> "FinetuneRecipe":
        if self.encoder is not None and self.model.name == "unet":
            raise ValueError(f"encoder={self.encoder}: model.name={self.model.name!r} has no place for it; use 'resunet'")
        if self.model.weights is not None and (given := self.encoder or self.start) is not None:
            raise ValueError(f"model.weights={self.model.weights}: {given} brings weights of its own; leave one of them out")
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> "FinetuneRecipe":
        if self.start is not None and self.encoder is not None:
            raise ValueError(
                f"start={self.start}: brings its own encoder, and encoder={self.encoder} is another; leave one out"
            )
        if math.ceil(self.optimizer.decoder_first * self.steps) >= self.steps > 1:
            raise ValueError(
                f"optimizer.decoder_first={self.optimizer.decoder_first:g}: of {self.steps} steps that is all; the encoder would "
                "stand still to the end. Lower it, or take more steps"
            )
        if self.start is not None and self.optimizer.decoder_first:
            raise ValueError(
                f"start={self.start}: its decoder is no fresh one that optimizer.decoder_first could train; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_to_transfer(self) -> "FinetuneRecipe":
        if self.transfer is not None and self.encoder is None:
            raise ValueError(f"transfer={self.transfer}: there is nothing to transfer; name an encoder, or leave it out")
        return self

    @model_validator(mode="after")
    def _somebody_to_learn_from(self) -> "FinetuneRecipe":
        if self.teacher is None and self.distillation != DistillationSettings():
            raise ValueError("distillation: there is nobody to learn from; name a teacher, or leave it out")
        share = self.distillation.unlabelled
        if self.teacher is not None and share and not min(round(share * self.batch), self.batch - 1):
            raise ValueError(
                f"distillation.unlabelled={share:g}: of a batch of {self.batch} that is no patch; raise it or batch, or set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _an_average_to_learn_from(self) -> "FinetuneRecipe":
        if self.consistency is None:
            return self
        if self.ema is None:
            raise ValueError(
                "consistency: is with the moving average of the weights, and ema is null; set ema=0.99, for example"
            )
        if self.model.statistics == "precise":
            raise ValueError(
                "model.statistics='precise' with consistency: recomputed for validation, they would change the average that "
                "teaches, and how often val is looked at what is learned; use 'running'"
            )
        if self.teacher is not None:
            raise ValueError(f"teacher={self.teacher}: and consistency are two teachers of the same scans; leave one out")
        if not min(round(self.consistency.unlabelled * self.batch), self.batch - 1):
            raise ValueError(
                f"consistency.unlabelled={self.consistency.unlabelled:g}: of a batch of {self.batch} that is no patch; raise "
                "it or batch"
            )
        return self

    @property
    def begins(self) -> Literal["a finished segmenter", "pretrained", "given MobileNetV3 weights", "from scratch"]:
        """What its networks begin with."""
        if self.start is not None:
            return "a finished segmenter"
        if self.encoder is not None:
            return "pretrained"
        return "from scratch" if self.model.weights is None else "given MobileNetV3 weights"

    @property
    def precision_of_test(self) -> Precision:
        """In which val and test are judged at the end: a threshold is one case's peak to the last digit, so that it is chosen and
        applied in the precision that predictions have by default."""
        return "fp32" if self.false_alarms_per_1000 is not None else self.precision

    @property
    def inference(self) -> Inference:
        """How whole scans are predicted, as `resunet predict` does it."""
        return Inference(memory=self.memory)

    @property
    def unlabelled_share(self) -> float:
        """Of a batch, cut from scans that the draw did not label; 0: none are read."""
        if self.consistency is not None:
            return self.consistency.unlabelled
        return self.distillation.unlabelled if self.teacher is not None else 0.0

    @model_validator(mode="after")
    def _frozen_statistics_come_from_somewhere(self) -> "FinetuneRecipe":
        if self.model.statistics == "frozen" and self.encoder is None and self.start is None and self.model.weights is None:
            raise ValueError("model.statistics='frozen': keeps an encoder's, and there is none; use 'precise' or an encoder")
        if self.model.statistics == "frozen" and self.model.name == "unet":
            raise ValueError("model.statistics='frozen': is of an encoder, and the plain U-Net has none; use 'precise'")
        return self
