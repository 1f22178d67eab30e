"""Did pretraining help on brain-tumour slices? Both arms, several draws of 5 % of the groups, with the shipped recipes.

    python -m benchmarks.brain_tumor --source DIR --out DIR [--draws 3]

One pretraining on the pool without its masks; then, for every draw, a fine-tuning from the encoder and one from scratch
with equal steps, seed, patches and augmentation, each evaluated once on test. Prints the table that LOG.md holds.
Finished runs are kept, so that an interrupted benchmark goes on where it was.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.comparison.arms import Arm, read_arm
from finetune.evaluation.statistics import paired_difference
from resunet.cli import main as resunet
from resunet.report import shown


def ensure(out: Path, *arguments: str) -> Path:
    """A finished run in `out`: run, continued or already there."""
    record = out / "run.json"
    if not record.exists() or json.loads(record.read_text(encoding="utf-8"))["status"] != "done":
        code = resunet([*arguments, f"out={out}", "resume=true"])
        if code:
            raise SystemExit(code)
    return out


def mean_of_draws(arms: Sequence[Arm]) -> dict[str, float]:
    """group → Dice, the mean over the draws."""
    draws = [arm.group_dice() for arm in arms]
    return {group: float(np.mean([draw[group] for draw in draws])) for group in draws[0]}


def row(draw: str, pretrained: Arm, scratch: Arm) -> str:
    """One line of the table."""
    difference = paired_difference(pretrained.group_dice(), scratch.group_dice())
    return f"| {draw} | {shown(pretrained.summary['dice'])} | {shown(scratch.summary['dice'])} | {shown(difference)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    source = f"data.source={options.source}"
    encoder = ensure(options.out / "pretrain", "pretrain", "brain_tumor", source)
    arms: dict[str, list[Arm]] = {"pretrained": [], "scratch": []}
    for draw in range(options.draws):
        for name, extra in (("pretrained", [f"encoder={encoder}"]), ("scratch", [])):
            arguments = ["finetune", "brain_tumor", source, f"data.draw={draw}", *extra]
            arms[name].append(read_arm(ensure(options.out / f"{name}-{draw}", *arguments), name))
    print("| draw | pretrained, Dice | scratch, Dice | paired difference |\n|---|---|---|---|")
    for draw, (pretrained, scratch) in enumerate(zip(arms["pretrained"], arms["scratch"], strict=True)):
        print(row(str(draw), pretrained, scratch))
    difference = paired_difference(mean_of_draws(arms["pretrained"]), mean_of_draws(arms["scratch"]))
    print(f"| mean of draws, by group | | | {shown(difference)} |")
    seconds: dict[str, Any] = {name: [arm.record["seconds"] for arm in its] for name, its in arms.items()}
    print(f"seconds of fine-tuning: {seconds}")


if __name__ == "__main__":
    main()
