"""A finished run → its network in INT8, in a folder beside its model: calibrated, trained while rounded, exported, compared."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from finetune.deploy.golden import write_goldens
from finetune.deploy.graph import INPUT, OPSET, OUTPUT, write_module
from finetune.finished import recipe_of
from finetune.inference.predict import behaviour_of
from finetune.inference.window import Inference, footprint
from finetune.labelled import read_labelled
from finetune.quantisation.result import SCHEMA_VERSION, Quantised, write_facts
from finetune.quantisation.settings import QuantiseSettings
from finetune.quantisation.training import calibration_batches, show, train
from finetune.recipe import FinetuneRecipe
from finetune.training.patches import PatchSampler
from resunet.architecture import Architecture
from resunet.bundle.contract import FootprintFacts, Graph, InputFacts, OutputFacts, Runtime
from resunet.bundle.engines import Engine, open_engine, version_of
from resunet.bundle.scorer import EngineScorer
from resunet.checkpoint import WEIGHTS, ModelConfig, model_folder
from resunet.ensemble import Ensemble
from resunet.errors import CheckFailed, EnvironmentFault, InputError
from resunet.files import folder_aside, refuse_taken, sha256
from resunet.inference.window import Floats
from resunet.machine import versions
from resunet.model import Segmenter, load_finetuned
from resunet.progress import say
from resunet.training import start_ranks

# Of logits, over max(1, the largest of them): an engine's integer kernels round a value that lies between two to the other one now
# and then, and what follows takes that up. A graph of one wrong scale is off by more.
TOLERANCE = 0.1
_COMPARED = 2  # batches


@dataclass(frozen=True)
class _Work:
    """What a method works on. batches: training patches that set the first ranges."""

    network: Segmenter
    architecture: Architecture
    recipe: FinetuneRecipe
    settings: QuantiseSettings
    sampler: PatchSampler
    batches: list[Tensor]
    accelerator: Accelerator


def quantise(run: Path, settings: QuantiseSettings, out: Path) -> Path:
    """Quantise the network of a finished run into `out`, which stands whole or not at all; the recipe's seed decides everything.

    Ranges and training see the run's training cases only, never val or test.

    Raises:
        InputError: no finished run, `out` exists, or a network that cannot be quantised so.
        EnvironmentFault: a package that the method needs is missing.
        CheckFailed: an engine does not answer as the rounded network does, or a loss that is not finite.
    """
    refuse_taken(out, key="")
    refuse_missing(settings)
    recipe = recipe_of(run)
    recipe = recipe.model_copy(update={"precision": "fp32"})  # values are rounded to integers, not to bfloat16
    folder = model_folder(run)
    network, config = load_finetuned(folder)
    refuse_unfit(run, network, settings)
    accelerator = start_ranks(recipe.model_copy(update={"steps": settings.steps}), recipe.batch, "patches")
    train = read_labelled(recipe, quiet=False).train
    sampler = PatchSampler(train, recipe.patch, recipe.foreground, recipe.foreground_by == "object")
    batches = calibration_batches(recipe, settings, sampler)
    with folder_aside(out) as aside:
        make = _by_nncf if settings.by_nncf else _by_torchao
        work = _Work(network, config.architecture, recipe, settings, sampler, batches, accelerator)
        rounded, graphs = make(work, aside)
        facts = _describe(network, config, settings, sha256(folder / WEIGHTS), graphs)
        difference = _compare(aside, facts, rounded, batches)
        found = footprint(network, config.architecture.in_channels, torch.device("cpu"))
        golden = write_goldens(
            aside,
            lambda flips: EngineScorer(rounded, found, config.architecture.spatial_dims, flips),
            config.architecture.in_channels,
            config.architecture.spatial_dims,
            behaviour_of(config, facts.weights_sha256),
            Inference().overlap,
            "int8",
        )
        write_facts(aside, replace(facts, golden=golden, difference=difference))
    return out


def refuse_missing(settings: QuantiseSettings) -> None:
    """Raises EnvironmentFault unless what a method needs is installed."""
    needed = ("nncf", "openvino") if settings.by_nncf else ("torchao", "onnx", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        extra = "nncf" if settings.by_nncf else "export"
        raise EnvironmentFault(
            f"method={settings.method}: {', '.join(missing)} is not installed: pip install 'resunet[{extra}]'."
        )
    if not settings.by_nncf and not any(version_of(engine) for engine in ("openvino", "onnxruntime")):
        raise EnvironmentFault(
            f"method={settings.method}: neither openvino nor onnxruntime is installed to run it: pip install 'resunet[export]'."
        )
    if settings.by_nncf and (missing := [name for name in ("ninja", "c++") if shutil.which(name) is None]):
        raise EnvironmentFault(
            f"method={settings.method}: NNCF compiles its operators, and {', '.join(missing)} is not on the path. Install a C++ "
            "compiler and ninja (pip install ninja, in an activated environment), or take method=qat or ptq."
        )


def refuse_unfit(run: Path, network: Segmenter, settings: QuantiseSettings) -> None:
    """Raises InputError for what cannot be quantised so: an ensemble, some batch norm, or a layer's name that no layer has."""
    if isinstance(network, Ensemble):
        raise InputError(f"{run}: is an ensemble; quantise one of its members, or distil it into one network first (teacher=).")
    if settings.freeze_statistics:
        from finetune.quantisation.pt2e import foldable_in_training

        if not foldable_in_training(network):
            raise InputError(
                f"freeze_statistics={settings.freeze_statistics:g}: torchao trains with batch norm in 2D, and where its epsilon is "
                "1e-5. Set 0, which folds it before the first step."
            )
    if settings.keep_float and not settings.by_nncf:
        from finetune.quantisation.pt2e import capture, refuse_unknown_layers

        refuse_unknown_layers(capture(network, network.config.architecture.in_channels, training=False), settings.keep_float)


