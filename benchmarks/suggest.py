"""Are suggested groups worth more labels than random ones? Dice on test, several draws, at two budgets.

    python -m benchmarks.suggest --data DIR --out DIR [--draws 5] [--budgets 5 11] [--steps 300] [--pretrain-steps 500]

One pretraining on the pool of a source that has splits, and one label curve: in every draw groups to train on are drawn at random,
by k-centre (from a random start) and by typicality (with clusters of that seed) in the encoder's embedding of the pool, and all
arms have the encoder, the same val groups, seed, steps and augmentation. Test is read once a cell. Prints the tables that LOG.md
holds, with how far the pool lies from what was chosen. What is done is kept: the same command goes on where it was, and several of
them share the cells.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.brain_tumor import ensure
from finetune.drawing import pool_groups
from finetune.label_curve.cells import points_of
from finetune.label_curve.command import label_curve
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.verdict import signed
from finetune.labelled import choose_cases
from resunet.embedding.coverage import cover

METHODS = ("random", "kcenter", "typicality")
Distances = dict[tuple[str, int], list[float]]


def curve_of(options: argparse.Namespace, encoder: Path) -> LabelCurveRecipe:
    """A curve of which an arm is a way to draw."""
    arms: dict[str, dict[str, Any]] = {method: {"encoder": str(encoder)} for method in METHODS}
    for method in METHODS[1:]:
        arms[method]["data"] = {"draw_by": method, "draw_encoder": str(encoder)}
    values = {
        "out": options.out / "curve",
        "resume": True,
        "recipe": "brain_tumor",
        "finetune": {"data": {"source": str(options.data)}, "wandb": {"mode": "disabled"}},
        "arms": arms,
        "baseline": "random",
        "budgets": options.budgets,
        "draws": options.draws,
        "steps": [options.steps],
    }
    return LabelCurveRecipe.model_validate(values)


def distances(recipe: LabelCurveRecipe, encoder: Path) -> Distances:
    """(way to draw, groups) → of each draw, how far the pool's groups lie from the nearest chosen one on average."""
    found: Distances = {}
    groups = None
    for point in points_of(recipe):
        source, train, _, _ = choose_cases(point.cells[0].recipe)
        groups = groups or pool_groups(encoder, source)
        chosen = {case.group_hmac for case in train}
        where = [number for number, name in enumerate(groups.names) if name in chosen]
        found.setdefault((point.arm, point.labelled), []).append(cover(groups.points, where).mean)
    return found


def table(record: dict[str, Any], index: int, distance: Distances) -> str:
    """One budget: Dice of every way to draw, and the paired difference from random draws."""
    one = record["labels"][index]
    lines = [
        f"{one['train']} groups to train on and {one['val']} to choose by, {record['draws']} draws, "
        f"{record['test_groups']} test groups",
        "",
        "| drawn by | Dice of each draw | mean | against random, by group and draw | p, Holm | mean distance of the pool |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        dice = record["dice"][method][index]
        each, against, p = ", ".join(f"{value:.3f}" for value in dice["by_draw"]), "", ""
        if method != "random":
            figure = record["differences"][method][index]
            ends = figure["ci95"]
            against = signed(figure["mean"]) + ("" if ends is None else f" [{signed(ends[0])}, {signed(ends[1])}]")
            p = "–" if figure["p_holm"] is None else f"{figure['p_holm']:.3f}"
        lines.append(
            f"| {method} | {each} | {dice['mean']:.3f} | {against} | {p} | {np.mean(distance[method, one['train']]):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs=2, default=[5, 11], help="groups to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    options = parser.parse_args()
    options.out = options.out.resolve()
    keys = (f"data.source={options.data}", f"steps={options.pretrain_steps}", "wandb.mode=disabled")
    encoder = ensure(options.out / "pretrain", "pretrain", "brain_tumor", *keys)
    recipe = curve_of(options, encoder)
    label_curve(recipe)
    record = json.loads((recipe.out / "curve.json").read_text(encoding="utf-8"))
    distance = distances(recipe, encoder)
    for index in range(len(record["labels"])):
        print(f"\n{table(record, index, distance)}")


if __name__ == "__main__":
    main()
