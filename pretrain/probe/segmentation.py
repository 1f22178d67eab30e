"""Segmentation by frozen features alone: every pixel by its nearest labelled pixels, or class mean, in other scans."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from resunet.data.cases import IGNORE

_LABELLED = 512  # pixels of a class in a fold, at most
_AT_ONCE = 8192  # pixels compared with the labelled ones at a time


@dataclass(frozen=True)
class LabelledPixels:
    """Pixels whose labels are known. labels: (P,) class indices or IGNORE. fold: (P,), which are left out together."""

    labels: NDArray[np.uint8]
    fold: NDArray[np.int64]
    num_classes: int

    def told_apart(self) -> list[int]:
        """Foreground classes that occur in two folds at least: others have nothing to be recognised by."""
        return [c for c in range(1, self.num_classes) if len(np.unique(self.fold[self.labels == c])) > 1]

    def training(self, left_out: int) -> NDArray[np.int64]:
        """Pixels of the other folds: of every class in every fold the same number, or all where there are fewer."""
        chosen = []
        for fold in np.unique(self.fold[self.fold != left_out]):
            for number in range(self.num_classes):
                its = np.flatnonzero((self.fold == fold) & (self.labels == number))
                rng = np.random.default_rng([int(fold), number])  # the same pixels whichever fold is left out
                chosen.append(rng.permutation(its)[:_LABELLED])
        return np.sort(np.concatenate(chosen))


def leave_one_out(features: Tensor, pixels: LabelledPixels, neighbours: int | None) -> NDArray[np.uint8]:
    """The class index of every pixel (P,), of each fold by the labels of the others.

    Args:
        features: (P, F) of length 1.
        neighbours: how many vote; None: the nearest class mean (cosine).
    """
    predicted = np.zeros(len(pixels.labels), np.uint8)
    for fold in np.unique(pixels.fold):
        rows = torch.from_numpy(pixels.training(int(fold))).to(features.device)
        labels = torch.from_numpy(pixels.labels[rows.cpu().numpy()].astype(np.int64)).to(features.device)
        one_hot = F.one_hot(labels, pixels.num_classes).float()
        asked = np.flatnonzero(pixels.fold == fold)
        for part in np.array_split(asked, -(-len(asked) // _AT_ONCE)):
            its = features[torch.from_numpy(part).to(features.device)]
            if neighbours is None:
                scores = its @ _prototypes(features[rows], one_hot)
            else:
                scores = _votes(its @ features[rows].T, one_hot, neighbours)
            predicted[part] = scores.argmax(dim=1).cpu().numpy()
    return predicted


def _prototypes(features: Tensor, one_hot: Tensor) -> Tensor:
    """(F, classes): the mean features of every class, of length 1; zeros for a class that is not there."""
    return F.normalize(features.T @ one_hot, dim=0)


def _votes(similarity: Tensor, one_hot: Tensor, neighbours: int) -> Tensor:
    """(P, classes): how many of the most similar labelled pixels are of each class; of equals the most similar decide."""
    best, places = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
    return (one_hot[places] * (1 + 1e-4 * best[..., None])).sum(dim=1)


def dice_by_class(labels: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: list[int]) -> list[float]:
    """Dice of each class over all pixels together; what the truth ignores is left out. Every class is in the truth."""
    counted = labels != IGNORE
    dice = []
    for number in classes:
        true, guess = (labels == number) & counted, (predicted == number) & counted
        dice.append(2 * float((true & guess).sum()) / float(true.sum() + guess.sum()))
    return dice
