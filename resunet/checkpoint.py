"""A model directory: config.json and model.safetensors in the Hugging Face layout, written atomically, loaded exactly.

Loading is exact: every name and shape matches, or it fails with the sorted lists of what is missing, unexpected or of
another shape. Nothing is unpickled.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resunet.architecture import Architecture, EnsembleArchitecture, Widths
from resunet.blocks import NormKind
from resunet.config import Frozen, Normalisation, PercentileZScore
from resunet.decision import OperatingPoint, Postprocessing
from resunet.errors import InputError
from resunet.files import file_aside, write_text
from resunet.regions import Regions, refuse_wrong_regions
from resunet.runtime import ObjectRule
from resunet.widths import narrow

SCHEMA_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class FeatureCheck(Frozen):
    """Features of a fixed input as the live network gave them; see `resunet.fingerprint.fingerprint`."""

    seed: int
    size: int
    features: dict[str, list[float]]


class DecoderPart(Frozen):
    """What of a decoder was trained with an encoder; its weights are beside the encoder's. See `resunet.transfer`."""

    finest: int = Field(ge=0, description="the level that it was trained down to; finer ones are not in it")
    norm: NormKind
    squeeze_excite: bool
    channels: Widths | None = Field(
        None, description="of a light decoder: every level's but the coarsest's; null: the encoder's"
    )
    feature_check: FeatureCheck = Field(description="of its levels, in the float64 encoder's features")


class LabelledGroups(Frozen):
    """Groups whose labels a model was trained on, chosen or judged by."""

    groups: tuple[str, ...] = Field(description="HMACs")
    salt_fingerprint: str = Field(description="of the salt that made them")


class Provenance(Frozen):
    """Where a model comes from. Hashes and versions only: no path, no name."""

    data_sha256: str | None = None
    recipe_sha256: str | None = None
    parent_sha256: str | None = Field(None, description="weights of the encoder it was fine-tuned from")
    members_sha256: tuple[str, ...] = Field((), description="of an ensemble: weights of each member, as its own run has them")
    teacher_sha256: str | None = Field(None, description="weights of the segmenter it was distilled from")
    labels: tuple[LabelledGroups, ...] = Field(
        (),
        description="of a segmenter: groups whose labels it, its teacher or its encoder's probe was trained on or chosen by, for "
        "each salt; empty: not known",
    )
    probe: LabelledGroups | None = Field(None, description="of an encoder: what its probe used; null: it had none")
    versions: dict[str, str] = {}


class ModelConfig(Frozen):
    """A model directory's config.json."""

    schema_version: int = SCHEMA_VERSION
    architecture: Architecture
    input_channels: str | int = Field("grey", description="how a scan is read: grey, rgb or a number of channels")
    spacing: tuple[float, ...] | None = Field(None, description="mm per pixel, in array order; null: as each scan has it")
    normalisation: Normalisation = PercentileZScore()
    classes: dict[int, str] | None = Field(None, description="raw mask value → name, background first; null: encoder")
    regions: Regions | None = Field(None, description="what it was trained on and is judged by; null: the classes")
    ignore: tuple[int, ...] = Field((), description="raw mask values that are left out of every count")
    provenance: Provenance = Provenance()
    feature_check: FeatureCheck | None = None
    decoder: DecoderPart | None = Field(None, description="of an encoder: what else was trained; null: nothing")
    allowed: list[str] = Field([], description="checks that a recipe set aside by name")
    postprocessing: Postprocessing | None = Field(None, description="null: none, and none was looked for")
    operating_point: OperatingPoint | None = Field(None, description="null: no budget of false alarms was given")

    @model_validator(mode="after")
    def _rules_are_of_classes(self) -> Self:
        names = {rule.name for rule in self.postprocessing.rules} if self.postprocessing else set()
        if names - set(list((self.classes or {}).values())[1:]):
            raise ValueError(f"postprocessing names {sorted(names)}; the foreground classes are {self.classes}")
        return self

    @model_validator(mode="after")
    def _regions_are_of_classes(self) -> Self:
        if self.regions is not None:
            refuse_wrong_regions(self.classes or {0: "background"}, self.regions)
        return self

    def object_rules(self) -> tuple[ObjectRule, ...]:
        """The post-processing of a label map, by class index."""
        names = list((self.classes or {}).values())
        rules = self.postprocessing.rules if self.postprocessing else ()
        return tuple(ObjectRule(names.index(rule.name), rule.largest_only, rule.smallest) for rule in rules)


M = TypeVar("M", bound=nn.Module)


def without_patients(config: ModelConfig) -> ModelConfig:
    """What may leave the house of a config: without the HMACs of groups whose labels were used."""
    return config.model_copy(update={"provenance": config.provenance.model_copy(update={"probe": None, "labels": ()})})


MODEL_CARD = """---
{{ card_data }}
---

A network of the `resunet` package. `config.json` holds its architecture, how scans are normalised, its classes and where it
comes from; `model.safetensors` its weights. Load it exactly with

```python
from resunet import load_model  # an encoder: FeatureExtractor.from_pretrained
model = load_model("FOLDER")
```
"""


