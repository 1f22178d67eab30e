"""What a quantisation is asked for."""

from typing import Literal

from pydantic import Field, model_validator

from resunet.config import Frozen

Method = Literal["qat", "ptq", "nncf_qat", "nncf_ptq"]


class QuantiseSettings(Frozen):
    """Weights and activations in INT8. Data, augmentation, loss, batch and seed are those of the run that is quantised."""

    method: Method = Field(
        "qat",
        description="qat: trained with rounded values, by torchao; ptq: ranges from training patches, nothing is trained; both "
        "give ONNX for every engine. nncf_qat, nncf_ptq: the same by NNCF, for OpenVINO alone",
    )
    grid: Literal["affine", "symmetric"] = Field(
        "affine",
        description="of activations. affine: 0 to 255 from a zero point, so that what a ReLU gives has all of it, and ONNX "
        "Runtime is faster; symmetric: −128 to 127 about 0, which TensorRT asks for",
    )
    steps: int = Field(200, ge=1, description="of quantisation-aware training")
    lr: float = Field(1e-4, gt=0, description="at the end of the warm-up; about a tenth of the fine-tuning's")
    calibration: int = Field(64, ge=1, description="training patches whose activations set the first ranges")
    freeze_statistics: float = Field(
        0.0,
        ge=0,
        le=1,
        description="qat: share of steps after which batch statistics stand still; 0: batch norm is folded before the first step",
    )
    freeze_observers: float = Field(0.5, ge=0, le=1, description="share of steps after which the ranges stand still")

    keep_float: tuple[str, ...] = Field(
        (), description="qat, ptq: layers that stay in float32, by their names, as a compression that was refused lists them"
    )
    retries: int = Field(
        2,
        ge=0,
        description="qat, ptq: after a refusal, so many times the layers that hurt most by themselves stay in float32: the worst "
        "two, then four, and so on",
    )
    sensitivity_cases: int = Field(64, ge=1, description="val cases that say which layers hurt, spread over the groups")

    @property
    def trains(self) -> bool:
        return self.method in ("qat", "nncf_qat")

    @property
    def by_nncf(self) -> bool:
        return self.method in ("nncf_qat", "nncf_ptq")

    @model_validator(mode="after")
    def _grid_of_torchao(self) -> "QuantiseSettings":
        if self.by_nncf and self.grid != "affine":
            raise ValueError(f"grid={self.grid!r}: NNCF writes for OpenVINO, which wants 'affine'; leave it out")
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> "QuantiseSettings":
        defaults = type(self).model_fields
        idle = [] if self.trains else ["steps", "lr", "freeze_observers"]
        idle += ["keep_float", "retries", "sensitivity_cases"] if self.by_nncf else []
        idle += ["freeze_observers"] if self.method == "nncf_qat" else []
        given = [name for name in idle if getattr(self, name) != defaults[name].default]
        if given:
            raise ValueError(f"{given[0]}={getattr(self, given[0])}: does nothing with method={self.method!r}; leave it out")
        return self

    @model_validator(mode="after")
    def _statistics_of_torchao(self) -> "QuantiseSettings":
        if self.freeze_statistics and self.method != "qat":
            raise ValueError(
                f"freeze_statistics={self.freeze_statistics:g}: only method='qat' trains with batch norm; leave it out"
            )
        return self
