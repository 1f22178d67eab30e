"""Dice of the light network beside segmentation_models.pytorch's Unet on its encoder, and torchvision's LR-ASPP, from scratch.

    pip install segmentation-models-pytorch
    python -m benchmarks.light_networks --data DIR --out DIR [--steps 1000] [--seeds 3]

brain_tumor_128, all labels. As `benchmarks.network_comparison`, whose loop, data, augmentation and loss these are, but at equal
steps, which favours the networks whose steps cost more; each in its faster precision. The learning rate of each is chosen by val
among three in short runs. Val, a fixed subset, chooses the checkpoint; test is read once a run. How fast: `benchmarks.light`.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.network_comparison import (
    BRAIN,
    LIGHT,
    RATES,
    Cell,
    Record,
    append_in_a_process,
    measure_pace,
    rate_of,
    read_results,
    recipe_of,
    record_score,
    run_cell,
)
from benchmarks.network_tables import interval, mean_by_group, row
from finetune.evaluation.statistics import figure, paired_difference
from finetune.labelled import read_labelled

OURS = next(iter(LIGHT))


def queue(done: dict[str, Record], seeds: int) -> Iterator[Cell]:
    """All cells in order; a rate is looked up when its cell comes."""
    yield from (Cell("pace", network, BRAIN, 0, RATES[1]) for network in LIGHT)
    for lr in RATES:
        yield from (Cell("grid", network, BRAIN, 0, lr) for network in LIGHT)
    for seed in range(seeds):
        yield from (Cell("run", network, BRAIN, seed, rate_of(done, network)) for network in LIGHT)


def run_all(data: Path, out: Path, steps: int, grid_steps: int, seeds: int) -> None:
    """Every cell that is not in results.jsonl yet, one after another, each in a process of its own."""
    results = out / "results.jsonl"
    recipe = recipe_of(BRAIN, data / BRAIN)
    loaded = read_labelled(recipe, quiet=True)
    for cell in queue(done := read_results(results), seeds):
        if cell.name in done:
            continue
        work: Callable[[], Record] = partial(measure_pace, cell, recipe, loaded)
        if cell.kind != "pace":
            count = grid_steps if cell.kind == "grid" else steps
            pace = done[Cell("pace", cell.network, BRAIN, 0, 0).name]["seconds"]
            work = partial(run_cell, cell, recipe, loaded, count, pace, count)
        append_in_a_process(results, work, cell)
        done.update(read_results(results))
        one = done[cell.name]
        print(f"{cell.name}: " + (f"{one['seconds']:.3f} s" if cell.kind == "pace" else f"{record_score(one):.3f}"), flush=True)


def table(done: dict[str, Record]) -> Iterator[str]:
    """Means over the seeds that every network has; differences paired by group."""
    runs = {network: [r for r in done.values() if r["kind"] == "run" and r["network"] == network] for network in LIGHT}
    seeds = set.intersection(*({one["seed"] for one in its} for its in runs.values()))
    kept = {network: [one for one in its if one["seed"] in seeds] for network, its in runs.items()}
    if not seeds:
        return
    yield row("network", "parameters", "CPU-seconds a step", "lr", "test Dice [95 %]", "by seed", f"less {OURS}")
    yield "|---" * 7 + "|"
    ours = mean_by_group(kept[OURS], "test")
    for network, its in kept.items():
        dice = mean_by_group(its, "test")
        yield row(
            network,
            f"{its[0]['parameters'] / 1e6:.2f} M",
            f"{its[0]['seconds'] / its[0]['steps']:.3f}",
            f"{its[0]['lr']:g}",
            interval(figure({group: [value] for group, value in dice.items()}, (0, 1))),
            ", ".join(f"{sum(one['test'].values()) / len(one['test']):.3f}" for one in its),
            "" if network == OURS else interval(paired_difference(dice, ours), "+"),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="a folder; it may hold what an earlier run has finished")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--grid-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run_all(options.data, options.out, options.steps, options.grid_steps, options.seeds)
    print("\n".join(table(read_results(options.out / "results.jsonl"))))


if __name__ == "__main__":
    main()
