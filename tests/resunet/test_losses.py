import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from resunet.data.cases import IGNORE
from resunet.losses import (
    SMOOTHING,
    component_dice_loss,
    dice_loss,
    focal_loss,
    region_logits,
    region_truth,
    segmentation_loss,
)


def pair(num_classes: int, *size: int, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits (3, 1 or K, *size) and class indices (3, *size)."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(3, 1 if num_classes == 2 else num_classes, *size, generator=generator)
    return logits, torch.randint(num_classes, (3, *size), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("size", [(9, 7), (5, 4, 6)], ids=["2D", "3D"])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_terms_are_those_of_monai(num_classes, size):
    from monai.losses import DiceFocalLoss, FocalLoss  # here, because MONAI takes seconds to import

    logits, target = pair(num_classes, *size)
    whole = target[:, None].float()
    same = dict(batch=True, smooth_nr=SMOOTHING, smooth_dr=SMOOTHING, gamma=2.0)
    if num_classes == 2:
        theirs = DiceFocalLoss(**same, sigmoid=True, lambda_focal=3)(logits, whole)
        focal = FocalLoss(gamma=2.0)(logits, whole)
    else:
        # its focal term is a sigmoid's whatever is set, so that only its Dice is taken, without the background as ours
        dice = DiceFocalLoss(**same, softmax=True, to_onehot_y=True, include_background=False, lambda_focal=0)
        # the mean over the classes too, of which all but the true one are 0
        focal = num_classes * FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True)(logits, whole)
        theirs = dice(logits, whole) + 3 * focal
    ours = segmentation_loss(logits, target)
    torch.testing.assert_close(ours["focal"], focal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(segmentation_loss(logits, target, focal_weight=3)["loss"], theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["loss"], ours["dice"] + ours["focal"])


def test_the_binary_focal_term_is_that_of_torchvision():
    logits, target = pair(2, 20, 20, spread=8)
    for gamma in (0.0, 1.0, 2.0, 3.5):
        theirs = sigmoid_focal_loss(logits[:, 0], target.float(), alpha=-1, gamma=gamma, reduction="mean")
        torch.testing.assert_close(focal_loss(logits, target, gamma), theirs, rtol=1e-5, atol=1e-6)


def test_the_terms_are_those_of_a_slow_loop():
    for num_classes in (2, 3):
        logits, target = pair(num_classes, 4, 5)
        target[0, 1] = IGNORE
        z = logits.double().numpy()
        overlap, total, focal = np.zeros(num_classes), np.zeros(num_classes), []
        for index in np.ndindex(*target.shape):
            true = int(target[index])
            if true == IGNORE:
                continue
            at = z[index[0], :, index[1], index[2]]
            scores = np.array([0, at[0]]) if num_classes == 2 else at
            p = np.exp(scores) / np.exp(scores).sum()
            focal.append(-((1 - p[true]) ** 2) * math.log(p[true]))
            overlap[true] += p[true]
            total += p
            total[true] += 1
        dice = np.mean((2 * overlap[1:] + SMOOTHING) / (total[1:] + SMOOTHING))
        terms = segmentation_loss(logits, target)
        assert terms["focal"].item() == pytest.approx(np.mean(focal), rel=1e-5)
        assert terms["dice"].item() == pytest.approx(1 - dice, rel=1e-5)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_perfect_prediction_costs_nothing(num_classes):
    _, target = pair(num_classes, 6, 6)
    one_hot = torch.nn.functional.one_hot(target.long(), num_classes).movedim(-1, 1).float()
    logits = one_hot[:, 1:] * 200 - 100 if num_classes == 2 else one_hot * 200
    assert segmentation_loss(logits, target)["loss"].item() == pytest.approx(0, abs=1e-6)
    worst = segmentation_loss(-logits, target)
    assert worst["dice"].item() == pytest.approx(1, abs=1e-3) and worst["focal"] > 50


@pytest.mark.parametrize("num_classes", [2, 4])
def test_an_empty_target_costs_nothing_where_nothing_is_predicted(num_classes):
    target = torch.zeros(2, 8, 8, dtype=torch.uint8)
    logits = torch.full((2, 1 if num_classes == 2 else num_classes, 8, 8), -60.0)
    logits[:, 0] = -60.0 if num_classes == 2 else 60.0
    assert dice_loss(logits, target).item() == pytest.approx(0, abs=1e-6)
    logits[0, -1, 0, 0] = 100.0  # one false pixel of a class
    wanted = 1.0 if num_classes == 2 else 1 / 3
    assert dice_loss(logits, target).item() == pytest.approx(wanted, abs=1e-4)


def test_dice_is_over_the_batch():
    target = torch.zeros(2, 4, 4, dtype=torch.uint8)
    target[0] = 1
    logits = torch.full((2, 1, 4, 4), 50.0)
    assert dice_loss(logits, target).item() == pytest.approx(1 - 2 * 16 / (32 + 16), abs=1e-5)


def test_the_closed_form_of_a_coin_toss():
    target = torch.tensor([[[1, 0, 0, 0]]], dtype=torch.uint8)
    terms = segmentation_loss(torch.zeros(1, 1, 1, 4), target, gamma=2, focal_weight=3, dice_weight=5)
    assert terms["focal"].item() == pytest.approx(math.log(2) / 4)
    assert terms["dice"].item() == pytest.approx(1 - 2 * 0.5 / (2 + 1), abs=1e-5)
    assert terms["loss"].item() == pytest.approx(3 * math.log(2) / 4 + 5 * 2 / 3, abs=1e-4)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_ignored_pixels_change_nothing(num_classes):
    logits, target = pair(num_classes, 6, 8)
    values, gradients = [], []
    for disturbance in (0.0, 5.0):
        given = torch.cat([logits, logits + disturbance], dim=3).requires_grad_()
        padded = torch.cat([target, torch.full_like(target, IGNORE)], dim=2)
        loss = segmentation_loss(given, padded)["loss"]
        loss.backward()
        values.append(loss.item())
        gradients.append(given.grad)
    alone = logits.clone().requires_grad_()
    segmentation_loss(alone, target)["loss"].backward()
    assert values[0] == values[1] == pytest.approx(segmentation_loss(logits, target)["loss"].item(), rel=1e-6)
    for gradient in gradients:
        assert (gradient[..., 8:] == 0).all()
        torch.testing.assert_close(gradient[..., :8], alone.grad)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_batch_ignored_altogether_costs_nothing(num_classes):
    logits, target = pair(num_classes, 5, 5)
    logits.requires_grad_()
    terms = segmentation_loss(logits, torch.full_like(target, IGNORE))
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx(0, abs=1e-6)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_sums_over_a_large_image_do_not_overflow_in_half_precision(num_classes, dtype):
    target = torch.ones(1, 512, 512, dtype=torch.uint8)
    logits = torch.zeros(1, 1 if num_classes == 2 else num_classes, 512, 512, dtype=dtype)  # sums of 131,072 and more
    terms = segmentation_loss(logits, target)
    p = 1 / num_classes
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert terms["focal"].item() == pytest.approx(-((1 - p) ** 2) * math.log(p), rel=1e-5)
    dice = 2 * p / (1 + p) / (num_classes - 1)  # the classes that are predicted but absent have 0
    assert terms["dice"].item() == pytest.approx(1 - dice, rel=1e-5)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_gradient_is_that_of_finite_differences(num_classes):
    logits, target = pair(num_classes, 3, 4, spread=1)
    target[0, 0, 0] = IGNORE
    given = logits.clone().requires_grad_()
    segmentation_loss(given, target)["loss"].backward()
    step = 1e-2  # float32: rounding of about 1e-7 / step and curvature of about step²
    for index in np.ndindex(*logits.shape):
        up, down = logits.clone(), logits.clone()
        up[index] += step
        down[index] -= step
        slope = (segmentation_loss(up, target)["loss"] - segmentation_loss(down, target)["loss"]) / (2 * step)
        assert given.grad[index].item() == pytest.approx(slope.item(), abs=5e-5)


def test_extreme_logits_have_finite_gradients():
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).view(1, 1, 1, 5).repeat(1, 1, 2, 1).requires_grad_()
    target = torch.tensor([[[0] * 5, [1] * 5]], dtype=torch.uint8)
    loss = segmentation_loss(logits, target)["loss"]
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert logits.grad[0, 0, 1, 0] < -0.01  # a sure mistake still pulls


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2])
def test_a_sure_and_right_prediction_has_a_finite_gradient(gamma):
    logits = torch.tensor([10.0, 18.0, 50.0, 200.0]).view(1, 1, 2, 2).requires_grad_()  # p is 1 in float32 from 17 on
    segmentation_loss(logits, torch.ones(1, 2, 2, dtype=torch.uint8), gamma)["loss"].backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_weights_of_classes(num_classes):
    logits, target = pair(num_classes, 9, 7)
    target[0, :3] = IGNORE
    weights = [0.5, 3.0, 1.0, 2.0][:num_classes]
    known = target != IGNORE
    both = torch.cat([-logits, logits], dim=1) / 2 if num_classes == 2 else logits  # a sigmoid is a softmax over ±z/2
    cross_entropy = torch.nn.functional.cross_entropy(
        both, target.long(), torch.tensor(weights), ignore_index=IGNORE, reduction="mean"
    )
    torch.testing.assert_close(focal_loss(logits, target, 0.0, weights), cross_entropy)
    terms = []
    for index in range(1, num_classes):
        truth = target == index
        probability = (logits[:, 0].sigmoid() if num_classes == 2 else logits.softmax(dim=1)[:, index])[known]
        terms.append(2 * (probability * truth[known]).sum() / (probability.sum() + truth.sum()))
    expected = 1 - sum(w * d for w, d in zip(weights[1:], terms, strict=True)) / sum(weights[1:])
    torch.testing.assert_close(dice_loss(logits, target, weights), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dice_loss(logits, target, [1.0] * num_classes), dice_loss(logits, target))


