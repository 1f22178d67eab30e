"""What pruning and INT8 cost: full networks on brain slices and steel, pruned, quantised and both; three seeds, test read once.

    pip install 'resunet[export]'
    python -m benchmarks.compress --data DIR --out DIR [--seeds 3] [--steps 3000] [--sets brain_tumor_128 neu_seg]

DIR holds brain_tumor_128 and neu_seg. For every set, network and seed: one fine-tuning on all labels, then two compressions of it
by the shipped recipe: to 40 % of parameters and multiply-adds and what is left to INT8 by quantisation-aware training; and to INT8
without pruning. The light network is only quantised. Each has the gate on val. Prints the table that LOG.md holds; finished runs
are kept, so that an interrupted benchmark goes on where it was.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sources import without_leaks
from resunet.cli import main as resunet

SETS = {
    "brain_tumor_128": ["data.classes={0: background, 255: tumour}"],
    "neu_seg": ["data.classes={0: background, 1: inclusion, 2: patches, 3: scratches}"],
}
NETWORKS = {
    "Res-UNet": ["model.channels=[32, 64, 128, 256, 512]"],
    "light": ["model.name=mobile_resunet", "model.channels=null", "precision=fp32"],  # bf16 is slower for depthwise layers
}
ARMS = {"pruned": ["quantise={method: qat}"], "unpruned": ["prune=null", "quantise={method: qat}"]}
_HEADER = ["set", "network", "seed", "what", "parameters", "multiply-adds", "MB", "val Dice", "test Dice"]
_HEADER += ["of the run's", "recall of the smallest"]


def ensure(out: Path, finished: str, *arguments: str) -> bool:
    """Run a command, or continue it, unless its last file is there; whether it succeeded. A refusal by the gate is a result."""
    if (out / finished).exists() and (finished != "run.json" or json.loads((out / finished).read_text())["status"] == "done"):
        return True
    code = resunet([*arguments, f"out={out}", "resume=true"])
    if code not in (0, 1):
        raise SystemExit(code)
    return code == 0 or (out / finished).exists()


def rows(name: str, network: str, seed: int, arm: str, record: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each network that test was read for; or one that says that the gate let nothing pass."""
    start = [name, network, str(seed)]
    if record["test"] is None:
        yield [*start, f"{arm}: refused", *[""] * 7]
        return
    accepted = next((step for step in record["steps"] if step["name"] == record["accepted"]), None)
    networks = record["test"]["networks"]
    before = networks["before"]["dice"]["mean"]
    for end, its in networks.items():
        if end == "before" and arm != "unpruned":
            continue  # once is enough
        if end == "after" and accepted is None:
            continue  # nothing was pruned
        size = record["start"] if end == "before" or accepted is None else accepted
        quantised = end == "int8"
        judged = {"before": record["start"], "after": accepted, "int8": record["quantised"]}[end]
        recall = its["recall"]
        yield [
            *start,
            {"before": "the run", "after": "pruned", "int8": "pruned, INT8" if accepted else "INT8"}[end],
            f"{size['parameters'] / 1e6:.2f} M ({size['parameters'] / record['start']['parameters']:.0%})",
            f"{size['macs'] / 1e9:.2f} G ({size['macs'] / record['start']['macs']:.0%})",
            f"{(record['quantised']['bytes'] if quantised else 4 * size['parameters']) / 1e6:.1f}",
            f"{judged['dice']['mean']:.4f}",
            f"{its['dice']['mean']:.4f}",
            f"{its['dice']['mean'] / before:.1%}",
            "" if recall is None else f"{recall['mean']:.3f} ({its['size']} pixels, {recall['n']} groups)",
        ]


def means(lines: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Over seeds, of the share of the run's test Dice."""
    for name, network, what in dict.fromkeys((line[0], line[1], line[3]) for line in lines):
        shares = [float(one[9].rstrip("%")) for one in lines if (one[0], one[1], one[3]) == (name, network, what) and one[9]]
        if shares:
            told = f"{np.mean(shares):.1f}% ({min(shares):.1f} to {max(shares):.1f})"
            yield [name, network, f"{len(shares)} seeds", what, "", "", "", "", "", told, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="of the fine-tuning; after each bite a quarter")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    lines = []
    for seed in range(options.seeds):
        for name in options.sets:
            source = without_leaks(options.data / name, options.out / f"{name}-source")
            for network in options.networks:
                run = options.out / f"{name}-{network}-{seed}"
                shape = [*SETS[name], *NETWORKS[network], f"steps={options.steps}", f"validate_every={options.steps // 10}"]
                common = [f"data.source={source}", "data.labelled=null", f"seed={seed}", "wandb.mode=disabled"]
                ensure(run, "run.json", "finetune", "brain_tumor", *common, *shape)
                for arm, extra in ARMS.items():
                    if network == "light" and arm == "pruned":
                        continue
                    out = run.with_name(f"{run.name}-{arm}")
                    trained = [] if arm == "unpruned" else [f"prune.steps={options.steps // 4}"]
                    given = [f"seed={seed}", "wandb.mode=disabled", *extra, *trained]
                    ensure(out, "compress.json", "compress", str(run), *given)
                    record = json.loads((out / "compress.json").read_text(encoding="utf-8"))
                    lines += list(rows(name, network, seed, arm, record))
    for line in (_HEADER, ["---"] * len(_HEADER), *lines, *means(lines)):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