class Checkpointed(
    ModelHubMixin,
    library_name="resunet",
    license="apache-2.0",
    tags=["image-segmentation", "medical"],
    model_card_template=MODEL_CARD,
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a network with an `architecture`.

    `config` is what stands in the model directory's config.json; a network that was not loaded has the defaults.
    """

    kind: ClassVar[str]
    config: ModelConfig

    @classmethod
    def build(cls, architecture: Architecture) -> Self:
        """The network that its architecture describes, with fresh weights; of a pruned one the full, then narrowed."""
        assert not isinstance(architecture, EnsembleArchitecture), "an ensemble builds its members; see resunet.ensemble"
        network = cls(**architecture.model_dump(exclude={"name", "widths"}))
        if architecture.widths:
            assert isinstance(network, nn.Module)
            narrow(network, architecture.widths)
            _describe_narrowed(network, architecture.widths)
        return network

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """ModelHubMixin's, of a config without the HMACs of groups whose labels were used: see `without_patients`."""
        kept, self.config = self.config, without_patients(self.config)
        try:
            pushed: str = super().push_to_hub(repo_id, **options)
        finally:
            self.config = kept
        return pushed

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        write_weights(save_directory / WEIGHTS, self.state_dict())
        # what an encoder's pretraining trained of a decoder is not in this network: `save_with_decoder` of pretraining writes both
        written = self.config.model_copy(update={"decoder": None})
        write_text(save_directory / CONFIG, written.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """A model from a local folder or the Hub, in evaluation mode, loaded exactly.

        Raises:
            InputError: no model there, or weights or a config.json that are not this network's.
        """
        if Path(pretrained_model_name_or_path).exists():
            read_config(Path(pretrained_model_name_or_path))  # the Hub's own reader shows a traceback
        try:
            return super().from_pretrained(
                pretrained_model_name_or_path,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        except HFValidationError as error:
            raise InputError(f"{pretrained_model_name_or_path}: neither a local folder nor the name of a model.") from error

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = _download(model_id, revision, cache_dir, force_download, local_files_only, token)
        config = read_config(folder)
        if config.architecture.name != cls.kind:
            raise InputError(
                f"{folder / CONFIG}: architecture.name={config.architecture.name!r} is not a {cls.__name__} "
                f"({cls.kind!r}); resunet.load_model loads whichever it is."
            )
        model = cls.build(config.architecture)
        assert isinstance(model, nn.Module)
        load_exactly(model, read_weights(folder / WEIGHTS), str(folder / WEIGHTS))
        model.config = config
        return model.eval()


def _describe_narrowed(network: nn.Module, widths: Mapping[str, tuple[int, int]]) -> None:
    """Write widths into the architecture of a network, and of the networks that it is made of."""
    for prefix, part in network.named_modules():
        if isinstance(part, Checkpointed):
            start = f"{prefix}." if prefix else ""
            own = {name.removeprefix(start): width for name, width in widths.items() if name.startswith(start)}
            part.config = part.config.model_copy(
                update={"architecture": part.config.architecture.model_copy(update={"widths": own})}
            )


def read_config(folder: Path) -> ModelConfig:
    """The config.json of a model directory.

    Raises:
        InputError: no such file, another schema, or a value that is not allowed.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder}: not a model directory (no {CONFIG}). Give a run directory, or its model/ folder."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version={version!r}; this version reads {SCHEMA_VERSION}.")
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: not a valid model config: {error}") from error


def model_folder(path: Path) -> Path:
    """The model directory that a run directory or a model directory means."""
    if not path.exists():
        raise InputError(f"{path}: no such folder. Give a run directory or a model directory.")
    if (path / "model" / CONFIG).is_file():
        return path / "model"
    if (path / "run.json").is_file():
        raise InputError(f"{path}: this run has no model yet. Finish it with resume=true.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a model directory holds {CONFIG} and {WEIGHTS}.") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def load_exactly(module: M, tensors: dict[str, Tensor], where: str) -> M:
    """Load `tensors` into `module`; names and shapes are equal, or an InputError lists what is not."""
    own = module.state_dict()
    problems = differences(own, tensors)
    if problems:
        raise InputError(f"{where}: the weights are not those of this {type(module).__name__}:\n{problems}")
    module.load_state_dict(tensors, strict=True)
    return module


def differences(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """What differs between two sets of tensors in names and shapes, as sorted lists; empty where nothing does."""
    missing = sorted(set(wanted) - set(given))
    unexpected = sorted(set(given) - set(wanted))
    shapes = [
        f"{name}: {tuple(given[name].shape)} in the file, {tuple(wanted[name].shape)} in the network"
        for name in sorted(set(wanted) & set(given))
        if wanted[name].shape != given[name].shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "\n".join(f"  {what} ({len(names)}): {', '.join(names)}" for what, names in lists.items() if names)


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    with file_aside(path) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)


def _download(model_id: str, *arguments: Any) -> Path:
    revision, cache_dir, force_download, local_files_only, token = arguments
    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[CONFIG, WEIGHTS],
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"{model_id}: neither a local folder nor a model that the Hub gives: {error}") from error


def cast_to(module: M, dtype: torch.dtype) -> M:
    """A copy of a module on the CPU in another dtype, in evaluation mode; the original is not touched."""
    return copy.deepcopy(module).to(device="cpu", dtype=dtype).eval()
