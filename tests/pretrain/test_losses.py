import math

import pytest
import torch
from lightly.loss import NTXentLoss

from pretrain.losses import Items, ScanAwareNTXent
from pretrain.objective import build_loss, contrast, loss_state, restore_loss
from pretrain.recipe import ObjectiveSettings

UNKNOWN = math.nan


def projections(count: int, seed: int = 0, width: int = 6) -> torch.Tensor:
    """(2N, D), first views and then second."""
    return torch.randn(2 * count, width, generator=torch.Generator().manual_seed(seed))


def items(group: list[int], position: list[float] | None = None, axis: list[int] | None = None) -> Items:
    count = len(group)
    return Items(
        torch.tensor(group),
        torch.tensor([0] * count if axis is None else axis),
        torch.tensor([UNKNOWN] * count if position is None else position),
    )


def naive(projection: torch.Tensor, its: Items, temperature: float, ignore: bool, threshold: float | None) -> float:
    """Pair by pair, in float64."""
    z = [row / row.norm() for row in projection.double()]
    count = len(its.group)
    total = 0.0
    for i in range(2 * count):
        positives, others = [], []
        for j in range(2 * count):
            if i == j:
                continue
            a, b = i % count, j % count
            same = int(its.group[a]) == int(its.group[b])
            apart = abs(float(its.position[a]) - float(its.position[b]))
            near = threshold is not None and not same and apart < threshold and int(its.axis[a]) == int(its.axis[b])
            score = float(z[i] @ z[j]) / temperature
            if a == b or near:
                positives.append(score)
            elif ignore and same:
                continue
            others.append(score)
        log_sum = math.log(sum(math.exp(score) for score in others))
        total += sum(log_sum - score for score in positives) / len(positives)
    return total / (2 * count)


@pytest.mark.parametrize("ignore, threshold", [(False, None), (True, None), (True, 0.15), (False, 0.15)])
def test_it_is_the_sum_over_pairs(ignore, threshold):
    its = items([0, 1, 0, 2, 1, 3], [0.1, 0.2, 0.15, 0.4, UNKNOWN, 0.12], [0, 0, 0, 0, 0, 1])
    projection = projections(6)
    terms = ScanAwareNTXent(0.3, ignore, threshold)(*projection.chunk(2), its)
    assert terms["loss"].item() == pytest.approx(naive(projection, its, 0.3, ignore, threshold), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("count", [2, 9])
def test_of_unique_groups_without_positions_it_is_lightlys(count, temperature):
    """Value and gradient; also where a threshold is set but no position is known."""
    its, gradients, losses = items(list(range(count))), [], []
    aware = ScanAwareNTXent(temperature, ignore_group=True, threshold=0.3)
    for loss_of in (NTXentLoss(temperature=temperature), lambda one, other: aware(one, other, its)["loss"]):
        projection = projections(count, seed=count).requires_grad_()
        losses.append(loss_of(*projection.chunk(2)))
        losses[-1].backward()
        gradients.append(projection.grad)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-5)


def test_pairs_that_are_left_out_do_not_move():
    """With one other group, the neighbours of a scan get no gradient from it."""
    its = items([0, 0, 1])
    projection = projections(3).requires_grad_()
    first, second = projection.chunk(2)
    aware = ScanAwareNTXent(0.2, ignore_group=True, threshold=None)
    _, left_out = aware._roles(its, its)
    assert left_out[0].tolist() == [True, True, False, False, True, False]
    assert left_out[2].tolist() == [False, False, True, False, False, False]
    terms = aware(first, second, its)
    assert terms["positives"].item() == 1
    assert terms["chance"].item() == pytest.approx((4 * math.log(3) + 2 * math.log(5)) / 6)


def test_what_is_near_in_another_patient_attracts():
    its = items([0, 1, 1, 2], [0.5, 0.52, 0.51, 0.9])
    positives, left_out = ScanAwareNTXent(0.2, ignore_group=True, threshold=0.1)._roles(its, its)
    # of the first scan: its other view, and both views of the two slices of the other patient
    assert positives[0].tolist() == [False, True, True, False, True, True, True, False]
    # of the second: the third is of its own patient, so neither
    assert positives[1].tolist() == [True, False, False, False, True, True, False, False]
    assert left_out[1].tolist() == [False, True, True, False, False, False, True, False]
    assert not (positives & left_out).any()


def test_alike_projections_give_the_chance_level():
    its = items([0, 0, 1, 2, 2])
    same = torch.ones(5, 4)
    terms = ScanAwareNTXent(0.2, ignore_group=True, threshold=None)(same, same, its)
    assert terms["loss"].item() == pytest.approx(terms["chance"].item(), rel=1e-6)


def test_the_default_is_lightlys_nt_xent():
    loss = build_loss(ObjectiveSettings(), 0.2, 6)
    assert type(loss) is NTXentLoss and loss_state(loss) == {} and loss.gather_distributed
    assert build_loss(ObjectiveSettings(loss="decoupled"), 0.2, 6).gather_distributed


def test_the_decoupled_loss_has_no_positive_in_its_denominator():
    """Yeh et al. 2021, arXiv 2110.06848, equation 6."""
    projection = projections(4)
    loss = contrast(projection, projection, build_loss(ObjectiveSettings(loss="decoupled"), 0.4, 6))["loss"]
    z = [row / row.norm() for row in projection.double()]
    total = 0.0
    for i in range(8):
        negatives = [math.exp(float(z[i] @ z[j]) / 0.4) for j in range(8) if j % 4 != i % 4]
        total += math.log(sum(negatives)) - float(z[i] @ z[(i + 4) % 8]) / 0.4
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)


def test_a_memory_bank_holds_the_latest_sets():
    torch.manual_seed(3)
    criterion = build_loss(ObjectiveSettings(memory_bank=8), 0.2, 6)
    sets = [projections(4, seed).requires_grad_() for seed in range(3)]
    for projection in sets:
        before = criterion.memory_bank.bank.clone()
        loss = contrast(projection, projection, criterion)["loss"]
        first, second = (torch.nn.functional.normalize(one, dim=1) for one in projection.detach().chunk(2))
        logits = torch.cat([(first * second).sum(dim=1, keepdim=True), first @ before.T], dim=1) / 0.2
        wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
        torch.testing.assert_close(loss.detach(), wanted)
    latest = [torch.nn.functional.normalize(one.detach()[4:], dim=1) for one in (sets[2], sets[1])]
    torch.testing.assert_close(criterion.memory_bank.bank, torch.cat(latest))


def test_a_memory_bank_survives_a_checkpoint():
    criterion, other = (build_loss(ObjectiveSettings(memory_bank=8), 0.2, 6) for _ in range(2))
    contrast(*[projections(4).requires_grad_()] * 2, criterion)
    state = loss_state(criterion)
    assert sorted(state) == ["memory_bank.bank", "memory_bank.bank_ptr"]
    restore_loss(other, state)
    contrast(*[projections(4, seed=1).requires_grad_()] * 2, criterion)
    assert not torch.equal(state["memory_bank.bank"], criterion.memory_bank.bank)  # a copy
    contrast(*[projections(4, seed=1).requires_grad_()] * 2, other)
    assert torch.equal(other.memory_bank.bank, criterion.memory_bank.bank)
    assert torch.equal(other.memory_bank.bank_ptr, criterion.memory_bank.bank_ptr)
