"""The light network beside the full Res-UNet, SMP's Unet on the same encoders, and LR-ASPP: parameters, FLOPs and images a second.

    pip install segmentation-models-pytorch
    python -m benchmarks.light --threads 2 --rounds 15

One grey image of 256² at batch 1, evaluation mode. Eager PyTorch: each network in the fastest of fp32 and bf16 (autocast), with
channels first and last, by a first look. Exported: one ONNX graph of this size each, in OpenVINO (the faster of fp32 and bf16) and
in ONNX Runtime (fp32). All contenders take turns, so that what shares the machine disturbs all alike; medians over the rounds, and
the median over the rounds of how many times the Res-UNet's images a second.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks import flops, parameters
from resunet.light_model import MobileResUNet
from resunet.model import ResUNet

FULL = "Res-UNet (32–512)"
LIGHT = ("mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_075", "mobilenetv3_large_100")
SMP = ("mobilenetv3_small_100", "mobilenetv3_large_100")
_LOOKS = 5  # of every format, before one is chosen
_WARM = 2
Action = Callable[[], object]


class Colours(nn.Module):
    """A network of colour images on grey ones; its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.expand(-1, 3, -1, -1))["out"]
        return logits


def smp_unet(backbone: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.Unet(f"tu-{backbone}", encoder_weights=None, in_channels=1, classes=1)
    return network


def lraspp() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return Colours(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1))


def contenders() -> dict[str, nn.Module]:
    built: dict[str, Callable[[], nn.Module]] = {FULL: ResUNet}
    built |= {f"light, {one}": partial(MobileResUNet, 1, 2, one) for one in LIGHT}
    built |= {f"SMP Unet, {one}": partial(smp_unet, one) for one in SMP}
    built |= {"torchvision LR-ASPP, mobilenet_v3_large": lraspp}
    return {name: build().eval() for name, build in built.items()}


# ---- what is timed


def eager(network: nn.Module, x: Tensor, bf16: bool, last: bool) -> Action:
    layout = torch.channels_last if last else torch.contiguous_format
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    image = x.contiguous(memory_format=layout)

    @torch.inference_mode()
    def action() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network(image)

    return action


def own_format(network: nn.Module, x: Tensor) -> tuple[str, Action]:
    """The fastest of precisions and memory formats; the network is laid out so."""
    seconds: dict[tuple[bool, bool], float] = {}
    for bf16, last in itertools.product((False, True), repeat=2):
        action = eager(network, x, bf16, last)
        action()
        seconds[bf16, last] = min(timed(action) for _ in range(_LOOKS))
    bf16, last = min(seconds, key=lambda both: seconds[both])
    return f"{'bf16' if bf16 else 'fp32'}, channels {'last' if last else 'first'}", eager(network, x, bf16, last)


def fastest(actions: Mapping[str, Action]) -> tuple[str, Action]:
    """By the least of a few runs."""
    seconds = {}
    for name, action in actions.items():
        action()
        seconds[name] = min(timed(action) for _ in range(_LOOKS))
    best = min(seconds, key=lambda name: seconds[name])
    return best, actions[best]


def write_graph(network: nn.Module, x: Tensor, path: Path) -> Path:
    """An ONNX graph of this size: the same treatment for all."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (x,), dynamo=True, external_data=False, opset_version=18, verbose=False)
    assert program is not None
    program.save(path)
    return path


def in_openvino(path: Path, x: Tensor, hint: str, threads: int) -> Action:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled, image = openvino.Core().compile_model(path, "CPU", settings), x.numpy()
    return lambda: compiled(image)


def in_onnxruntime(path: Path, x: Tensor, threads: int) -> Action:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, image = session.get_inputs()[0].name, x.numpy()
    return lambda: session.run(None, {name: image})


# ---- timing


def timed(action: Action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def interleaved(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """name → seconds of every round, in turns; each is warm when its turn is timed."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(_WARM + rounds):
        for name, action in actions.items():
            action()  # the caches are the last one's
            if turn >= _WARM:
                seconds[name].append(timed(action))
    return seconds


@dataclass(frozen=True)
class Row:
    """how: the format that was chosen. images: a second, the median. times: the Res-UNet's, the median over the rounds."""

    engine: str
    network: str
    how: str
    images: float
    times: float


def rows_of(engine: str, chosen: Mapping[str, tuple[str, Action]], rounds: int) -> list[Row]:
    seconds = interleaved({name: action for name, (_, action) in chosen.items()}, rounds)
    full = np.array(seconds[FULL])
    return [
        Row(engine, name, how, float(1 / np.median(seconds[name])), float(np.median(full / np.array(seconds[name]))))
        for name, (how, _) in chosen.items()
    ]


def measure(networks: Mapping[str, nn.Module], size: int, rounds: int, threads: int, engines: Sequence[str]) -> list[Row]:
    x, rows = torch.randn(1, 1, size, size), []
    if "eager" in engines:
        rows += rows_of("PyTorch, eager", {name: own_format(network, x) for name, network in networks.items()}, rounds)
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            name: write_graph(network.to(memory_format=torch.contiguous_format), x, Path(folder) / f"{number}.onnx")  # type: ignore[call-overload]
            for number, (name, network) in enumerate(networks.items())
            if set(engines) - {"eager"}
        }
        if "openvino" in engines:
            best_hint = {
                name: fastest({"fp32": in_openvino(path, x, "f32", threads), "bf16": in_openvino(path, x, "bf16", threads)})
                for name, path in graphs.items()
            }
            rows += rows_of("OpenVINO", best_hint, rounds)
        if "onnxruntime" in engines:
            rows += rows_of(
                "ONNX Runtime", {name: ("fp32", in_onnxruntime(path, x, threads)) for name, path in graphs.items()}, rounds
            )
    return rows


def table(networks: Mapping[str, nn.Module], rows: Sequence[Row], size: int) -> str:
    engines = list(dict.fromkeys(row.engine for row in rows))
    head = ["network", "parameters", f"GFLOP at {size}²", *(f"{engine}: images a second" for engine in engines)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, network in networks.items():
        cells = [name, f"{parameters(network) / 1e6:.2f} M", f"{flops(network, size) / 1e9:.2f}"]
        its = {row.engine: row for row in rows if row.network == name}
        cells += [f"{its[one].images:.1f} ({its[one].times:.1f} ×; {its[one].how})" for one in engines]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument(
        "--engines", nargs="+", choices=("eager", "openvino", "onnxruntime"), default=["eager", "openvino", "onnxruntime"]
    )
    parser.add_argument("--only", nargs="+", help="networks whose name holds one of these words, beside the Res-UNet")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    networks = contenders()
    if options.only:
        networks = {name: one for name, one in networks.items() if name == FULL or any(word in name for word in options.only)}
    rows = measure(networks, options.size, options.rounds, options.threads, options.engines)
    print(f"{options.threads} threads, {options.rounds} rounds, load before {os.getloadavg()[0]:.1f}\n")
    print(table(networks, rows, options.size))
    if options.json:
        found: dict[str, Any] = {"threads": options.threads, "size": options.size, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
