import numpy as np
import pytest
import torch

from pretrain.probe.segmentation import LabelledPixels, dice_by_class, leave_one_out
from resunet.data.cases import IGNORE


@pytest.fixture
def pixels() -> tuple[torch.Tensor, LabelledPixels]:
    """Noisy features of three classes in three folds."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90).astype(np.uint8)
    features = np.eye(4)[labels] + rng.normal(0, 0.6, (90, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels[::17] = IGNORE
    return torch.from_numpy(features).float(), LabelledPixels(labels, np.repeat(np.arange(3), 30), 3)


def naive(features: np.ndarray, pixels: LabelledPixels, neighbours: int | None) -> list[int]:
    found = []
    for i in range(len(features)):
        rows = [j for j in range(len(features)) if pixels.fold[j] != pixels.fold[i] and pixels.labels[j] != IGNORE]
        if neighbours is None:
            means = [np.mean([features[j] for j in rows if pixels.labels[j] == c], axis=0) for c in range(3)]
            found.append(int(np.argmax([features[i] @ mean / np.linalg.norm(mean) for mean in means])))
        else:
            nearest = sorted(rows, key=lambda j: -features[i] @ features[j])[:neighbours]
            votes = [sum(1 + 1e-4 * features[i] @ features[j] for j in nearest if pixels.labels[j] == c) for c in range(3)]
            found.append(int(np.argmax(votes)))
    return found


@pytest.mark.parametrize("neighbours", [None, 1, 5])
def test_it_is_the_naive_classifier_of_other_folds(pixels, neighbours):
    features, known = pixels
    assert leave_one_out(features, known, neighbours).tolist() == naive(features.double().numpy(), known, neighbours)


def test_more_neighbours_than_there_are_is_all_of_them(pixels):
    features, known = pixels
    assert (leave_one_out(features, known, 1000) == leave_one_out(features, known, 60)).all()


def test_labelled_pixels_are_balanced_and_of_other_folds():
    labels = np.zeros(6000, np.uint8)
    labels[:100] = labels[3000:3100] = 1
    known = LabelledPixels(labels, np.repeat([0, 1, 2], 2000), 2)
    rows = known.training(1)
    assert set(known.fold[rows]) == {0, 2} and len(rows) == len(set(rows.tolist()))
    assert [int((labels[rows[known.fold[rows] == fold]] == 1).sum()) for fold in (0, 2)] == [100, 0]
    assert [int((labels[rows[known.fold[rows] == fold]] == 0).sum()) for fold in (0, 2)] == [512, 512]
    assert (known.training(1) == rows).all()
    assert set(rows[known.fold[rows] == 0]) == set((r := known.training(2))[known.fold[r] == 0])


def test_only_classes_that_two_folds_show_are_told_apart():
    labels = np.array([1, 2, IGNORE, 1, 3, 3], np.uint8)
    assert LabelledPixels(labels, np.array([0, 0, 0, 1, 1, 1]), 4).told_apart() == [1]


def test_dice_leaves_out_what_the_truth_ignores():
    truth = np.array([0, 1, 1, 2, IGNORE, 2], np.uint8)
    guess = np.array([1, 1, 0, 2, 1, 1], np.uint8)
    assert dice_by_class(truth, guess, [1, 2]) == pytest.approx([2 * 1 / (2 + 3), 2 * 1 / (2 + 1)])
