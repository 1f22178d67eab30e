"""Res-UNet beside other U-Nets at equal CPU time and at equal steps, fully labelled.

    pip install segmentation-models-pytorch
    python -m benchmarks.network_comparison --data DIR --out DIR
    python -m benchmarks.network_tables --out DIR

DIR holds brain_tumor_128, dsb2018 and cxr_montgomery. Every network gets the same data, patches in the same order, augmentation,
loss, bf16 autocast, channels_last, AdamW and one thread, and as many steps as fit into `--minutes` of CPU time (drawing and
augmenting included, validation not) by its own pace: that of the fastest of some steps, measured first, when nothing else should
run; what shares the machine later slows the benchmark and changes no result. Warm-up and cosine run over those steps. The
learning rate is chosen by val among three, in short runs on brain_tumor_128, and carried to the other sets. Val, a fixed
subset, chooses the checkpoint; test is read once a run, by it and by the checkpoint after as many steps as the U-Net made. With
`--claims`, at the end: a U-Net of the Res-UNet's number of parameters, and runs whose cosine ends at the U-Net's number of steps.

A cell (network, data, seed) is a process of its own and a line of results.jsonl; what is there is not run again.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.light import lraspp
from benchmarks.light import smp_unet as light_smp_unet
from finetune.evaluation.evaluate import measure_cases
from finetune.evaluation.metrics import values_by_group
from finetune.evaluation.statistics import group_means
from finetune.evaluation.targets import targets_of
from finetune.labelled import LabelledData, read_labelled, resolve
from finetune.recipe import FinetuneRecipe
from finetune.training.augment import augment
from finetune.training.patches import PatchSampler
from resunet.config import Precision
from resunet.data.cases import LoadedCase
from resunet.files import folder_aside, write_text
from resunet.light_model import MobileResUNet
from resunet.losses import segmentation_loss
from resunet.model import ResUNet, UNet
from resunet.training import learning_rate, parameter_groups, step_generator

Record = dict[str, Any]

RATES = (3e-4, 1e-3, 3e-3)
BRAIN = "brain_tumor_128"
ORDER = ((BRAIN, 0), ("dsb2018", 0), ("cxr_montgomery", 0), (BRAIN, 1), (BRAIN, 2))  # data and seed
PATCH = {BRAIN: (128, 8), "dsb2018": (128, 8), "cxr_montgomery": (256, 4)}  # pixels a side, patches a step
REDUCE = {BRAIN: 1, "dsb2018": 1, "cxr_montgomery": 2}  # 512² to 256²
VALIDATE_AT = (0.5, 0.625, 0.75, 0.875, 1.0)  # share of the budget
VAL_CASES, VAL_PIXELS = 40, 1_200_000  # at most
PACE_STEPS = 12
CPU = torch.device("cpu")


class Padded(nn.Module):
    """A network that needs multiples of a stride, on any size: the edge goes on, and the logits are cropped."""

    def __init__(self, network: nn.Module, stride: int) -> None:
        super().__init__()
        self.network, self.stride = network, stride

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        logits: Tensor = self.network(F.pad(x, (0, -width % self.stride, 0, -height % self.stride), mode="replicate"))
        return logits[:, :, :height, :width]


def smp_unet() -> nn.Module:
    import segmentation_models_pytorch as smp

    return Padded(smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=1), 32)


def monai_unet() -> nn.Module:
    from monai.networks.nets import UNet as MonaiUNet

    return Padded(MonaiUNet(2, 1, 1, (32, 64, 128, 256, 512), (2, 2, 2, 2), num_res_units=2), 16)


# the U-Net first: the others are also judged after as many steps as it made
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "U-Net (64–1024)": UNet,
    "Res-UNet (32–512)": ResUNet,
    "SMP Unet, resnet34": smp_unet,
    "MONAI UNet": monai_unet,
}
PLAIN, OURS = list(NETWORKS)[:2]
SCALED = "U-Net (42–672)"
# of `benchmarks.light_networks`; on CPUs depthwise convolutions are slower in bf16
LIGHT: dict[str, Callable[[], nn.Module]] = {
    "light, small": partial(MobileResUNet, 1, 2, "mobilenetv3_small_100"),
    "light, large": partial(MobileResUNet, 1, 2, "mobilenetv3_large_100"),
    "SMP Unet, small": lambda: Padded(light_smp_unet("mobilenetv3_small_100"), 32),
    "LR-ASPP, large": lraspp,
}
PRECISION: dict[str, Precision] = {"light, small": "fp32", "light, large": "fp32", "LR-ASPP, large": "fp32"}
BUILD = {**NETWORKS, SCALED: lambda: UNet(channels=(42, 84, 168, 336, 672)), **LIGHT}


@dataclass(frozen=True)
class Cell:
    """kind: 'pace', 'grid' (short, val only), 'run' (the budget of time) or 'steps' (as many as the U-Net made)."""

    kind: str
    network: str
    data: str
    seed: int
    lr: float

    @property
    def precision(self) -> Precision:
        return PRECISION.get(self.network, "bf16")

    @property
    def name(self) -> str:
        rate = f" {self.lr:g}" if self.kind == "grid" else ""
        return f"{self.kind} {self.data} {self.seed} {self.network}{rate}"


# ---- training


def recipe_of(data: str, source: Path) -> FinetuneRecipe:
    """The settings that all networks share; what is not named is the project's default."""
    side, batch = PATCH[data]
    settings = {"source": source, "classes": {0: "background", 255: "target"}}
    values = dict(out="unused", steps=1, precision="bf16", data=settings, patch=(side, side), batch=batch)
    return resolve(FinetuneRecipe.model_validate(values))


