"""The tables of `benchmarks.network_comparison`, in Markdown, from whatever cells are there: `--out DIR` as there."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.network_comparison import (
    BRAIN,
    NETWORKS,
    OURS,
    PATCH,
    PLAIN,
    RATES,
    Cell,
    Record,
    read_results,
    record_score,
)
from finetune.evaluation.statistics import figure, paired_difference

TRAILING = 10  # steps that a training loss is averaged over
HEADING = (
    "| network | parameters | lr | s a step | steps | Dice at equal time | less Res-UNet | by seed "
    "| Dice at equal steps | less Res-UNet |"
)


def interval(found: Record, sign: str = "") -> str:
    """A figure with its interval, if it has one."""
    ends = found.get("ci95")
    return f"{found['mean']:{sign}.3f}" + (f" [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]" if ends else "")


def mean_by_group(records: Sequence[Record], key: str) -> dict[str, float]:
    """group → Dice, the mean over seeds."""
    return {group: float(np.mean([record[key][group] for record in records])) for group in records[0][key]}


def dice_cells(records: Sequence[Record], ours: Sequence[Record], key: str) -> list[str]:
    """Dice with its interval; and what it is more than the Res-UNet's, paired by group."""
    if not all(key in record for record in records):
        return ["–", "–"]
    dice = mean_by_group(records, key)
    cells = [interval(figure({group: [value] for group, value in dice.items()}, (0, 1)))]
    if not ours or ours[0]["network"] == records[0]["network"]:
        return [*cells, ""]
    return [*cells, interval(paired_difference(dice, mean_by_group(ours, key)), "+")]


def dice_table(done: dict[str, Record], data: str) -> Iterator[str]:
    """Of the seeds that every network has."""
    runs = [record for record in done.values() if record["kind"] == "run" and record["data"] == data and "test" in record]
    by_network = {n: [r for r in runs if r["network"] == n] for n in NETWORKS}
    present = {network: its for network, its in by_network.items() if its}
    if not present:
        return
    seeds = sorted(set.intersection(*({r["seed"] for r in its} for its in present.values())))
    first = next(iter(present.values()))[0]
    groups, marks = len(first["test"]), [r["marked"] for r in next(iter(present.values())) if r["seed"] in seeds]
    yield f"\n{data}: seeds {seeds}, {groups} groups of test, val {first['val_cases']} cases; equal steps: {marks}\n"
    yield HEADING
    yield "|---|---|---|---|---|---|---|---|---|---|"
    ours = [r for r in by_network[OURS] if r["seed"] in seeds]
    for network, its in present.items():
        records = [r for r in its if r["seed"] in seeds]
        yield row(
            network,
            f"{records[0]['parameters'] / 1e6:.1f} M",
            f"{records[0]['lr']:g}",
            f"{records[0]['seconds'] / records[0]['steps']:.2f}",
            f"{np.mean([r['steps'] for r in records]):.0f}",
            *dice_cells(records, ours, "test"),
            ", ".join(f"{np.mean(list(r['test'].values())):.3f}" for r in records),
            *dice_cells(records, ours, "test_marked"),
        )


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def grid_table(done: dict[str, Record]) -> Iterator[str]:
    yield row("network, Dice on val", *(f"lr {lr:g}" for lr in RATES))
    yield "|---" * (1 + len(RATES)) + "|"
    for network in NETWORKS:
        cells = [done.get(Cell("grid", network, BRAIN, 0, lr).name) for lr in RATES]
        yield row(network, *("" if cell is None else f"{record_score(cell):.3f} ({cell['steps']} steps)" for cell in cells))


def trailing(record: Record) -> list[float]:
    """The training loss after each step, the mean over the last TRAILING (fewer at the start)."""
    losses = record["losses"]
    return [float(np.mean(losses[max(0, i + 1 - TRAILING) : i + 1])) for i in range(len(losses))]


def loss_table(done: dict[str, Record]) -> Iterator[str]:
    """How soon each run has the training loss that the U-Net of its data and seed has at the end; same batches at equal steps."""
    yield row(
        "run", "loss at the end", "steps to the U-Net's end", "CPU s", "mean loss over the U-Net's steps", "over equal time"
    )
    yield "|---|---|---|---|---|---|"
    for cell in (record for record in done.values() if record["kind"] in ("run", "steps")):
        plain = done[Cell("run", PLAIN, cell["data"], cell["seed"], 0).name]
        losses, target = trailing(cell), trailing(plain)[-1]
        reached = next((i for i, loss in enumerate(losses) if i + 1 >= TRAILING and loss <= target), None)
        steps = f"{reached + 1} ({1 - (reached + 1) / plain['steps']:+.0%} saved)" if reached is not None else "not reached"
        took = (
            f"{(seconds := (reached + 1) * cell['seconds'] / cell['steps']):.0f} ({1 - seconds / plain['seconds']:+.0%})"
            if reached is not None
            else ""
        )
        area, over_time = np.mean(cell["losses"][: plain["steps"]]), np.mean(cell["losses"])
        yield row(
            cell["cell"], f"{losses[-1]:.3f}", steps, took, f"{area:.3f}", f"{over_time:.3f}" if cell["kind"] == "run" else ""
        )


def parameter_table(done: dict[str, Record]) -> Iterator[str]:
    """Dice for each million parameters; Dice at an equal number; and equal steps with the whole of the cosine."""
    yield row(
        "brain_tumor_128, seed 0", "parameters", "Dice", "less Res-UNet at equal time", "Dice / million parameters", "steps"
    )
    yield "|---|---|---|---|---|---|"
    ours = done.get(Cell("run", OURS, BRAIN, 0, 0).name)
    for record in done.values():
        if record["kind"] in ("run", "steps") and record["data"] == BRAIN and record["seed"] == 0 and "test" in record:
            dice = float(np.mean(list(record["test"].values())))
            million = record["parameters"] / 1e6
            cells = dice_cells([record], [ours] if ours and record is not ours else [], "test")
            yield row(record["cell"], f"{million:.2f} M", *cells, f"{dice / million:.4f}", record["steps"])


def precision_table(done: dict[str, Record]) -> Iterator[str]:
    yield row("Res-UNet, batch 8", "peak MiB", "above the process", "CPU s a step")
    yield "|---|---|---|---|"
    for record in (record for record in done.values() if record["kind"] == "precision"):
        above = record["peak"] - record["before"]
        yield row(
            f"{record['precision']} {record['side']}²", f"{record['peak']:.0f}", f"{above:.0f}", f"{record['seconds']:.2f}"
        )


def report(done: dict[str, Record]) -> Iterator[str]:
    yield from grid_table(done)
    for data in PATCH:
        yield from dice_table(done, data)
    for table in (parameter_table, loss_table, precision_table):
        yield ""
        yield from table(done)
    yield ""
    for key in ("seconds", "val_seconds", "test_seconds", "cpu"):
        total = sum(record.get(key, 0) for record in done.values() if record["kind"] != "precision")
        yield f"CPU minutes, {key}: {total / 60:.1f}  "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    print("\n".join(report(read_results(parser.parse_args().out / "results.jsonl"))))


if __name__ == "__main__":
    main()