def test_a_term_without_weight_is_not_there():
    logits, target = pair(2, 8, 8)
    assert set(segmentation_loss(logits, target)) == {"loss", "focal", "dice"}
    only = segmentation_loss(logits, target, focal_weight=0, dice_weight=0, component_weight=2)
    assert set(only) == {"loss", "component"}
    torch.testing.assert_close(only["loss"], 2 * component_dice_loss(logits, target))


def slow_component_dice(logits: Tensor, target: Tensor) -> float:
    """Each component of each class of each scan, by itself: everything else of its class is masked out."""
    from scipy import ndimage

    classes = range(1, max(2, logits.shape[1]))
    scores = []
    for scan, truth in zip(logits.double(), target, strict=True):
        for index in classes:
            probability = (scan[0].sigmoid() if len(scan) == 1 else scan.softmax(dim=0)[index]).numpy()
            labels, count = ndimage.label(truth.numpy() == index, np.ones([3] * truth.ndim))
            for number in range(1, count + 1):
                own, kept = labels == number, (labels == 0) | (labels == number)
                kept &= truth.numpy() != IGNORE
                scores.append(2 * probability[own].sum() / (probability[kept].sum() + own.sum()))
    return 1 - float(np.mean(scores))


@pytest.mark.parametrize("size", [(12, 11), (5, 6, 7)], ids=["2D", "3D"])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_every_component_counts_as_much_as_any_other(num_classes, size):
    logits, _ = pair(num_classes, *size)
    sparse = torch.rand(3, *size, generator=torch.Generator().manual_seed(3))
    target = torch.where(sparse < 0.1, 1, torch.where((sparse > 0.95) & (num_classes > 2), 2, 0)).to(torch.uint8)
    target[0, 0] = IGNORE
    assert float(component_dice_loss(logits, target)) == pytest.approx(slow_component_dice(logits, target), rel=1e-4)


