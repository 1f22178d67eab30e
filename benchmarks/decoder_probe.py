"""How much of a segmentation is in a pretrained decoder already? One linear layer on its frozen features.

    python -m benchmarks.decoder_probe --data DIR [--labelled 6] [--draws 6] NAME=RUN…

RUN is a pretraining run whose decoder goes down to full resolution (`synthetic`), or `random`. For every draw of labelled groups of
brain_tumor_128 a linear layer is trained on the features of all their pixels (focal + Dice), and segments all of val; test is not
read. Dice is the mean over the groups of val. A minute a run: quick enough to compare objectives, whose fine-tuned Dice moves by
0.05 with the draw; what it ranks highest still has to be fine-tuned.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.labelled import choose_cases
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import model_folder, read_config
from resunet.config import PercentileZScore, load_recipe
from resunet.data.cases import Case, load_cases
from resunet.layout import channels_last
from resunet.losses import segmentation_loss
from resunet.model import ResUNet
from resunet.transfer import transfer_encoder

_STEPS, _RATE, _CHUNK, _PIXELS = 120, 0.1, 16, 200_000


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

    def chosen(self, groups: set[str]) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(np.isin(self.groups, sorted(groups)))
        return self.images[rows], self.labels[rows]


def network_of(run: str) -> ResUNet:
    torch.manual_seed(0)
    if run == "random":
        return ResUNet(channels=(16, 32, 64, 128, 256)).eval()
    folder = model_folder(Path(run))
    network = ResUNet(channels=read_config(folder).architecture.channels)  # type: ignore[union-attr]
    receipt = transfer_encoder(folder, network, parts="both")
    fresh = [one.name for one in receipt.tensors if one.state == "fresh" and not one.name.startswith("head.")]
    if fresh:
        raise SystemExit(f"{run}: its decoder does not go down to full resolution; {len(fresh)} tensors would be random")
    return network.eval()


@torch.no_grad()
def features_of(network: ResUNet, images: Tensor) -> Tensor:
    """(N, C, y, x) of the decoder, in bf16 arithmetic."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [network.decoder(network.encoder(channels_last(part))).float() for part in images.split(_CHUNK)]
    return torch.cat(parts)


def fit(features: Tensor, labels: Tensor) -> torch.nn.Conv2d:
    """A linear layer on standardised features, from as many of the pixels as `_PIXELS`."""
    columns = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(0))[:_PIXELS]
    features = features.movedim(1, 0).flatten(1)[None, :, None, columns]
    labels = labels.flatten()[None, None, columns]
    layer = torch.nn.Conv2d(features.shape[1], 1, 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, -3.0)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(layer.parameters(), lr=_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        segmentation_loss(layer(features), labels)["loss"].backward()
        optimizer.step()
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--labelled", type=int, default=6)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    options = parser.parse_args()

    def recipe_of(draw: int) -> FinetuneRecipe:
        keys = [f"data.source={options.data}", f"data.labelled={options.labelled}", f"data.draw={draw}"]
        return load_recipe(FinetuneRecipe, "finetune", "brain_tumor", keys)

    recipes = [recipe_of(draw) for draw in range(options.draws)]
    source = choose_cases(recipes[0])[0]
    pool, val = (Slices(source.part(part), recipes[0]) for part in ("pool", "val"))
    drawn = [{case.group_name for case in choose_cases(recipe)[1]} for recipe in recipes]
    print("| decoder | Dice of each draw on val | mean |\n|---|---|---|")
    for name, run in (one.split("=", 1) for one in options.runs):
        network = network_of(run)
        judged, found = features_of(network, val.images), []
        for groups in drawn:
            images, labels = pool.chosen(groups)
            features = features_of(network, images)
            mean, deviation = (one(features, (0, 2, 3), keepdim=True) for one in (torch.mean, torch.std))
            layer = fit((features - mean) / (deviation + 1e-3), labels)
            with torch.no_grad():
                segmented = layer((judged - mean) / (deviation + 1e-3))[:, 0] > 0
            found.append(np.mean(list(val.group_dice(segmented).values())))
        print(f"| {name} | {', '.join(f'{value:.3f}' for value in found)} | {np.mean(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
