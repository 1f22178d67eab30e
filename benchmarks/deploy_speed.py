"""How fast a segmenter is, from what a user has to what a bundle gives: milliseconds an image, medians, in one run, interleaved.

python -m benchmarks.deploy_speed --run runs/tumour --bundle "INT8 QAT=tumour.bundle" --bundle "INT8 QAT pruned=small.bundle"

The run is timed in PyTorch: eager in float32, with channels last, with bfloat16, compiled; every bundle in all that it holds. One
image of --side² at a time, --threads threads in every runtime. All are built first; then each is called once a round, in an order
that is drawn anew, so that whatever else the machine does falls on all. The first rows are the baselines: every row says how many
times as fast as both it is.
"""

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resunet.bundle import Bundle
from resunet.bundle.contract import Graph
from resunet.bundle.engines import name_of, version_of
from resunet.checkpoint import model_folder
from resunet.layout import channels_last, place
from resunet.model import load_finetuned

_EAGER, _OPENVINO = "PyTorch eager fp32", "OpenVINO fp32"
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f32", "int8": "f32"}


@dataclass(frozen=True)
class Arm:
    """What is timed: a call is one image."""

    name: str
    call: Callable[[], object]


def pytorch_arms(run: Path, image: np.ndarray, compiled: bool) -> list[Arm]:
    """The live network, as a user has it and as fast as it gets."""
    network, _ = load_finetuned(model_folder(run))
    plain, x = network.eval(), torch.from_numpy(image)
    placed = place(load_finetuned(model_folder(run))[0].eval(), torch.device("cpu"))
    last = channels_last(x)

    def arm(name: str, module: nn.Module, given: torch.Tensor, half: bool = False) -> Arm:
        def call() -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
                module(given)

        return Arm(name, call)

    arms = [
        arm(_EAGER, plain, x),
        arm("PyTorch channels_last fp32", placed, last),
        arm("PyTorch channels_last bf16", placed, last, half=True),
    ]
    if compiled:
        arms.append(arm("PyTorch torch.compile fp32", torch.compile(placed), last))
    return arms


def bundle_arms(label: str, path: Path, image: np.ndarray, threads: int) -> list[Arm]:
    """Every graph of a bundle but PyTorch's; export it with --precision fp32,bf16,int8."""
    bundle = Bundle.open(path)
    arms = []
    for graph in bundle.contract.graphs:
        if version_of(graph.runtime) is None or graph.runtime not in ("openvino", "onnxruntime"):
            continue
        title = f"{name_of(graph.runtime)} {graph.precision}"
        title += f" {bundle.contract.quantisation.method}" if graph.precision == "int8" and bundle.contract.quantisation else ""
        arms.append(Arm(f"{title}{label}", _caller(bundle, graph, image, threads)))
    return arms


def _caller(bundle: Bundle, graph: Graph, image: np.ndarray, threads: int) -> Callable[[], object]:
    path, name = bundle.folder / graph.file, bundle.contract.input.name
    if graph.runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {name: image})
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": _HINTS[graph.precision], "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda: request.infer([image])


def measure(arms: Sequence[Arm], rounds: int, warm: int) -> dict[str, list[float]]:
    """Milliseconds of every call of every arm, interleaved."""
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    order = random.Random(0)
    for arm in arms:
        for _ in range(warm):
            arm.call()
    for _ in range(rounds):
        for arm in order.sample(list(arms), len(arms)):
            start = time.perf_counter()
            arm.call()
            taken[arm.name].append(1000 * (time.perf_counter() - start))
    return taken


def rows_of(taken: dict[str, list[float]]) -> list[dict[str, float | str | None]]:
    """A row an arm: its median and quartiles, and how many times as fast as the baselines it is."""
    medians = {name: statistics.median(values) for name, values in taken.items()}
    baselines = {"times_eager": medians.get(_EAGER), "times_openvino": medians.get(_OPENVINO)}
    rows = []
    for name, values in taken.items():
        low, _, high = statistics.quantiles(values, n=4)
        times = {key: None if base is None else base / medians[name] for key, base in baselines.items()}
        rows.append({"arm": name, "ms": medians[name], "low": low, "high": high, "a_second": 1000 / medians[name]} | times)
    return rows


def table(rows: Sequence[dict[str, float | str | None]]) -> str:
    head = ("arm", "ms", "quartiles", "images/s", f"× {_EAGER}", f"× {_OPENVINO}")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        times = ["–" if row[key] is None else f"{row[key]:.1f}" for key in ("times_eager", "times_openvino")]
        cells = [row["arm"], f"{row['ms']:.1f}", f"{row['low']:.1f}–{row['high']:.1f}", f"{row['a_second']:.1f}", *times]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a fine-tuning run: the unpruned network, the baseline")
    parser.add_argument("--bundle", action="append", default=[], help="LABEL=FOLDER or FOLDER; the first without a label")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="torch.compile needs a C++ compiler")
    parser.add_argument("--out", type=Path, help="a new .json of all figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network, config = load_finetuned(model_folder(given.run))
    shape = (1, config.architecture.in_channels, *[given.side] * config.architecture.spatial_dims)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    arms = pytorch_arms(given.run, image, not given.no_compile)
    for one in given.bundle:
        label, _, path = one.rpartition("=")
        arms += bundle_arms(f", {label}" if label else "", Path(path), image, given.threads)
    if len({arm.name for arm in arms}) < len(arms):
        parser.error("two bundles have the same arms: give each but one a LABEL=")
    parameters = sum(one.numel() for one in network.parameters())
    print(
        f"{parameters:,} parameters, {'×'.join(map(str, shape))}, {given.threads} threads, {given.rounds} rounds\n", flush=True
    )
    rows = rows_of(measure(arms, given.rounds, given.warm))
    print(table(rows))
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