def test_a_missed_small_component_costs_as_much_as_a_missed_large_one():
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    target[0, 1:9, 1:9] = 1
    target[0, 13, 13] = 1
    found = torch.where(target == 1, 9.0, -9.0)[:, None]
    without_small, without_large = found.clone(), found.clone()
    without_small[0, 0, 13, 13] = -9
    without_large[0, 0, 1:9, 1:9] = -9
    small, large = component_dice_loss(without_small, target), component_dice_loss(without_large, target)
    assert float(small) == pytest.approx(0.5, abs=0.03) and float(large) == pytest.approx(0.5, abs=0.03)
    assert dice_loss(without_small, target) < 0.02


def test_without_components_there_is_nothing_to_find_and_a_gradient_all_the_same():
    logits = torch.zeros(2, 1, 6, 6, requires_grad=True)
    loss = component_dice_loss(logits, torch.zeros(2, 6, 6, dtype=torch.uint8))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


NESTED = ((1, 2, 3), (2, 3), (3,))
OVERLAPPING = ((1, 3), (2, 3))


def test_a_region_has_the_sum_of_its_classes_probabilities():
    logits, target = pair(4, 9, 7)
    target[0, 0] = IGNORE
    for regions in (NESTED, OVERLAPPING):
        found, truth = region_logits(logits, regions).sigmoid(), region_truth(target, regions)
        for number, members in enumerate(regions):
            torch.testing.assert_close(found[:, number], logits.softmax(dim=1)[:, list(members)].sum(dim=1))
            assert np.array_equal(truth[:, number], np.isin(target, members))