def reduced(source: Path, out: Path, factor: int) -> Path:
    """A copy of a source of PNGs, each pixel the mean of factor²; of masks the majority."""
    if factor == 1 or out.exists():
        return source if factor == 1 else out
    with folder_aside(out) as aside:
        for part in ("images", "masks"):
            (aside / part).mkdir(parents=True)
            for path in sorted((source / part).iterdir()):
                image = Image.open(path).reduce(factor)
                (image if part == "images" else image.point(lambda value: 255 * (value > 127))).save(aside / part / path.name)
        for name in ("groups.csv", "splits.json"):
            (aside / name).write_bytes((source / name).read_bytes())
    return out


def val_subset(cases: Sequence[LoadedCase]) -> list[LoadedCase]:
    """A fixed random subset: at most VAL_CASES, and as many as VAL_PIXELS allow."""
    chosen: list[LoadedCase] = []
    pixels = 0
    for i in np.random.default_rng(0).permutation(len(cases)):
        if len(chosen) < VAL_CASES and pixels + math.prod(cases[i].size) <= VAL_PIXELS:
            chosen.append(cases[i])
            pixels += math.prod(cases[i].size)
    return chosen


def learn(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, precision: Precision) -> float:
    """One step of the optimiser; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = network(images.contiguous(memory_format=torch.channels_last))
    loss = segmentation_loss(logits, labels)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 12.0)
    optimizer.step()
    return float(loss.detach())


def prepared(network: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = BUILD[network]().to(memory_format=torch.channels_last)
    return model, torch.optim.AdamW(parameter_groups({"network": model}, 1e-2))


def group_dice(network: nn.Module, cases: Sequence[LoadedCase], precision: Precision) -> dict[str, float]:
    """group → mean Dice of its whole scans."""
    measured = measure_cases(network, cases, targets_of({0: "background", 1: "target"}), CPU, precision, quiet=True)
    return group_means(values_by_group([one.row() for one in measured], lambda case: case.macro("dice")))


@dataclass(frozen=True)
class Trained:
    """losses: one a step. val: steps and Dice. best, marked: weights, by val and at the mark."""

    losses: list[float]
    val: list[tuple[int, float]]
    val_seconds: float
    best: dict[str, Tensor]
    marked: dict[str, Tensor]


def train(cell: Cell, recipe: FinetuneRecipe, data: LabelledData, steps: int, mark: int) -> tuple[nn.Module, Trained]:
    """So many steps, of which the `mark`-th is kept, too."""
    model, optimizer = prepared(cell.network, cell.seed)
    sampler, val = PatchSampler(data.train, recipe.patch, recipe.foreground), val_subset(data.val)
    trained = Trained([], [], 0.0, {}, {})
    val_seconds = 0.0
    due = {math.ceil(share * steps) for share in VALIDATE_AT if cell.kind != "grid" or share == 1}
    for step in range(steps):
        loss = training_step(cell, recipe, model, optimizer, sampler, step, learning_rate(step, steps, recipe.warmup, cell.lr))
        trained.losses.append(round(loss, 5))
        if step + 1 == mark:
            trained.marked.update(copied(model))
        if not math.isfinite(loss):
            trained.val.append((step + 1, 0.0))
            break
        if step + 1 in due:
            started = time.process_time()
            score = round(float(np.mean(list(group_dice(model, val, cell.precision).values()))), 5)
            val_seconds += time.process_time() - started
            trained.val.append((step + 1, score))
            if score >= max(value for _, value in trained.val):
                trained.best.update(copied(model))
    return model, dataclasses.replace(trained, val_seconds=val_seconds)


def training_step(
    cell: Cell,
    recipe: FinetuneRecipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sampler: PatchSampler,
    step: int,
    lr: float,
) -> float:
    """Draw, augment, learn; the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    images, labels = sampler.batch(recipe.batch, (cell.seed, 2, step, 0))[:2]
    images, labels, _ = augment(images, labels, recipe.augment, step_generator(CPU, cell.seed, 3, step, 0))
    return learn(model, optimizer, images, labels, cell.precision)


