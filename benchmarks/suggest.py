"""Are suggested groups worth more labels than random ones? Dice on test, several draws, at two budgets.

    python -m benchmarks.suggest --data DIR --out DIR [--draws 5] [--budgets 5 11] [--steps 300] [--pretrain-steps 500]

One pretraining on the pool of a source that has splits; its embeddings; then for every budget and draw a fine-tuning on as many
groups drawn at random, and on those that k-centre (from a random start) and typicality (with clusters of that seed) choose, all
with the encoder, and the same val groups, seed, steps and augmentation. Test is read once a run. Prints the table that LOG.md
holds, with how far the pool lies from what was chosen. Finished runs are kept, so that an interrupted benchmark goes on where it
was.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.brain_tumor import ensure, mean_of_draws
from finetune.comparison.arms import Arm, read_arm
from finetune.evaluation.statistics import paired_difference
from resunet.config import DataSettings
from resunet.data.source import Source, draw_labelled, open_source
from resunet.embedding.coverage import cover, nested_order
from resunet.embedding.embed import EmbedRequest, embed
from resunet.embedding.groups import Groups, groups_of
from resunet.embedding.table import read_embeddings
from resunet.files import write_text
from resunet.report import shown

METHODS = ("random", "kcenter", "typicality")


def choices(source: Source, groups: Groups, method: str, budget: int, draw: int) -> list[str]:
    """HMACs of the pool's groups that a draw chooses."""
    if method == "random":
        return sorted({case.group_hmac for case in draw_labelled(source, budget, draw).part("pool")})
    order = nested_order("kcenter" if method == "kcenter" else "typicality", groups.points, draw)
    return [groups.names[number] for number in order[:budget]]


def write_draw(path: Path, source: Source, chosen: list[str], budget: int, draw: int) -> None:
    """A split whose pool is what was chosen, and whose val is that of the random draw of this number."""
    stems = {
        "pool": sorted(case.stem for case in source.part("pool") if case.group_hmac in set(chosen)),
        "val": sorted(case.stem for case in draw_labelled(source, budget, draw).part("val")),
        "test": sorted(case.stem for case in source.part("test")),
    }
    write_text(path, json.dumps(stems) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--budgets", type=int, nargs=2, default=[5, 11], help="groups to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = f"data.source={options.data}"
    encoder = ensure(options.out / "pretrain", "pretrain", "brain_tumor", data, f"steps={options.pretrain_steps}")
    table = options.out / "embeddings.parquet"
    if not table.exists():
        embed(encoder, table, EmbedRequest(source=options.data, precision="bf16"))
    groups = groups_of(read_embeddings(table), labelled=set())  # of the pool: val and test are left out
    source = open_source(DataSettings(source=options.data), masks=True)
    for budget in options.budgets:
        arms: dict[str, list[Arm]] = {method: [] for method in METHODS}
        distance: dict[str, list[float]] = {method: [] for method in METHODS}
        for draw in range(options.draws):
            for method in METHODS:
                chosen = choices(source, groups, method, budget, draw)
                distance[method].append(cover(groups.points, [groups.names.index(group) for group in chosen]).mean)
                name = f"{method}-{budget}-{draw}"
                splits = options.out / f"{name}.json"
                write_draw(splits, source, chosen, budget, draw)
                keys = [data, f"data.splits={splits}", "data.labelled=null", f"steps={options.steps}", f"seed={draw}"]
                run = ensure(options.out / name, "finetune", "brain_tumor", *keys, f"encoder={encoder}")
                arms[method].append(read_arm(run, name))
        print(f"\n{budget} groups of {len(groups.names)}, {options.draws} draws\n")
        print("| drawn by | Dice of each draw | mean | against random, paired by group | mean distance of the pool |")
        print("|---|---|---|---|---|")
        for method, its in arms.items():
            dice = [arm.summary["dice"]["mean"] for arm in its]
            difference = shown(paired_difference(mean_of_draws(its), mean_of_draws(arms["random"])))
            each = ", ".join(f"{one:.3f}" for one in dice)
            against = "" if method == "random" else difference
            print(f"| {method} | {each} | {np.mean(dice):.3f} | {against} | {np.mean(distance[method]):.3f} |")


if __name__ == "__main__":
    main()