def test_neither_certain_nor_impossible_regions_are_rounded():
    logits = torch.tensor([0.0, 60.0, 60.0, -60.0]).view(1, 4, 1, 1)
    sure, impossible = region_logits(logits, ((1, 2), (3,)))[0, :, 0, 0].tolist()
    assert sure == pytest.approx(60 + math.log(2), rel=1e-6) and impossible == pytest.approx(-120 - math.log(2), rel=1e-6)


def slow_regions(logits: Tensor, target: Tensor, regions, weights, gamma: float) -> tuple[float, float]:
    """Focal and Dice pixel by pixel and region by region, in double precision."""
    p = logits.double().softmax(dim=1).numpy()
    focal, count = 0.0, 0.0
    overlap, sizes = np.zeros(len(regions)), np.zeros(len(regions))
    for index in np.ndindex(*target.shape):
        true = int(target[index])
        if true == IGNORE:
            continue
        for number, members in enumerate(regions):
            inside = true in members
            probability = sum(p[index[0], member, index[1], index[2]] for member in members)
            right = probability if inside else 1 - probability
            focal -= weights[number] * (1 - right) ** gamma * math.log(right)
            count += weights[number]
            overlap[number] += probability * inside
            sizes[number] += probability + inside
    dice = (2 * overlap + SMOOTHING) / (sizes + SMOOTHING)
    return focal / count, 1 - float((dice * weights).sum() / sum(weights))


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.5]])
@pytest.mark.parametrize("regions", [NESTED, (*OVERLAPPING, (1,))], ids=["nested", "overlapping"])
def test_the_terms_of_regions_are_those_of_a_slow_loop(regions, weights):
    logits, target = pair(4, 6, 5)
    target[1, 2:4] = IGNORE
    terms = segmentation_loss(logits, target, 1.5, class_weights=weights, regions=regions)
    focal, dice = slow_regions(logits, target, regions, weights or [1.0] * 3, 1.5)
    assert terms["focal"].item() == pytest.approx(focal, rel=1e-5)
    assert terms["dice"].item() == pytest.approx(dice, rel=1e-5)


