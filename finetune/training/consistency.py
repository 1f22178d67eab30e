"""Learning from unlabelled scans without a second model: the network's own moving average teaches it (the mean teacher).

The average sees a patch of an unlabelled scan as it is, the network the same patch with other intensities, and is to say the same
of every pixel. Tarvainen & Valpola 2017, arXiv 1703.01780, section 2, for the average and the ramp; that only the student's view is
hard is FixMatch's (Sohn et al. 2020, arXiv 2001.07685, section 2), here with the average's probabilities as they are.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.distillation.losses import soft_target_loss
from finetune.settings import ConsistencySettings
from finetune.training.patches import UNLABELLED
from resunet.draws import Draws
from resunet.intensity import change_intensity
from resunet.layout import channels_last
from resunet.model import Segmenter
from resunet.training import step_generator, sum_over_ranks

_STREAM = 6  # names the random stream of the changes


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

    def strong_augmentation(self, images: Tensor, labels: Tensor, index: int, first: int) -> Tensor:
        """The patches of unlabelled scans with their intensities changed, the others as they are.

        Args:
            images: (N, C, *size). labels: (N, *size). index: of the batch. first: the place of the first patch in the batch of all
                ranks, so that a patch's random numbers are its own.
        """
        seen = images.clone()
        for place in unlabelled_patches(labels).nonzero().flatten().tolist():
            generator = step_generator(images.device, self.seed, _STREAM, index, first + place)
            one = slice(place, place + 1)
            seen[one] = change_intensity(images[one], self.settings, Draws(generator, range(1), 1))
        return channels_last(seen)

    def terms(self, images: Tensor, logits: Tensor, labels: Tensor, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """consistency, weighted; of the unlabelled pixels of the batch of all ranks, a float32 scalar.

        Args:
            images: (N, C, *size), as they were before `strong_augmentation`. logits: what the network made of them afterwards.
        """
        before = self.average.training
        self.average.eval()
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = self.average(images)
        self.average.train(before)
        loss = soft_target_loss(
            logits, teacher_logits, labels == UNLABELLED, total=partial(sum_over_ranks, accelerator=accelerator)
        )
        return {"consistency": self.weight(step) * loss}


def unlabelled_patches(labels: Tensor) -> Tensor:
    """(N, *size) → (N,) bool."""
    return (labels == UNLABELLED).flatten(1).any(dim=1)
