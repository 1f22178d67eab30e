"""Learning from unlabelled scans without a second model: the network's own moving average teaches it (the mean teacher).

The average sees patches of unlabelled scans as they are, the network the same patches with other intensities and, in some, a box
pasted from another of them, and is to say the same of every pixel. Tarvainen & Valpola 2017, arXiv 1703.01780, section 2, for the
average and the ramp; that only the student's view is hard is FixMatch's (Sohn et al. 2020, arXiv 2001.07685, section 2), here with
the average's probabilities as they are. The boxes are CutMix (French et al. 2020, arXiv 1906.01916, section 3), which that paper
found to matter more in segmentation than the intensities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.distillation.losses import relative_difference, soft_target_loss
from finetune.settings import ConsistencySettings
from finetune.training.patches import UNLABELLED
from resunet.draws import Draws
from resunet.intensity import change_intensity
from resunet.layout import channels_last
from resunet.model import Segmenter
from resunet.training import step_generator, sum_over_ranks

_STREAMS = (6, 7)  # name the random streams of the intensities and of the boxes
_NARROWEST = 0.3  # of a box, side to side; as UniMatch's (Yang et al. 2023, arXiv 2208.09910)


@dataclass(frozen=True)
class HardView:
    """What the network sees of a batch, and what of it the average is asked about.

    images: (N, C, *size), with other intensities and boxes. partner: (N,) int64, whose pixels are in the box. box: (N, *size) bool.
    inside: (N, *size) bool, pixels of unlabelled scans, with the boxes.
    """

    images: Tensor
    partner: Tensor
    box: Tensor
    inside: Tensor

    def mixed(self, values: Tensor) -> Tensor:
        """(N, K, *size) of the patches as they are → of the patches with their boxes."""
        return torch.where(self.box[:, None], values[self.partner], values)


@dataclass(frozen=True)
class MeanTeacher:
    """The moving average of the network that is trained. seed, steps: the run's."""

    average: Segmenter
    settings: ConsistencySettings
    seed: int
    steps: int

    def weight(self, step: int) -> float:
        """Of the loss: exp(−5 (1 − t)²) of what is set, t rising from 0 to 1 over the ramp."""
        ramp = self.settings.ramp * self.steps
        done = min(1.0, step / ramp) if ramp else 1.0
        return self.settings.weight * math.exp(-5 * (1 - done) ** 2)

    def hard_view(self, images: Tensor, labels: Tensor, index: int, first: int) -> HardView:
        """The patches of unlabelled scans with their intensities changed and their boxes pasted, the others as they are.

        A box comes from the other of a pair: the first and second unlabelled patch of this rank, the third and fourth, and so on;
        one without a partner has none. So an even number of them on every rank makes the views that one rank makes.

        Args:
            images: (N, C, *size). labels: (N, *size). index: of the batch. first: the place of the first patch in the batch of all
                ranks, so that a patch's random numbers are its own.
        """
        seen, inside = images.clone(), labels == UNLABELLED
        partner, box = torch.arange(len(images), device=images.device), torch.zeros_like(inside)
        places = unlabelled_patches(labels).nonzero().flatten().tolist()
        for place in places:
            one = slice(place, place + 1)
            generators = (step_generator(images.device, self.seed, stream, index, first + place) for stream in _STREAMS)
            intensities, boxes = (Draws(generator, range(1), 1) for generator in generators)
            seen[one] = change_intensity(images[one], self.settings, intensities)
            box[place] = _box(images.shape[2:], self.settings, boxes)
        for left, right in zip(places[::2], places[1::2], strict=False):
            partner[left], partner[right] = right, left
        view = HardView(seen, partner, box, inside)
        return HardView(channels_last(view.mixed(seen)), partner, box, view.mixed(inside[:, None])[:, 0])

    def terms(self, images: Tensor, logits: Tensor, view: HardView, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """consistency, weighted; of the unlabelled pixels of the batch of all ranks, a float32 scalar.

        Args:
            images: (N, C, *size), of which `view` was made. logits: what the network made of the view.
        """
        before = self.average.training
        self.average.eval()
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = view.mixed(self.average(images))
        self.average.train(before)
        total = partial(sum_over_ranks, accelerator=accelerator)
        loss = soft_target_loss(logits, teacher_logits, view.inside, total=total)
        if self.settings.dice_weight:
            loss = loss + self.settings.dice_weight * relative_difference(logits, teacher_logits, view.inside, total)
        return {"consistency": self.weight(step) * loss}


def _box(size: Sequence[int], settings: ConsistencySettings, draws: Draws) -> Tensor:
    """Where pixels of the partner stand: (*size) bool, a box of a share of the patch, or nothing."""
    axes = len(size)
    area, chosen = draws.uniform(settings.cutmix_area, 1), draws.uniform((0, 1), 1) < settings.cutmix
    stretch = draws.uniform((math.log(_NARROWEST) / 2, -math.log(_NARROWEST) / 2), axes)
    whole = torch.tensor(size, device=draws.device)
    side = (whole * area ** (1 / axes) * (stretch - stretch.mean()).exp()).round().clamp_min(1).minimum(whole)
    start = ((whole - side + 1) * draws.uniform((0, 1), axes)).floor()
    inside = chosen[0, 0].expand(*size)
    for axis, n in enumerate(size):
        at = torch.arange(n, device=draws.device)
        within = (at >= start[0, axis]) & (at < start[0, axis] + side[0, axis])
        inside = inside & within.view([-1 if other == axis else 1 for other in range(axes)])
    return inside


def unlabelled_patches(labels: Tensor) -> Tensor:
    """(N, *size) → (N,) bool."""
    return (labels == UNLABELLED).flatten(1).any(dim=1)
