"""How many labels does pretraining save on three data sets? Dense contrast beside scratch, in cells of about a minute.

    OMP_NUM_THREADS=1 python -m benchmarks.curves --data DIR --out DIR [--sets brain_tumor_128 neu_seg dsb2018]
        [--pretrain-steps 600] [--steps 60 200] [--batch 4] [--table]

For every set: `resunet pretrain brain_tumor_dense` on the images of its pool, then one label curve of `resunet finetune
brain_tumor` (half width, patches of 128²) from scratch and from encoder and decoder, the encoder at a third of the learning rate;
the grid of steps is for both arms, the last checkpoint of a cell is taken, val chooses from the grid, test is read once a point. A
cell ends long before its network stops improving: what is said is of this budget. What is done is kept: the same command goes on
where it was, and several of them share the fine-tunings once a set is pretrained. Prints the table that LOG.md holds; the figures
are OUT/SET-curve/curve.png and .svg.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.brain_tumor import ensure
from benchmarks.sources import without_leaks
from finetune.label_curve.cells import points_of
from finetune.label_curve.command import label_curve
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.verdict import needed, signed, verdicts

Values = dict[str, Any]
# of every set: its classes, the shares of groups that are labelled, the draws
SETS: dict[str, tuple[Values, list[Any], int]] = {
    "brain_tumor_128": ({}, [0.02, 0.05, 0.1, 0.25, "all"], 5),
    "neu_seg": ({"classes": {0: "background", 1: "inclusion", 2: "patches", 3: "scratches"}}, [0.05, 0.25, "all"], 3),
    "dsb2018": ({"classes": {0: "background", 255: "nucleus"}}, [0.05, 0.25, "all"], 3),
}


def source_of(options: argparse.Namespace, name: str) -> Path:
    return without_leaks(options.data / name, options.out / f"{name}-source")


def pretrained(options: argparse.Namespace, name: str) -> Path:
    keys = [f"data.source={source_of(options, name)}", f"steps={options.pretrain_steps}", "wandb.mode=disabled"]
    return ensure(options.out / f"{name}-pretrain", "pretrain", "brain_tumor_dense", *keys)


def curve_of(options: argparse.Namespace, name: str, encoder: Path) -> LabelCurveRecipe:
    data, budgets, draws = SETS[name]
    finetune = {
        "data": {"source": str(source_of(options, name))} | data,
        "batch": options.batch,
        "checkpoint": "last",
        "validate_every": max(options.steps),  # once, at the end
        "wandb": {"mode": "disabled"},
    }
    values = {
        "out": options.out / f"{name}-curve",
        "resume": True,
        "recipe": "brain_tumor",
        "finetune": finetune,
        "arms": {"scratch": {}, "pretrained": {"encoder": str(encoder), "optimizer": {"encoder_lr_factor": 0.33}}},
        "budgets": budgets,
        "draws": draws,
        "steps": options.steps,
    }
    return LabelCurveRecipe.model_validate(values)


def table(name: str, recipe: LabelCurveRecipe) -> Iterator[str]:
    record = json.loads((recipe.out / "curve.json").read_text(encoding="utf-8"))
    yield f"\n{name}: {record['draws']} draws, {record['test_groups']} test groups\n"
    yield "| labelled groups | scratch | pretrained | paired [95 %] | Holm's p | scratch needs | steps chosen |"
    yield "|---|---|---|---|---|---|---|"
    dice, saved = record["dice"], record["labels_saved"]["pretrained"]
    for scratch, other, paired, row in zip(
        dice["scratch"], dice["pretrained"], record["differences"]["pretrained"], saved, strict=True
    ):
        ends = "" if paired["ci95"] is None else f" [{signed(paired['ci95'][0])}, {signed(paired['ci95'][1])}]"
        chosen = " / ".join(", ".join(map(str, level["steps"])) for level in (scratch, other))
        p = "–" if paired["p_holm"] is None else f"{paired['p_holm']:.3g}"
        cells = [str(paired["labels"]), f"{scratch['mean']:.3f}", f"{other['mean']:.3f}", signed(paired["mean"]) + ends, p]
        yield "| " + " | ".join([*cells, needed(row), chosen]) + " |"
    yield "\n" + "\n".join(verdicts(record))
    seconds = [cell.record["cpu_seconds"] for point in points_of(recipe) for cell in point.cells]
    costs = {arm: (cost["finetuning_hours"], cost["pretraining_hours"]) for arm, cost in record["cost"].items()}
    hours = "; ".join(
        f"{arm} {tuned:.2f} of fine-tuning, {before:.2f} of pretraining" for arm, (tuned, before) in costs.items()
    )
    yield f"\n{len(seconds)} cells, the longest {max(seconds):.0f} CPU-seconds; hours: {hours}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 200], help="the grid of every curve")
    parser.add_argument("--batch", type=int, default=4, help="patches a step of every fine-tuning")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.data, options.out = options.data.resolve(), options.out.resolve()
    for name in options.sets:
        recipe = curve_of(options, name, options.out / f"{name}-pretrain")
        if not options.table:
            pretrained(options, name)
            label_curve(recipe)
        print("\n".join(table(name, recipe)), flush=True)


if __name__ == "__main__":
    main()
