"""Does it matter what is contrasted? Encoders of several objectives beside scratch, 5 % of brain_tumor_128's groups labelled.

    OMP_NUM_THREADS=2 python -m benchmarks.pretraining_arms --data DIR --out DIR [--steps 500] [--batch 64] [--large-batch 256]
        [--cache-chunk 128] [--threshold 0.1] [--norm batch] [--budget 0.05] [--draws 5] [--finetune-steps 250 1000]
        [--finetune-batch 8] [--checkpoint best] [--dense] [--slow-encoder]

Pretrains {plain SimCLR, + same-patient masking, + position positives, cached large batch} with equal numbers of views (the large
batch in fewer steps), and runs one label curve of these arms and scratch: same draws, seeds, augmentation and grid of steps, chosen
on val, test read once. `--dense` adds
`resunet pretrain brain_tumor_dense`, encoder and decoder, fine-tuned with optimizer.encoder_lr_factor=0.33; `--slow-encoder` the
plain encoder with that factor, so that the schedule is not taken for the objective. Prints the tables that LOG.md holds. What is
done is kept: the same command goes on where it was, and two of them share the fine-tunings.

The cached large batch needs group norm and a head without batch norm. With `--norm batch` (the shipped recipe's) it is therefore
measured beside a second scratch arm with group norm; with `--norm group` all arms have group norm and there is one scratch.

Patients are not known in brain_tumor_128: a group is a run of 13 neighbouring slices of the set's numbering. Its position column is
made here, the number of the slice within its run, and is a proxy: runs begin anywhere in a patient's slices, and many hold two
patients. What position positives could do with real volumes this does not show.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.brain_tumor import ensure
from benchmarks.sources import linked_source
from finetune.label_curve.cells import points_of
from finetune.label_curve.command import label_curve
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.result import Curve, read_curve
from finetune.label_curve.statistics import difference
from finetune.label_curve.verdict import signed
from resunet.files import write_text

Values = dict[str, Any]
_GROUP_NORM = ["model.norm=group", "head.batch_norm=false"]
_SLOW = {"optimizer": {"encoder_lr_factor": 0.33}}


def with_positions(data: Path, out: Path) -> Path:
    """A source with the images, masks and split of another, and groups.csv with the number of each slice within its group."""
    linked_source(data, out)
    with open(data / "groups.csv", newline="", encoding="utf-8-sig") as file:
        rows = sorted((row["group"], row["stem"]) for row in csv.DictReader(file))
    lines, before, number = ["stem,group,position"], "", 0
    for group, stem in rows:
        number = number + 1 if group == before else 0
        lines.append(f"{stem},{group},{number}")
        before = group
    write_text(out / "groups.csv", "\n".join(lines) + "\n")
    return out


def pretrained(options: argparse.Namespace, source: Path) -> dict[str, Path]:
    """arm → its pretraining, done."""
    norm = _GROUP_NORM if options.norm == "group" else []
    masked = ["objective.same_group=ignore"]
    arms: dict[str, tuple[str, list[str]]] = {
        "plain": ("brain_tumor", norm),
        "same-patient": ("brain_tumor", norm + masked),
        "positions": ("brain_tumor", [*norm, *masked, f"objective.position_threshold={options.threshold}"]),
    }
    steps = options.steps * options.batch // options.large_batch
    large = [f"batch={options.large_batch}", f"cache_chunk={options.cache_chunk}", f"steps={steps}"]
    arms["large-batch"] = ("brain_tumor", _GROUP_NORM + large)
    if options.dense:
        arms["dense"] = ("brain_tumor_dense", norm)
    shared = [f"data.source={source}", f"steps={options.steps}", f"batch={options.batch}", "wandb.mode=disabled"]
    return {
        name: ensure(options.out / "pretrain" / name, "pretrain", recipe, *(shared + keys))
        for name, (recipe, keys) in arms.items()
    }


def arms_of(options: argparse.Namespace, encoders: dict[str, Path]) -> dict[str, Values]:
    """The arms of the curve: the keys of fine-tuning that make each."""
    group = {"model": {"norm": "group"}}
    arms: dict[str, Values] = {"scratch": group if options.norm == "group" else {}}
    if options.norm == "batch":
        arms["scratch-group"] = group
    arms |= {name: {"encoder": str(run)} | (_SLOW if name == "dense" else {}) for name, run in encoders.items()}
    arms["large-batch"] |= group  # which its encoder has, whatever the others have
    if options.slow_encoder:
        arms["plain-slow"] = {"encoder": str(encoders["plain"])} | _SLOW
    return arms


def curve_of(options: argparse.Namespace, source: Path, encoders: dict[str, Path]) -> LabelCurveRecipe:
    """One label curve of all arms."""
    finetune = {"batch": options.finetune_batch, "checkpoint": options.checkpoint, "wandb": {"mode": "disabled"}}
    if options.checkpoint == "last":
        finetune["validate_every"] = max(options.finetune_steps)  # once, at the end
    values = {
        "out": options.out / "curve",
        "resume": True,
        "recipe": "brain_tumor",
        "finetune": {"data": {"source": str(source)}} | finetune,
        "arms": arms_of(options, encoders),
        "budgets": [options.budget],
        "draws": options.draws,
        "steps": options.finetune_steps,
    }
    return LabelCurveRecipe.model_validate(values)


def own_scratch(arm: str, arms: dict[str, Values]) -> str:
    """The scratch arm of the same kind of norm layer."""
    return "scratch-group" if arm == "large-batch" and "scratch-group" in arms else "scratch"


def of_pretraining(encoders: dict[str, Path]) -> str:
    """What each pretraining ended with."""
    lines = ["| pretraining | steps | CPU-seconds | loss | projection_std | embedding_std |", "|---|---|---|---|---|---|"]
    for name, run in encoders.items():
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        shown = " | ".join(f"{last[key]:.3f}" for key in ("loss", "projection_std", "embedding_std"))
        lines.append(f"| {name} | {last['step']} | {record.get('cpu_seconds', record['seconds']):.0f} | {shown} |")
    return "\n".join(lines)


def of_curve(curve: Curve, record: dict[str, Any]) -> str:
    """Dice of every arm, and its paired difference from scratch with the same norm, and from plain."""
    one = curve.budgets[0]
    lines = [
        f"{one.labels} labelled groups ({one.train} to train on, {one.val} to choose by), {curve.recipe.draws} draws, "
        f"{len(curve.groups)} test groups; intervals over groups and draws.",
        "",
        "| arm | Dice of each draw | mean | 95 % | against its scratch | against plain | steps chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, its in record["dice"].items():
        level = its[0]
        ends = "–" if level["ci95"] is None else f"{level['ci95'][0]:.3f} to {level['ci95'][1]:.3f}"
        each, steps = ", ".join(f"{value:.3f}" for value in level["by_draw"]), ", ".join(map(str, level["steps"]))
        others = [own_scratch(arm, curve.recipe.arms), "plain"]
        against = [_against(curve, arm, other) if not arm.startswith("scratch") else "" for other in others]
        lines.append(f"| {arm} | {each} | {level['mean']:.3f} | {ends} | {against[0]} | {against[1]} | {steps} |")
    return "\n".join(lines)


def _against(curve: Curve, arm: str, other: str) -> str:
    if arm == other:
        return ""
    figure = difference(np.asarray(curve.scores[arm][0] - curve.scores[other][0]))
    ends = figure["ci95"]
    return signed(figure["mean"]) + ("" if ends is None else f" [{signed(ends[0])}, {signed(ends[1])}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="brain_tumor_128")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="of every pretraining but the large batch's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--large-batch", type=int, default=256)
    parser.add_argument("--cache-chunk", type=int, default=128, help="views a forward pass of the large batch")
    parser.add_argument("--threshold", type=float, default=0.1, help="objective.position_threshold; neighbours in a run: 0.083")
    parser.add_argument("--norm", choices=("batch", "group"), default="batch")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the pool's groups, or a number of them")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--finetune-steps", type=int, nargs="+", default=[250, 1000], help="the grid of the curve")
    parser.add_argument("--finetune-batch", type=int, default=8, help="patches a step of every fine-tuning")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of every fine-tuning")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--slow-encoder", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    source = with_positions(options.data, options.out / "source")
    encoders = pretrained(options, source)
    recipe = curve_of(options, source, encoders)
    label_curve(recipe)
    curve = read_curve(recipe, points_of(recipe))
    record = json.loads((recipe.out / "curve.json").read_text(encoding="utf-8"))
    print(f"\n{of_pretraining(encoders)}\n\n{of_curve(curve, record)}")


if __name__ == "__main__":
    main()
