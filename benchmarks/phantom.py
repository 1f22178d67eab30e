"""How hard is the embedded data set? Scratch with all labels, and with the demo's few, on the demo's recipe.

    python -m benchmarks.phantom --out DIR [--steps 600] [--precision bf16]

It should be neither trivial nor hopeless: Dice of 0.7 or more with all labels, and 0.3 to 0.85 of that with the few.
"""

import argparse
import json
from pathlib import Path

from benchmarks.brain_tumor import ensure
from resunet.data.phantom import write_phantom
from resunet.report import shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    source = options.out / "data"
    if not source.exists():
        write_phantom(source)
    dice = {}
    for name, labels in (("few", []), ("all", ["data.labelled=null"])):
        common = [f"data.source={source}", f"steps={options.steps}", f"precision={options.precision}", "wandb.mode=disabled"]
        run = ensure(options.out / name, "finetune", "demo", *common, *labels)
        figure = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))["dice"]
        dice[name] = figure["mean"]
        print(f"{name} labels: Dice {shown(figure)} patients")
    print(f"few / all: {dice['few'] / dice['all']:.2f}")


if __name__ == "__main__":
    main()
