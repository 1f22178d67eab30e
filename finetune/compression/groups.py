"""Which channels of a network go together, and what each costs: torch-pruning's dependency graph, by layers' names.

A residual stream, its norms and all that reads it lose a channel together or not at all (Fang et al. 2023, arXiv 2301.12900). The
graph is only read: channels are removed by names and places, so that the pruned network is built like any other.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from resunet.layout import spatial_dims_of
from resunet.model import Segmenter, build_model
from resunet.widths import CONVOLUTIONS, NORMS, TRANSPOSED, Width, has_width, is_depthwise, widths_of

REFERENCE = {2: 256, 3: 64}  # pixels a side of the input that multiply-adds are counted of
_TRACED = 64  # pixels a side of the input that the graph is made with


@dataclass(frozen=True)
class Use:
    """Where a layer has the channels of a group: place of each in what it takes (in) or gives (out); of a norm both are one."""

    layer: str
    side: Literal["in", "out"]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that are removed together. unit: they go in sets of so many, one of every group of a group norm.

    name: of the layer that gives them first, as the network runs.
    """

    name: str
    channels: int
    unit: int
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs: parameters a · in · out + b · out, multiply-adds m · in · out; of depthwise ones and norms without in."""

    product: float
    each: float
    multiply_adds: float
    width: Width
    shared: bool  # channels out are channels in

    def parameters(self, width: Width) -> float:
        return self.product * self._pairs(width) + self.each * width[1]

    def macs(self, width: Width) -> float:
        return self.multiply_adds * self._pairs(width)

    def _pairs(self, width: Width) -> int:
        return width[1] if self.shared else width[0] * width[1]


@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-adds of an input of `REFERENCE` pixels a side."""

    parameters: int
    macs: int


def find_groups(network: Segmenter) -> list[Group]:
    """The groups of channels that can be removed, in the order in which the network runs: all but those in and the logits."""
    stand_in = _stand_in(network)
    names = {module: name for name, module in stand_in.named_modules()}
    x = torch.zeros(1, _channels_in(network), _TRACED, _TRACED)
    graph = tp.DependencyGraph().build_dependency(stand_in, example_inputs=x)
    order = {name: position for position, name in enumerate(_running_order(stand_in, x))}
    heads = list(stand_in.get_submodule("head").modules())
    groups = []
    for found in graph.get_all_groups(ignored_layers=heads, root_module_types=[nn.modules.conv._ConvNd]):
        uses = []
        for one in found:
            layer = one.dep.target.module
            if not has_width(layer):
                continue
            side: Literal["in", "out"] = "out" if graph.is_out_channel_pruning_fn(one.dep.handler) else "in"
            place_of = dict(zip(one.root_idxs, one.idxs, strict=True))
            uses.append(Use(names[layer], side, tuple(place_of[root] for root in range(len(found[0].idxs)))))
        unit = math.lcm(*(_norm_groups(network, use.layer) for use in uses))
        uses.sort(key=lambda use: order[use.layer])
        name = next(use.layer for use in uses if use.side == "out")
        groups.append(Group(name, len(found[0].idxs), unit, tuple(uses)))
    return sorted(groups, key=lambda group: order[group.name])


def layer_costs(network: Segmenter) -> dict[str, LayerCost]:
    """What every layer costs, by name, for an input of `REFERENCE` pixels a side."""
    dims = spatial_dims_of(network)
    positions: dict[str, int] = {}

    def look(name: str, layer: nn.Module) -> None:
        def note(_: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
            seen = given[0] if isinstance(layer, TRANSPOSED) else made
            positions[name] = positions.get(name, 0) + math.prod(seen.shape[2:])

        hooks.append(layer.register_forward_hook(note))

    trial = copy.deepcopy(network).to("meta").eval()
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    layers = {name: layer for name, layer in trial.named_modules() if has_width(layer)}
    for name, layer in layers.items():
        look(name, layer)
    trial(torch.empty(1, _channels_in(network), *[REFERENCE[dims]] * dims, device="meta"))
    widths = widths_of(network)
    return {name: _cost(layer, widths[name], positions[name]) for name, layer in layers.items()}


def size_at(costs: Mapping[str, LayerCost], widths: Mapping[str, Width]) -> Size:
    """Of a network with layers of these widths; layers that are not named are as they are."""
    found = [(cost, widths.get(name, cost.width)) for name, cost in costs.items()]
    return Size(round(sum(c.parameters(w) for c, w in found)), round(sum(c.macs(w) for c, w in found)))


def widths_after(groups: Sequence[Group], removed: Sequence[int], costs: Mapping[str, LayerCost]) -> dict[str, Width]:
    """The widths of all layers once every group has lost so many channels."""
    widths = {name: list(cost.width) for name, cost in costs.items()}
    for group, gone in zip(groups, removed, strict=True):
        for use in group.uses:
            for side in (0, 1) if costs[use.layer].shared else (0 if use.side == "in" else 1,):
                widths[use.layer][side] -= gone
    return {name: (width[0], width[1]) for name, width in widths.items()}


def keep_channels(network: Segmenter, groups: Sequence[Group], removed: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The network's tensors without these channels of every group."""
    gone: dict[tuple[str, str], list[int]] = {}
    for group, channels in zip(groups, removed, strict=True):
        for use in group.uses:
            gone.setdefault((use.layer, use.side), []).extend(use.places[channel] for channel in channels)
    layers, tensors = dict(network.named_modules()), dict(network.state_dict())
    for name in list(tensors):
        owner = name.rpartition(".")[0]
        layer, tensor = layers[owner], tensors[name]
        if not has_width(layer) or tensor.ndim == 0:
            continue
        sides = ("out", "in") if name.endswith(".weight") and tensor.ndim > 1 and not is_depthwise(layer) else ("out",)
        if isinstance(layer, TRANSPOSED) and len(sides) == 2:
            sides = ("in", "out")
        for dim, side in enumerate(sides):
            if lost := gone.get((owner, side)):
                left = sorted(set(range(tensor.shape[dim])) - set(lost))
                tensor = tensor.index_select(dim, torch.tensor(left, device=tensor.device))
        tensors[name] = tensor
    return tensors


def _cost(layer: nn.Module, width: Width, positions: int) -> LayerCost:
    parameters = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, NORMS):
        return LayerCost(0.0, float(len(parameters)), 0.0, width, shared=True)
    assert isinstance(layer, CONVOLUTIONS + TRANSPOSED)
    kernel = math.prod(layer.kernel_size)
    return LayerCost(float(kernel), float("bias" in parameters), float(kernel * positions), width, is_depthwise(layer))


def _stand_in(network: Segmenter) -> Segmenter:
    """The same layers by name and width in 2D and with batch norm, of which the graph can be read off autograd's nodes.

    torch-pruning 1.6.1 takes a slice of a volume's sides for one of its channels, and does not see through instance norm.
    """
    architecture = network.config.architecture
    plain = {"spatial_dims": 2} | ({"norm": "batch"} if hasattr(architecture, "norm") else {})
    stand_in = build_model(architecture.model_copy(update=plain))
    assert isinstance(stand_in, Segmenter)
    return stand_in.eval()


@torch.no_grad()
def _running_order(network: nn.Module, x: Tensor) -> list[str]:
    seen: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, layer in network.named_modules()
        if has_width(layer)
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(seen))


def _norm_groups(network: nn.Module, layer: str) -> int:
    module = network.get_submodule(layer)
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def _channels_in(network: Segmenter) -> int:
    return network.config.architecture.in_channels
