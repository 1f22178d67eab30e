"""The cells of a label curve on the groups of the pool that a draw did not label, and on all of val: a ruler to tune by.

    python -m benchmarks.pool_ruler --curve DIR [--draws 0 1] [--arms scratch] [--runs RUN …]

Test is to be read once, and val has few groups, of a draw even fewer; but a benchmark's pool is labelled throughout. Of
brain_tumor_128 at 5 % that is 107 groups, so that two arms on the same draw are told apart to ±0.03. Dice is the mean over groups;
the paired difference from the baseline has a t interval over groups, of this draw only. RUN is a finished fine-tuning outside the
curve, on the same source, compared with the baseline's cell of its draw and steps (`evaluate_test=false` leaves test unread). What
was pretrained on the pool has seen these images, without their masks, which no test image is.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from finetune.label_curve.cells import points_of
from finetune.label_curve.recipe import LabelCurveRecipe
from finetune.label_curve.verdict import signed
from finetune.labelled import choose_cases
from finetune.recipe import FinetuneRecipe
from resunet.config import PercentileZScore
from resunet.data.cases import Case, load_cases
from resunet.layout import channels_last
from resunet.model import ResUNet

_CHUNK = 32


class Slices:
    """Images (N, 1, y, x), masks (N, y, x) and groups of some cases, in memory."""

    def __init__(self, cases: Sequence[Case], recipe: FinetuneRecipe) -> None:
        loaded = load_cases(cases, recipe.data.channels, PercentileZScore(), recipe.data.classes)
        self.images = torch.stack([torch.from_numpy(one.image_slice(0)) for one in loaded])
        self.labels = torch.stack([torch.from_numpy(one.label_slice(0)) for one in loaded])
        self.groups = np.array([one.case.group_name for one in loaded])

    def dice(self, found: Tensor) -> NDArray[np.float64]:
        """Of every slice of masks (N, y, x); NaN without a target."""
        true = self.labels == 1
        overlap, sizes = (found & true).flatten(1).sum(1), found.flatten(1).sum(1) + true.flatten(1).sum(1)
        return np.where(true.flatten(1).any(1).numpy(), (2 * overlap / sizes.clamp_min(1)).double().numpy(), np.nan)

    def group_dice(self, found: Tensor) -> dict[str, float]:
        """group → the mean over its slices with a target."""
        each = self.dice(found)
        target = ~np.isnan(each)
        return {str(group): float(each[target & (self.groups == group)].mean()) for group in np.unique(self.groups[target])}


@torch.no_grad()
def dice_of(network: ResUNet, slices: Slices) -> dict[str, float]:
    """group → the mean over its slices with a target, in bf16 arithmetic; of binary segmentation, in evaluation mode."""
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([network(channels_last(part))[:, 0] > 0 for part in slices.images.split(_CHUNK)])
    return slices.group_dice(found)


def against(values: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    difference = np.array([values[group] - baseline[group] for group in baseline])
    low, high = stats.t.interval(0.95, len(difference) - 1, difference.mean(), max(stats.sem(difference), np.finfo(float).tiny))
    return f"{signed(float(difference.mean()))} [{signed(float(low))}, {signed(float(high))}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path, required=True)
    parser.add_argument("--draws", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", help="of the curve, the baseline among them; all if left out")
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    recipe = LabelCurveRecipe.model_validate_json((options.curve / "config.json").read_text(encoding="utf-8"))
    points = points_of(recipe.model_copy(update={"out": options.curve, "resume": True}))
    judged = [
        (point.arm, cell.folder, cell.recipe)
        for point in sorted(points, key=lambda point: (point.labelled, point.draw, point.arm != recipe.baseline))
        if point.draw in options.draws and (options.arms is None or point.arm in options.arms)
        for cell in point.cells
        if cell.done
    ]
    for run in options.runs:
        its = FinetuneRecipe.model_validate_json((run / "config.json").read_text(encoding="utf-8"))
        judged.append((run.name, run, its))
    source = choose_cases(judged[0][2])[0]
    parts = {part: Slices(source.part(part), judged[0][2]) for part in ("pool", "val")}
    print("| groups, draw, steps | arm | unlabelled pool | less baseline | val | less baseline |\n|---|---|---|---|---|---|")
    baselines: dict[tuple[int, int, int, str], dict[str, float]] = {}
    for arm, folder, one in judged:
        labelled = {case.group_name for case in choose_cases(one)[1]}
        where = (len(labelled), one.data.draw, one.steps)
        row = f"| {where[0]}, {where[1]}, {where[2]} | {arm} |"
        network = ResUNet.from_pretrained(folder / "model").eval()
        for part, slices in parts.items():
            dice = {group: value for group, value in dice_of(network, slices).items() if group not in labelled}
            if arm == recipe.baseline:
                baselines[*where, part] = dice
            compared = arm != recipe.baseline and (*where, part) in baselines
            row += f" {np.mean(list(dice.values())):.3f} ({len(dice)}) |"
            row += f" {against(dice, baselines[*where, part])} |" if compared else " |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