def measure_pace(cell: Cell, recipe: FinetuneRecipe, data: LabelledData) -> Record:
    """CPU seconds of the fastest of PACE_STEPS steps, after one that warms up."""
    model, optimizer = prepared(cell.network, cell.seed)
    sampler = PatchSampler(data.train, recipe.patch, recipe.foreground)
    seconds = []
    for step in range(PACE_STEPS + 1):
        started = time.process_time()
        training_step(cell, recipe, model, optimizer, sampler, step, cell.lr)
        seconds.append(time.process_time() - started)
    found: Record = dataclasses.asdict(cell) | {"cell": cell.name, "seconds": min(seconds[1:]), "all": seconds[1:]}
    return found | {"cpu": time.process_time()}


def run_cell(cell: Cell, recipe: FinetuneRecipe, data: LabelledData, steps: int, pace: float, mark: int) -> Record:
    """Train and evaluate one cell. pace: CPU seconds a step."""
    model, trained = train(cell, recipe, data, steps, mark)
    steps = len(trained.losses)
    record: Record = dataclasses.asdict(cell) | {"cell": cell.name, "steps": steps, "seconds": steps * pace}
    record |= {"parameters": sum(one.numel() for one in model.parameters()), "losses": trained.losses}
    record |= {"val": trained.val, "val_cases": len(val_subset(data.val)), "val_seconds": trained.val_seconds}
    if cell.kind != "grid" and trained.best:
        started = time.process_time()
        record["chosen"] = max(step for step, score in trained.val if score == record_score(record))
        model.load_state_dict(trained.best)
        record["test"] = group_dice(model, data.test, cell.precision)
        record["marked"] = mark
        if record["marked"] == record["chosen"]:
            record["test_marked"] = record["test"]
        elif trained.marked:
            model.load_state_dict(trained.marked)
            record["test_marked"] = group_dice(model, data.test, cell.precision)
        record["test_seconds"] = time.process_time() - started
    return record | {"cpu": time.process_time()}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def record_score(record: Record) -> float:
    """The best Dice on val."""
    return float(max(score for _, score in record["val"]))


# ---- bf16 against fp32


def measure_steps(precision: Precision, side: int) -> Record:
    """Memory and CPU seconds of the Res-UNet's training step, batch 8; to be called once in a process."""
    before = resident("VmRSS")
    model, optimizer = prepared(OURS, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, side, side, generator=generator)
    labels = (torch.rand(8, side, side, generator=generator) < 0.1).to(torch.uint8)
    model.train()
    seconds = []
    for _ in range(4):
        started = time.process_time()
        learn(model, optimizer, images, labels, precision)
        seconds.append(time.process_time() - started)
    record: Record = {"cell": f"precision {precision} {side}", "kind": "precision", "precision": precision, "side": side}
    record |= {"before": before, "peak": resident("VmHWM"), "seconds": float(np.median(seconds[1:]))}
    return record | {"cpu": time.process_time()}


