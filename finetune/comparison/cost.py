"""What a network costs where it is used: parameters, file size, operations and time of one input."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from finetune.inference.window import footprint
from resunet.checkpoint import WEIGHTS, model_folder, read_config
from resunet.data.images import channel_count
from resunet.layout import channels_last, place, spatial_dims_of
from resunet.model import load_model
from resunet.report import Section

_SIDES = {2: 256, 3: 64}  # pixels or voxels of the input, by the network's spatial dimensions; more of a very deep one
_ROUNDS = 3
_ROUND_SECONDS = 0.2  # at least, for each network


@dataclass(frozen=True)
class Cost:
    """Of one network.

    weights_bytes: of model.safetensors. size: of the input, batch 1.
    gflop: 10⁹ floating-point operations of the input, a multiply-add being two.
    seconds: of a forward pass in float32 on this machine's CPU, the median of rounds in which the networks take turns.
    """

    parameters: int
    weights_bytes: int
    size: tuple[int, ...]
    gflop: float
    seconds: float


def costs_of(runs: Mapping[str, Path]) -> dict[str, Cost]:
    """Of finished runs, name → run directory; measured side by side, so that their ratio holds on a busy machine too."""
    cpu = torch.device("cpu")
    models = {name: place(load_model(folder), cpu) for name, folder in runs.items()}
    channels = {name: channel_count(read_config(model_folder(folder)).input_channels) for name, folder in runs.items()}
    # instance norm needs more than one position at the coarsest level
    deepest = max(footprint(model, channels[name], cpu).stride for name, model in models.items())
    inputs = {}
    for name, model in models.items():
        dims = spatial_dims_of(model)
        inputs[name] = channels_last(torch.zeros(1, channels[name], *[max(_SIDES[dims], 2 * deepest)] * dims))
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, model in models.items():
            rounds[name].append(_seconds(model, inputs[name]))
    return {
        name: Cost(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weights_bytes=(model_folder(runs[name]) / WEIGHTS).stat().st_size,
            size=tuple(inputs[name].shape[2:]),
            gflop=_gflop(model, inputs[name]),
            seconds=statistics.median(rounds[name]),
        )
        for name, model in models.items()
    }


def cost_section(costs: Mapping[str, Cost]) -> Section:
    """A table of them, each beside the first."""
    first = next(iter(costs.values()))
    rows = [
        ["", *costs],
        ["Parameters, million", *(f"{cost.parameters / 1e6:.2f}" for cost in costs.values())],
        ["Weights, MB", *(f"{cost.weights_bytes / 1e6:.1f}" for cost in costs.values())],
        ["Input", *("×".join(map(str, cost.size)) for cost in costs.values())],
        ["GFLOP (a multiply-add is two)", *(f"{cost.gflop:.2f}" for cost in costs.values())],
        ["Milliseconds", *(f"{cost.seconds * 1e3:.1f}" for cost in costs.values())],
        [f"Speed, {next(iter(costs))} = 1", *(f"{first.seconds / cost.seconds:.2f}" for cost in costs.values())],
    ]
    told = (
        f"One input, batch 1, float32, {torch.get_num_threads()} threads of this machine's CPU; the networks took turns, medians "
        f"of {_ROUNDS} rounds. Window, reading and writing are not in it."
    )
    return Section("Size and speed", text=[told], table=rows)


def record_of(costs: Mapping[str, Cost]) -> dict[str, Any]:
    """As it stands in compare.json."""
    return {name: asdict(cost) | {"threads": torch.get_num_threads()} for name, cost in costs.items()}


def _seconds(model: nn.Module, example: torch.Tensor) -> float:
    with torch.inference_mode():
        timer = Timer("model(example)", globals={"model": model, "example": example}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=_ROUND_SECONDS).median)


def _gflop(model: nn.Module, example: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(example)
    return float(counter.get_total_flops() / 1e9)