def test_one_region_of_everything_is_the_binary_task():
    logits, target = pair(4, 8, 8)
    whole = ((1, 2, 3),)
    binary = logits[:, 1:].logsumexp(dim=1, keepdim=True) - logits[:, :1]
    ours = segmentation_loss(logits, target, component_weight=1, regions=whole)
    theirs = segmentation_loss(binary, (target > 0).to(torch.uint8), component_weight=1)
    for name in ("loss", "focal", "dice", "component"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_with_a_region_for_each_class_dice_is_that_of_the_classes():
    logits, target = pair(4, 12, 9)
    target[2, :3] = IGNORE
    single = ((1,), (2,), (3,))
    weights = [0.7, 3.0, 1.0, 2.0]
    torch.testing.assert_close(dice_loss(logits, target, regions=single), dice_loss(logits, target))
    torch.testing.assert_close(dice_loss(logits, target, weights[1:], regions=single), dice_loss(logits, target, weights))
    torch.testing.assert_close(component_dice_loss(logits, target, regions=single), component_dice_loss(logits, target))


def test_the_components_are_of_regions():
    """Two classes that touch are one object of their region: what is found of it is weighed as a whole."""
    target = torch.zeros(1, 12, 12, dtype=torch.uint8)
    target[0, 2:5, 2:5], target[0, 5:8, 2:5], target[0, 10, 10] = 1, 2, 3
    logits, _ = pair(4, 12, 12)
    p = logits[:1].softmax(dim=1)[0]
    both, right = p[1] + p[2], p[3]
    scores = []
    for probability, own in ((both, (target[0] == 1) | (target[0] == 2)), (right, target[0] == 3)):
        scores.append(2 * probability[own].sum() / (probability.sum() + own.sum()))
    found = component_dice_loss(logits[:1], target, regions=((1, 2), (3,)))
    assert float(found) == pytest.approx(1 - float(sum(scores) / 2), rel=1e-4)
    # an object that lies in two regions is one of each
    twice = component_dice_loss(logits[:1], target, regions=((1, 2), (3,), (3,)))
    assert float(twice) == pytest.approx(1 - float((scores[0] + 2 * scores[1]) / 3), rel=1e-4)


@pytest.mark.parametrize("regions", [NESTED, OVERLAPPING], ids=["nested", "overlapping"])
def test_the_gradient_of_regions_is_that_of_finite_differences_and_ignored_pixels_have_none(regions):
    logits, target = pair(4, 3, 4, spread=1)
    target[0, 0, 0] = IGNORE
    given = logits.clone().requires_grad_()
    segmentation_loss(given, target, component_weight=0.5, regions=regions)["loss"].backward()
    assert not given.grad[0, :, 0, 0].any()
    step = 1e-2
    for index in np.ndindex(*logits.shape):
        up, down = logits.clone(), logits.clone()
        up[index] += step
        down[index] -= step
        high, low = (segmentation_loss(one, target, component_weight=0.5, regions=regions)["loss"] for one in (up, down))
        assert given.grad[index].item() == pytest.approx(((high - low) / (2 * step)).item(), abs=5e-5)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_extreme_logits_of_regions_have_finite_gradients(gamma):
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).view(1, 1, 1, 5).repeat(1, 4, 4, 1)
    logits = (logits * torch.tensor([1.0, -1.0, 0.5, 0.0]).view(1, 4, 1, 1)).requires_grad_()
    target = torch.arange(4, dtype=torch.uint8).view(1, 4, 1).repeat(1, 1, 5)
    loss = segmentation_loss(logits, target, gamma, component_weight=1, regions=OVERLAPPING)["loss"]
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_ranks_with_halves_of_a_batch_agree_with_one_on_regions():
    logits, target = pair(4, 7, 7)
    halves = [(logits[:1], target[:1]), (logits[1:], target[1:])]
    sums: list[list[Tensor]] = [[], []]
    for record, (part, labels) in zip(sums, halves, strict=True):
        segmentation_loss(part, labels, total=lambda values, record=record: record.append(values) or values, regions=NESTED)
    added = iter([a + b for a, b in zip(*sums, strict=True)])
    together = segmentation_loss(*halves[0], total=lambda _: next(added), regions=NESTED)
    torch.testing.assert_close(together["loss"], segmentation_loss(logits, target, regions=NESTED)["loss"])