def _by_torchao(work: _Work, folder: Path) -> tuple[Engine, tuple[Graph, ...]]:
    """Write model.onnx; the rounded network as an engine, and the graphs that are of the file."""
    from finetune.quantisation import pt2e

    architecture, settings, device = work.architecture, work.settings, work.accelerator.device
    prepared = pt2e.prepare(
        work.network,
        architecture.in_channels,
        settings.trains,
        settings.freeze_statistics > 0,
        settings.grid,
        settings.keep_float,
    )
    prepared = prepared.to(device)
    if settings.trains:
        pt2e.set_ranges(prepared, moving=True, rounding=False)
    show(prepared, work.batches, device)
    if settings.trains:
        statistics, observers = (
            round(share * settings.steps) for share in (settings.freeze_statistics, settings.freeze_observers)
        )

        def freeze(step: int) -> None:
            pt2e.set_ranges(prepared, moving=step < observers)
            if step == statistics:
                pt2e.freeze_statistics(prepared)

        train(prepared, work.recipe, settings, work.sampler, work.accelerator, folder, freeze)
    if missed := pt2e.unobserved(prepared):
        raise CheckFailed(f"{', '.join(missed)}: saw no finite value in {settings.calibration} training patches.")
    converted = pt2e.convert(prepared.cpu())
    write_module(converted, architecture.in_channels, architecture.spatial_dims, folder / "model.onnx")
    graphs: list[Runtime] = ["openvino", "onnxruntime"]
    return engine_of(converted), tuple(Graph(one, "int8", "model.onnx", OPSET, None, TOLERANCE) for one in graphs)


def _by_nncf(work: _Work, folder: Path) -> tuple[Engine, tuple[Graph, ...]]:
    """As `_by_torchao`, by NNCF: model.xml and model.bin."""
    from finetune.quantisation import by_nncf

    architecture = work.architecture
    prepared = by_nncf.prepare(work.network, work.batches)
    if work.settings.trains:
        prepared = prepared.to(work.accelerator.device)
        train(prepared, work.recipe, work.settings, work.sampler, work.accelerator, folder, lambda step: None)
        prepared = prepared.cpu()
    version = by_nncf.write(prepared, architecture.in_channels, architecture.spatial_dims, folder / "model.xml")
    return engine_of(prepared), (Graph("openvino", "int8", "model.xml", None, version, TOLERANCE),)


def engine_of(module: fx.GraphModule | nn.Module) -> Engine:
    """A module in PyTorch as an engine."""

    @torch.no_grad()
    def run(images: Floats) -> Floats:
        return np.asarray(module(torch.from_numpy(np.ascontiguousarray(images))).numpy(), np.float32)

    return run


def _describe(
    network: Segmenter, config: ModelConfig, settings: QuantiseSettings, weights: str, graphs: tuple[Graph, ...]
) -> Quantised:
    architecture = config.architecture
    assert config.classes is not None
    found = footprint(network, architecture.in_channels, torch.device("cpu"))
    binary = len(config.classes) == 2
    return Quantised(
        schema_version=SCHEMA_VERSION,
        method=settings.method,
        grid=settings.grid,
        steps=settings.steps if settings.trains else 0,
        calibration=settings.calibration,
        keep_float=settings.keep_float,
        weights_sha256=weights,
        spatial_dims=architecture.spatial_dims,
        input=InputFacts(INPUT, config.input_channels, architecture.in_channels, config.spacing, "LPS"),
        output=OutputFacts(OUTPUT, found.logits, "logits", *(("sigmoid", 0.5) if binary else ("softmax", None))),
        footprint=FootprintFacts(*found),
        graphs=graphs,
        golden=(),
        difference={},
        versions=versions(),
        files={},
    )


def _compare(folder: Path, facts: Quantised, rounded: Engine, batches: Sequence[Tensor]) -> dict[str, float]:
    """By runtime, how far it is from the rounded network on training patches, whole and cut to odd sides.

    Raises:
        CheckFailed: further than the tolerance.
    """
    images = [batch.numpy() for batch in batches[:_COMPARED]]
    images += [image[(slice(None), slice(None), *(slice(0, n - n % 2 - 1) for n in image.shape[2:]))] for image in images]
    found: dict[str, float] = {}
    for graph in facts.graphs:
        if version_of(graph.runtime) is None:
            continue
        engine = open_engine(folder, facts, graph)
        largest = 0.0
        for image in images:
            wanted, found_here = rounded(image), engine(image)
            if not (np.isfinite(wanted).all() and np.isfinite(found_here).all()):
                raise CheckFailed(f"{graph.runtime}: logits of it or of the rounded network are not finite.")
            largest = max(largest, float(np.abs(found_here - wanted).max() / max(1.0, float(np.abs(wanted).max()))))
        found[graph.runtime] = round(largest, 6)
        say(f"{graph.runtime}: logits are within {largest:.2g} of the rounded network's in PyTorch, on training patches")
        if largest > graph.tolerance:
            raise CheckFailed(
                f"{graph.runtime}: logits are {largest:.2g} from the rounded network's; at most {graph.tolerance:g}."
            )
    return found
