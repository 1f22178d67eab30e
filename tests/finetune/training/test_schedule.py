import math

import pytest

from finetune.training.schedule import rates
from resunet.training import learning_rate


def schedule(recipe, transferred: bool = True) -> tuple[list[float], list[float]]:
    """The rate of every step, and the encoder's."""
    both = [rates(recipe, step, transferred) for step in range(recipe.steps)]
    return [one for one, _ in both], [encoder for _, encoder in both]


def test_one_rise_and_fall_for_all(recipe):
    ours = recipe(steps=40, warmup=0.25, optimizer={"lr": 0.5, "decay": "polynomial"})
    lr, encoder = schedule(ours)
    assert lr == encoder and lr[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert lr[10:] == pytest.approx([0.5 * (1 - step / 30) ** 0.9 for step in range(30)])


def test_the_encoder_has_a_rate_of_its_own_and_the_decoder_goes_first(recipe):
    ours = recipe(steps=20, warmup=0.1, optimizer={"lr": 0.5, "encoder_lr_factor": 0.1, "decoder_first": 0.25})
    lr, encoder = schedule(ours)
    assert lr == [learning_rate(step, 20, 0.1, 0.5) for step in range(20)]
    assert encoder[:5] == [0] * 5 and encoder[5:] == pytest.approx([0.1 * one for one in lr[5:]])
    assert schedule(ours, transferred=False) == (lr, lr)


def test_the_sawtooth_has_two_teeth(recipe):
    """As TaWald/nnUNet's sawtooth_trainer: the decoder's half up, half down; the network's up for `warmup`, down to the end."""
    settings = {"lr": 0.5, "decoder_first": 0.2, "sawtooth": True, "decay": "polynomial", "encoder_lr_factor": 0.5}
    ours = recipe(steps=50, warmup=0.1, optimizer=settings)
    lr, encoder = schedule(ours)
    assert lr[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert lr[5:10] == pytest.approx([0.5 * (1 - step / 5) ** 0.9 for step in range(5)])
    assert lr[10:15] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert lr[15:] == pytest.approx([0.5 * (1 - step / 35) ** 0.9 for step in range(35)])
    assert encoder[:10] == [0] * 10 and encoder[10:] == pytest.approx([0.5 * one for one in lr[10:]])
    scratch, _ = schedule(ours, transferred=False)
    assert scratch == [learning_rate(step, 50, 0.1, 0.5, "polynomial") for step in range(50)]


@pytest.mark.parametrize("steps, first", [(1, 0.5), (3, 0.6), (10, 0.89), (7, 0.1)])
def test_odd_shares_have_rates_too(recipe, steps, first):
    for decay in ("cosine", "polynomial"):
        lr, _ = schedule(recipe(steps=steps, warmup=0.9, optimizer={"decoder_first": first, "sawtooth": True, "decay": decay}))
        assert all(math.isfinite(one) and one > 0 for one in lr)
