"""Best on val, or last? One training, both of its checkpoints, on the groups of the pool that its draw did not label.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint_choice --data DIR --out DIR [--encoder RUN] [--steps 1000] [--draws 0 1 2 3 4]
        [--batch 8]

brain_tumor_128, 5 % of the groups; `resunet finetune brain_tumor` from scratch and, with `--encoder`, from that encoder (at a third
of the learning rate). Test is not read. Val looks every 50 steps at as many groups as are trained on; the best checkpoint is what
it liked most, the last that at the end of the schedule. Dice is the mean over groups, the difference paired over groups and
of this draw only. Finished trainings are kept: the same command goes on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.brain_tumor import ensure
from benchmarks.pool_ruler import Slices, against, dice_of
from finetune.labelled import choose_cases
from finetune.recipe import FinetuneRecipe
from resunet.model import ResUNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="brain_tumor_128")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    arms = {"scratch": []} if options.encoder is None else {"scratch": [], "pretrained": transferred(options.encoder)}
    slices = None
    print("| draw | arm | last | best, of step | best less last |\n|---|---|---|---|---|")
    for draw in options.draws:
        for arm, keys in arms.items():
            shared = [f"data.source={options.data.resolve()}", f"data.draw={draw}", f"seed={draw}", f"steps={options.steps}"]
            shared += [f"batch={options.batch}", "checkpoint=last", "evaluate_test=false", "wandb.mode=disabled"]
            run = ensure(options.out.resolve() / f"{arm}-{draw}", "finetune", "brain_tumor", *shared, *keys)
            recipe = FinetuneRecipe.model_validate_json((run / "config.json").read_text(encoding="utf-8"))
            source, train, _, _ = choose_cases(recipe)
            slices = slices or Slices(source.part("pool"), recipe)
            labelled = {case.group_name for case in train}
            found, step = {}, 0
            for name in ("last", "best"):
                state = torch.load(run / "checkpoints" / name / "state.pt", weights_only=True, map_location="cpu")
                network = ResUNet.from_pretrained(run / "model")
                network.load_state_dict(state["network"])
                dice = dice_of(network.eval(), slices)
                found[name], step = {group: value for group, value in dice.items() if group not in labelled}, state["step"]
            last, best = (float(np.mean(list(found[name].values()))) for name in ("last", "best"))
            print(f"| {draw} | {arm} | {last:.3f} | {best:.3f}, {step} | {against(found['best'], found['last'])} |", flush=True)


def transferred(encoder: Path) -> list[str]:
    return [f"encoder={encoder.resolve()}", "optimizer.encoder_lr_factor=0.33"]


if __name__ == "__main__":
    main()