def resident(key: str) -> float:
    """MiB that this process has (VmRSS) or had at most (VmHWM); getrusage would count its parent in."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) / 1024


# ---- the queue


def read_results(path: Path) -> dict[str, Record]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["cell"]: record for record in map(json.loads, lines)}


def append(path: Path, record: Record) -> None:
    """One line more, whole or not at all."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, before + json.dumps(record) + "\n")


def append_in_a_process(path: Path, work: Callable[[], Record], cell: Cell) -> None:
    """What `work` of a cell gives, worked out in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=lambda: append(path, work()))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{cell.name}: exit code {process.exitcode}")


def rate_of(done: dict[str, Record], network: str) -> float:
    """The learning rate that val chose; the scaled U-Net has the U-Net's."""
    name = PLAIN if network == SCALED else network
    grid = [record for record in done.values() if record["kind"] == "grid" and record["network"] == name]
    return float(max(grid, key=record_score)["lr"])


def queue(done: dict[str, Record], claims: bool) -> Iterator[Cell]:
    """All cells in order, networks interleaved; a rate is looked up when its cell comes."""
    for data in (BRAIN, "cxr_montgomery"):
        yield from (Cell("pace", network, data, 0, RATES[1]) for network in ([*NETWORKS, SCALED] if claims else NETWORKS))
    for lr in RATES:
        yield from (Cell("grid", network, BRAIN, 0, lr) for network in NETWORKS)
    for data, seed in ORDER:
        yield from (Cell("run", network, data, seed, rate_of(done, network)) for network in NETWORKS)
    if claims:
        yield Cell("run", SCALED, BRAIN, 0, rate_of(done, SCALED))
        yield from (Cell("steps", network, BRAIN, 0, rate_of(done, network)) for network in NETWORKS if network != PLAIN)


def pace_of(done: dict[str, Record], network: str, data: str) -> float:
    """CPU seconds a step; data sets of one patch and batch have one pace."""
    known = BRAIN if PATCH[data] == PATCH[BRAIN] else data
    return float(done[Cell("pace", network, known, 0, 0).name]["seconds"])


def run_all(source: Path, out: Path, minutes: float, grid_minutes: float, claims: bool) -> None:
    """Every cell that is not in results.jsonl yet, one after another, each in a process of its own."""
    results = out / "results.jsonl"
    for precision, side in itertools.product(("bf16", "fp32"), (128, 256)):
        if f"precision {precision} {side}" not in read_results(results):
            # not forked: what this process holds would count
            command = [sys.executable, "-m", "benchmarks.network_comparison", "--precision", precision, "--side", str(side)]
            append(results, json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    loaded: dict[str, tuple[FinetuneRecipe, LabelledData]] = {}
    for cell in queue(done := read_results(results), claims):
        if cell.name in done:
            continue
        if cell.data not in loaded:
            recipe = recipe_of(cell.data, reduced(source / cell.data, out / cell.data, REDUCE[cell.data]))
            loaded[cell.data] = recipe, read_labelled(recipe, quiet=True)
        work: Callable[[], Record]
        if cell.kind == "pace":
            work = partial(measure_pace, cell, *loaded[cell.data])
        else:
            pace = pace_of(done, cell.network, cell.data)
            seconds = 60 * (grid_minutes if cell.kind == "grid" else minutes)
            plain = int(seconds / pace_of(done, PLAIN, cell.data))
            steps = plain if cell.kind == "steps" else int(seconds / pace)
            work = partial(run_cell, cell, *loaded[cell.data], steps, pace, plain)
        append_in_a_process(results, work, cell)
        done.update(read_results(results))
        one = done[cell.name]
        told = f"{one['seconds']:.3f} s a step" if cell.kind == "pace" else f"{one['steps']} steps, val {record_score(one):.3f}"
        print(f"{cell.name}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, help="a folder; it may hold what an earlier run has finished")
    parser.add_argument("--minutes", type=float, default=6.0, help="CPU time of the training steps of a run")
    parser.add_argument("--grid-minutes", type=float, default=1.5)
    parser.add_argument("--claims", action="store_true", help="also the cells for the Res-UNet's claims, 13 CPU minutes")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="measure a training step in this process, and print it")
    parser.add_argument("--side", type=int, default=128)
    options = parser.parse_args()
    if options.precision:
        print(json.dumps(measure_steps(options.precision, options.side)))
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        run_all(options.data, options.out, options.minutes, options.grid_minutes, options.claims)


if __name__ == "__main__":
    main()
