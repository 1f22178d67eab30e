"""Does the pretraining probe rank checkpoints as fine-tuning does?

    OMP_NUM_THREADS=2 python -m benchmarks.probe_ranking --data DIR --out DIR [--steps 200] [--finetune-steps 250] [--draw 0]

Three pretrainings on brain_tumor_128 (temperature 0.2, temperature 0.5, decoupled loss), half width, the checkpoints of steps 0 and
5 more kept: 18. The probe looks at each, by neighbours and by class means, for each of `--probe-draws` draws of its three groups;
each is fine-tuned with one recipe on one labelled draw, and its Dice on val (the best of the run) and on test noted. Printed:
Kendall's τ (b) of either probe, of alignment, uniformity, RankMe and of the contrastive step itself against val and test Dice, over
all checkpoints, within runs (the mean of the runs' τ), and over trained checkpoints only, with 95 % intervals by bootstrap over
checkpoints. results.jsonl holds a line a checkpoint; what is there is not done again, what was begun is continued.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau

from finetune.loop import finetune
from finetune.recipe import FinetuneRecipe
from pretrain.archive import read_archive
from pretrain.loop import pretrain
from pretrain.network import build_network
from pretrain.probe.embeddings import describe_embeddings
from pretrain.probe.probe import evaluating, segment
from pretrain.probe.sample import sample_views
from pretrain.probe.scans import read_probe_scans
from pretrain.probe.settings import ProbeSettings
from pretrain.recipe import PretrainRecipe
from pretrain.save import encoder_of_checkpoint, save_encoder
from resunet.checkpoint import model_folder
from resunet.encoder import ResidualEncoder
from resunet.progress import say

CLASSES = {0: "background", 255: "tumour"}
WIDTH = [16, 32, 64, 128, 256]
RUNS: dict[str, dict[str, Any]] = {
    "temperature-0.2": {"seed": 0},
    "temperature-0.5": {"seed": 1, "temperature": 0.5},
    "decoupled": {"seed": 2, "objective": {"loss": "decoupled"}},
}
KEPT = 5  # checkpoints of a run beside step 0
REPETITIONS = 1000

Row = dict[str, Any]


def pretraining(name: str, options: argparse.Namespace) -> PretrainRecipe:
    """A run's recipe. Its checkpoints are at even distances, the last at the end."""
    shared = {
        "out": options.out / "pretrain" / name,
        "resume": True,
        "steps": options.steps,
        "precision": "bf16",
        "batch": options.batch,
        "checkpoint_every": max(1, options.steps // KEPT),
        "keep_checkpoints": KEPT + 1,
        "data": {"source": options.data, "salt_file": options.out / "salt", "store": options.out / "store"},
        "model": {"channels": WIDTH},
        "views": {"size": 64},
        "wandb": {"mode": "disabled"},
    }
    return PretrainRecipe.model_validate(shared | RUNS[name])


def encoders_of(name: str, options: argparse.Namespace) -> dict[int, Path]:
    """step → a model directory, of step 0 and of every checkpoint of a run that is done."""
    recipe = pretraining(name, options)
    pretrain(recipe)
    found = {0: _untrained(recipe)}
    for checkpoint in sorted((recipe.out / "checkpoints").glob("step-*")):
        step = int(checkpoint.name.removeprefix("step-"))
        folder = options.out / "encoders" / name / str(step)
        found[step] = folder if folder.exists() else encoder_of_checkpoint(recipe.out, step, folder)
    return found


def _untrained(recipe: PretrainRecipe) -> Path:
    """The encoder before the first step, as `pretrain` makes it from the seed."""
    other = recipe.model_copy(update={"out": recipe.out.parents[1] / "encoders" / recipe.out.name / "0"})
    if not (other.out / "model").exists():
        accelerator = Accelerator()
        torch.manual_seed(recipe.seed)
        save_encoder(other, build_network(recipe, accelerator).encoder, read_archive(recipe, accelerator))
    return other.out


def probe_figures(encoder: Path, recipe: PretrainRecipe, views: Sequence[torch.Tensor], draws: int) -> Row:
    """What the probe says of an encoder: Dice by neighbours and by class means of every draw, and what needs no labels."""
    network = ResidualEncoder.from_pretrained(model_folder(encoder))
    figures: Row = {"knn": [], "prototype": []}
    with evaluating(network), torch.autocast("cpu", torch.bfloat16):
        for draw in range(draws):
            for kind in ("knn", "prototype"):
                settings = ProbeSettings(classes=CLASSES, draw=draw, kind=kind)
                scans = read_probe_scans(recipe, settings, 2)
                figures[kind].append(segment(network, scans, settings, torch.device("cpu")).dice)
        pairs = [network.embed(chunk).float().chunk(2) for chunk in views]
    return figures | describe_embeddings(*(torch.cat([pair[view] for pair in pairs]) for view in range(2)))


def fine_tuned(encoder: Path, out: Path, options: argparse.Namespace) -> Row:
    """val and test Dice of one fine-tuning; every encoder gets the same."""
    recipe = FinetuneRecipe.model_validate(
        {
            "out": out,
            "resume": True,
            "steps": options.finetune_steps,
            "precision": "bf16",
            "batch": 8,
            "patch": [128, 128],
            "encoder": encoder,
            "validate_every": max(1, options.finetune_steps // 5),
            "data": {
                "source": options.data,
                "salt_file": options.out / "salt",
                "classes": CLASSES,
                "labelled": options.labelled,
                "draw": options.draw,
            },
            "model": {"channels": WIDTH},
            "wandb": {"mode": "disabled"},
        }
    )
    finetune(recipe)
    record, summary = (json.loads((out / name).read_text(encoding="utf-8")) for name in ("run.json", "evaluation/summary.json"))
    return {"val": record["best_val_dice"], "test": summary["dice"]["mean"]}


def measure(options: argparse.Namespace) -> list[Row]:
    """A row a checkpoint, from results.jsonl where it is there."""
    path = options.out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    done = {(row["run"], row["step"]) for row in rows}
    shared, accelerator = pretraining(next(iter(RUNS)), options), Accelerator()
    views = sample_views(shared, read_archive(shared, accelerator), accelerator)  # the same for all
    for name in RUNS:
        for step, encoder in encoders_of(name, options).items():
            if (name, step) in done:
                continue
            say(f"{name}, step {step}")
            row = {"run": name, "step": step} | probe_figures(encoder, shared, views, options.probe_draws)
            row |= fine_tuned(encoder, options.out / "finetune" / f"{name}-{step}", options)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    return rows


def figures_of(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """What might rank checkpoints, larger is better: (N,) each."""
    found = {
        f"{kind}, draw {draw}": [row[kind][draw] for row in rows]
        for kind in ("knn", "prototype")
        for draw in range(draws_of(rows))
    }
    found |= {f"{kind}, mean of draws": [float(np.mean(row[kind])) for row in rows] for kind in ("knn", "prototype")}
    found |= {
        "−alignment": [-row["probe_alignment"] for row in rows],
        "−uniformity": [-row["probe_uniformity"] for row in rows],
    }
    found |= {"RankMe": [row["probe_rankme"] for row in rows], "step": [row["step"] for row in rows]}
    return {name: np.array(values, float) for name, values in found.items()}


def draws_of(rows: Sequence[Row]) -> int:
    return len(rows[0]["knn"])


def tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's τ-b; NaN where either is constant."""
    return float(kendalltau(x, y).statistic)


def interval(count: int, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """95 %, by bootstrap over checkpoints; resamples without a τ are left out."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(count, size=count)) for _ in range(REPETITIONS)]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def within(x: np.ndarray, y: np.ndarray, runs: np.ndarray) -> float:
    """The mean of the runs' own τ."""
    found = [tau(x[runs == run], y[runs == run]) for run in np.unique(runs) if (runs == run).sum() > 1]
    return float(np.mean([one for one in found if not np.isnan(one)] or [np.nan]))


def table(rows: Sequence[Row]) -> str:
    """τ with its interval, of every figure against val and test Dice."""
    runs, steps = np.array([row["run"] for row in rows]), np.array([row["step"] for row in rows])
    lines = ["| figure | against | all | within runs | without step 0 |", "|---|---|---|---|---|"]
    for name, x in figures_of(rows).items():
        for against in ("val", "test"):
            y = np.array([row[against] for row in rows], float)
            later = np.flatnonzero(steps > 0)
            cells = [
                (len(x), lambda at, x=x, y=y: tau(x[at], y[at])),
                (len(x), lambda at, x=x, y=y: within(x[at], y[at], runs[at])),
                (len(later), lambda at, x=x[later], y=y[later]: tau(x[at], y[at])),
            ]
            shown = []
            for count, statistic in cells:
                low, high = interval(count, statistic)
                shown.append(f"{statistic(np.arange(count)):.2f} [{low:.2f}, {high:.2f}]")
            lines.append(f"| {name} | {against} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200, help="of each pretraining, a multiple of 5")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--finetune-steps", type=int, default=250)
    parser.add_argument("--labelled", type=float, default=0.05)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--probe-draws", type=int, default=2)
    options = parser.parse_args()
    options.data, options.out = options.data.resolve(), options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "salt").exists():
        (options.out / "salt").write_text("00" * 32, encoding="utf-8")
    rows = measure(options)
    print(
        "| run | step | kNN | prototype | alignment | uniformity | RankMe | val | test |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        own = [
            np.mean(row["knn"]),
            np.mean(row["prototype"]),
            row["probe_alignment"],
            row["probe_uniformity"],
            row["probe_rankme"],
        ]
        print(
            f"| {row['run']} | {row['step']} | "
            + " | ".join(f"{value:.3f}" for value in (*own, row["val"], row["test"]))
            + " |"
        )
    print(table(rows))


if __name__ == "__main__":
    main()
