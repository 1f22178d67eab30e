import numpy as np
import pytest
import torch

from finetune.distillation.losses import Attentive, attention_loss, attention_maps, relative_difference, soft_target_loss
from finetune.training.supervision import Supervised
from resunet.errors import InputError
from resunet.model import ResUNet, UNet


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    return raised / raised.sum()


def naive(logits: torch.Tensor, taught: torch.Tensor, inside: torch.Tensor, temperature: float) -> float:
    """Pixel by pixel, in float64; one logit z is the second of two, the first being 0."""
    found = []
    for index in np.argwhere(inside.numpy()):
        place = (index[0], slice(None), *index[1:])
        ours, theirs = (one.double().numpy()[place] for one in (logits, taught))
        if len(ours) == 1:
            ours, theirs = np.append(0, ours), np.append(0, theirs)
        p, q = softmax(ours / temperature), softmax(theirs / temperature)
        found.append(float(np.sum(q * np.log(q / p))))
    return temperature**2 * float(np.mean(found))


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_soft_targets_are_a_divergence_pixel_by_pixel(channels, temperature):
    ours, theirs = random(2, channels, 5, 4), random(2, channels, 5, 4, seed=1)
    inside = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    found = soft_target_loss(ours, theirs, inside, temperature)
    assert float(found) == pytest.approx(naive(ours, theirs, inside, temperature), rel=1e-4)
    assert float(soft_target_loss(ours, ours, inside, temperature)) == pytest.approx(0, abs=1e-6)
    assert float(soft_target_loss(ours, theirs, torch.zeros_like(inside), temperature)) == 0


def test_one_logit_is_two_classes():
    ours, theirs = random(2, 1, 3, 3), random(2, 1, 3, 3, seed=1)
    both = [torch.cat([torch.zeros_like(one), one], dim=1) for one in (ours, theirs)]
    inside = torch.ones(2, 3, 3, dtype=torch.bool)
    assert float(soft_target_loss(ours, theirs, inside, 2.0)) == pytest.approx(float(soft_target_loss(*both, inside, 2.0)))


def test_at_a_high_temperature_logits_are_matched():
    """Hinton et al. 2015, section 2.1: the gradient then is (z − v) / N for logits of mean 0; the factor T² keeps its size."""
    ours, theirs = random(1, 4, 1, 1), random(1, 4, 1, 1, seed=1)
    ours, theirs = (one - one.mean() for one in (ours, theirs))
    ours.requires_grad_()
    soft_target_loss(ours, theirs, torch.ones(1, 1, 1), 1000.0).backward()
    torch.testing.assert_close(ours.grad, (ours.detach() - theirs) / 4, rtol=0, atol=2e-2)


def test_for_masks_the_relative_difference_is_one_less_dice():
    ours, theirs = (random(2, 3, 4, 4, seed=seed).argmax(dim=1) for seed in (0, 1))
    certain = [torch.nn.functional.one_hot(one, 3).movedim(-1, 1) * 100.0 for one in (ours, theirs)]
    inside = torch.ones(2, 4, 4, dtype=torch.bool)
    dice = [2 * float(((ours == k) & (theirs == k)).sum()) / float((ours == k).sum() + (theirs == k).sum()) for k in (1, 2)]
    assert float(relative_difference(*certain, inside)) == pytest.approx(1 - np.mean(dice))
    same = random(2, 3, 4, 4)
    assert float(relative_difference(same, same, inside)) == 0  # of soft targets, too


def test_certain_logits_stay_finite():
    ours, theirs = torch.full((1, 1, 1, 1), -1e4, requires_grad=True), torch.full((1, 1, 1, 1), 1e4)
    loss = soft_target_loss(ours, theirs, torch.ones(1, 1, 1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1e4) and float(ours.grad) == pytest.approx(-1)


def test_attention_is_the_distance_of_normalised_energy():
    ours, theirs = random(2, 3, 4, 5), random(2, 7, 4, 5, seed=1)
    found = attention_loss(attention_maps([ours]), attention_maps([theirs]))
    expected = []
    for one, other in zip(ours.double().numpy(), theirs.double().numpy(), strict=True):
        energies = [np.sum(of**2, axis=0).ravel() for of in (one, other)]
        expected.append(np.sum((energies[0] / np.linalg.norm(energies[0]) - energies[1] / np.linalg.norm(energies[1])) ** 2))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(attention_loss(attention_maps([ours]), attention_maps([-5 * ours]))) == pytest.approx(0, abs=1e-6)


def test_levels_of_one_size_meet_in_their_order():
    """As the two coarsest of a light network whose encoder ends at stride 8."""
    levels = [random(1, 2, 8, 8), random(1, 2, 4, 4, seed=1), random(1, 3, 4, 4, seed=2)]
    assert float(attention_loss(attention_maps(levels), attention_maps(levels))) == 0


def test_levels_meet_by_their_size():
    shallow, deep = [random(1, 2, 8, 8)], [random(1, 2, 8, 8, seed=1), random(1, 2, 4, 4, seed=2)]
    alone = attention_loss(attention_maps(shallow), attention_maps(deep[:1]))
    assert attention_loss(attention_maps(shallow), attention_maps(deep)) == alone
    with pytest.raises(InputError, match="attention_weight: no level of the student's decoder has the size"):
        attention_loss(attention_maps(shallow), attention_maps(deep[1:]))


@pytest.mark.parametrize("network", [ResUNet(1, 3, (4, 4, 6, 8), units=1), UNet(1, 3, (4, 4, 6, 8))])
def test_what_is_attentive_gives_the_logits_of_what_it_wraps(network):
    x = random(2, 1, 21, 18)
    network.eval()
    logits, maps = Attentive(network)(x)
    assert torch.equal(logits, network(x)) and [one.shape[1:] for one in maps] == [(21, 18), (11, 9), (6, 5)]
    torch.testing.assert_close(torch.stack([one.flatten(1).norm(dim=1) for one in maps]), torch.ones(3, 2))
    supervised = Supervised(network).eval()
    several, again = Attentive(supervised)(x)
    assert all(torch.equal(one, other) for one, other in zip(several, supervised(x), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(again, maps, strict=True))
