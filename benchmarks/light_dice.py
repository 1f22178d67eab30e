"""Dice of the light network from scratch, pretrained, distilled, and of the full one: `finetune` on two data sets, three seeds.

    python -m benchmarks.light_dice --data DIR --out DIR [--steps 500] [--light-steps 1000] [--arms light pretrained full distilled]

DIR holds brain_tumor_128 and neu_seg. A seed is also the draw of the labelled groups. The teacher of `distilled` is `full` of the
same data, share and seed, and it begins with the pretrained encoder. The light network has more steps than the full one, since a
step of it costs a small part: the table tells what each run cost. The last checkpoint of all arms. Every run is a run directory
below OUT; what is finished there is not done again, so that the same command goes on. `--table` prints what is there.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sources import without_leaks
from resunet.runs import is_done

RECIPES = {"brain_tumor_128": "brain_tumor_light", "neu_seg": "neu_seg_light"}
ARMS = ("light", "pretrained", "full", "distilled")  # a teacher before its pupil
SHARES = {"all": "null", "5 %": "0.05"}
_FULL = ("model={name: resunet}", "optimizer={lr: 1.0e-3}", "precision=bf16")
_SCRATCHES = "scratches"


@dataclass(frozen=True)
class Cell:
    data: str
    share: str
    arm: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / f"{self.data}-{SHARES[self.share]}-{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Settings:
    data: Path
    out: Path
    steps: int  # of the full network
    light_steps: int
    pretrain_steps: int

    def encoder(self, data: str) -> Path:
        return self.out / f"{data}-encoder"

    def source(self, data: str) -> Path:
        return without_leaks(self.data / data, self.out / f"{data}-source")


def run(settings: Settings, cell: Cell) -> None:
    """The fine-tuning of a cell, in a process of its own."""
    steps = settings.steps if cell.arm == "full" else settings.light_steps
    values = [
        f"data.source={settings.source(cell.data)}",
        f"data.labelled={SHARES[cell.share]}",
        f"data.draw={cell.seed}",
        f"seed={cell.seed}",
        f"steps={steps}",
        f"validate_every={steps // 5}",
        "checkpoint=last",
        f"out={cell.folder(settings.out)}",
        "resume=true",
        "wandb.mode=disabled",
    ]
    if cell.arm == "full":
        values += _FULL
    if cell.arm in ("pretrained", "distilled"):
        values.append(f"encoder={settings.encoder(cell.data)}")
    if cell.arm == "distilled":
        teacher = Cell(cell.data, cell.share, "full", cell.seed).folder(settings.out)
        values += [f"teacher={teacher}", "distillation.precision=bf16"]
    subprocess.run([sys.executable, "-P", "-m", "finetune", RECIPES[cell.data], *values], check=True)


def pretrain(settings: Settings, data: str) -> None:
    """The light encoder of a data set, once for all seeds and shares: from the pool without its masks."""
    values = [f"data.source={settings.source(data)}", f"steps={settings.pretrain_steps}", f"out={settings.encoder(data)}"]
    command = [sys.executable, "-P", "-m", "pretrain", "brain_tumor_light", *values, "resume=true", "wandb.mode=disabled"]
    subprocess.run(command, check=True)


def run_all(settings: Settings, cells: Sequence[Cell]) -> None:
    for data in dict.fromkeys(cell.data for cell in cells if cell.arm in ("pretrained", "distilled")):
        if not is_done(settings.encoder(data)):
            pretrain(settings, data)
    for cell in cells:
        if not is_done(cell.folder(settings.out)):
            print(f"{cell.data}, {cell.share} of the labels, {cell.arm}, seed {cell.seed}", flush=True)
            run(settings, cell)


# ---- the table


def summaries(out: Path, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    found = {}
    for cell in cells:
        path = cell.folder(out) / "evaluation" / "summary.json"
        if path.exists():
            found[cell] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(out: Path, found: Mapping[Cell, Mapping[str, Any]], data: str, share: str) -> Iterator[str]:
    """Means over the seeds that an arm has; less the full one's by seed, where both are there."""
    dice = {cell: float(its["dice"]["mean"]) for cell, its in found.items() if cell.data == data and cell.share == share}
    if not dice:
        return
    yield f"\n{data}, {share} of the labels\n"
    yield "| arm | steps | CPU-seconds | val Dice | test Dice, mean of seeds | by seed | of the full one's |"
    yield "|---|---|---|---|---|---|---|"
    for arm in ARMS:
        its = {cell: value for cell, value in dice.items() if cell.arm == arm}
        if not its:
            continue
        ratios = [value / dice[full] for cell, value in its.items() if (full := Cell(data, share, "full", cell.seed)) in dice]
        records = [json.loads((cell.folder(out) / "run.json").read_text(encoding="utf-8")) for cell in its]
        cells = [
            arm,
            f"{records[0]['step']:,}",
            f"{np.mean([one['cpu_seconds'] for one in records]):,.0f}",
            f"{np.mean([one['best_val_dice'] for one in records]):.3f}",
            f"{np.mean(list(its.values())):.3f}",
            ", ".join(f"{value:.3f}" for _, value in sorted(its.items(), key=lambda one: one[0].seed)),
            f"{np.mean(ratios):.1%}" if ratios else "–",
        ]
        yield "| " + " | ".join(cells) + " |"


def scratches(found: Mapping[Cell, Mapping[str, Any]], data: str, share: str) -> Iterator[str]:
    """What a line asks of a class: thin objects found by width, and images without it in which it is seen; means over seeds."""
    classes = {cell: its["classes"].get(_SCRATCHES) for cell, its in found.items() if cell.data == data and cell.share == share}
    known = {cell: its for cell, its in classes.items() if its is not None}
    if not known:
        return
    first = next(iter(known.values()))
    widths = [(index, row) for index, row in enumerate(first["lesions"]["by_width"]) if row["n"]]
    heads = [f"thin, {row['range']} pixels wide ({row['n']})" for _, row in widths]
    clean = first["false_alarms"]["images_without_target"]
    yield f"\n{data}, {share} of the labels: scratches\n"
    yield f"| arm | scratches found | {' | '.join(heads)} | of predicted ones true | alarms per 1,000 of {clean} images without |"
    yield "|" + "---|" * (4 + len(heads))
    for arm in ARMS:
        its = [one for cell, one in known.items() if cell.arm == arm]
        if not its:
            continue
        lesions = [one["lesions"] for one in its]
        columns = [[one["recall"] for one in lesions]]
        columns += [[one["by_width"][index]["recall"] for one in lesions] for index, _ in widths]
        columns += [[one["precision"] for one in lesions]]
        cells = [f"{np.mean([figure['mean'] for figure in column]):.3f}" for column in columns]
        alarms = np.mean([one["false_alarms"]["per_1000"]["mean"] for one in its])
        yield "| " + " | ".join([arm, *cells, f"{alarms:.0f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="a folder; it may hold what an earlier run has finished")
    parser.add_argument("--sets", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--shares", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="of the full network")
    parser.add_argument("--light-steps", type=int, default=1000, help="of the other arms")
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    settings = Settings(options.data, options.out, options.steps, options.light_steps, options.pretrain_steps)
    arms = [arm for arm in ARMS if arm in options.arms]
    cells = [Cell(*one) for one in itertools.product(options.sets, options.shares, arms, options.seeds)]
    if not options.table:
        run_all(settings, cells)
    found = summaries(options.out, cells)
    for data, share in itertools.product(options.sets, options.shares):
        print("\n".join([*table(options.out, found, data, share), *scratches(found, data, share)]))


if __name__ == "__main__":
    main()
