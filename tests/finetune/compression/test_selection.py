import pytest
import torch

from finetune.compression.groups import Group, LayerCost, Use, find_groups, layer_costs, size_at, widths_after
from finetune.compression.importance import weight_importance
from finetune.compression.selection import Bounds, Harm, choose_channels, fewest
from finetune.compression.sensitivity import LayerSensitivity, Sensitivity
from resunet.architecture import ResUNetArchitecture
from resunet.errors import InputError
from resunet.model import build_model


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = build_model(ResUNetArchitecture(channels=(16, 32, 64), units=1))
    groups = find_groups(model)
    return groups, weight_importance(model, groups, "magnitude"), layer_costs(model)


def chosen(subject, bounds, round_to=1, least=None, harms=None):
    groups, scores, costs = subject
    harms = harms or [Harm()] * len(groups)
    removed = choose_channels(groups, scores, harms, costs, bounds, round_to, least or [1] * len(groups))
    return removed, size_at(costs, widths_after(groups, [len(gone) for gone in removed], costs))


@pytest.mark.parametrize("share", [0.9, 0.4, 0.1])
def test_targets_are_met_and_hardly_more(subject, share):
    whole = size_at(subject[2], {})
    for bounds in (Bounds(share * whole.parameters, None), Bounds(None, share * whole.macs)):
        _, size = chosen(subject, bounds)
        assert bounds.hold(size)
        reached = size.parameters / whole.parameters if bounds.macs is None else size.macs / whole.macs
        assert 0.85 * share < reached <= share
    both = Bounds(share * whole.parameters, share * whole.macs)
    assert both.hold(chosen(subject, both)[1])


def test_the_least_important_channels_of_a_group_go(subject):
    _, scores, costs = subject
    removed, _ = chosen(subject, Bounds(0.5 * size_at(costs, {}).parameters, None))
    assert sum(map(bool, removed)) > 3
    for gone, score in zip(removed, scores, strict=True):
        left = [i for i in range(len(score)) if i not in gone]
        assert not gone or score[gone].max() <= score[left].min()


def test_multiply_adds_go_from_fine_levels_and_parameters_from_coarse_ones(subject):
    _, _, costs = subject
    whole = size_at(costs, {})
    _, few_macs = chosen(subject, Bounds(None, 0.3 * whole.macs))
    _, few_parameters = chosen(subject, Bounds(0.3 * whole.parameters, None))
    assert few_macs.parameters > few_parameters.parameters and few_macs.macs < few_parameters.macs


def test_widths_are_round_and_none_is_below_the_least(subject):
    groups, _, costs = subject
    least = fewest(groups, 0.3, 8, {group.name: group.channels for group in groups})
    assert least == [-(-round(0.3 * group.channels) // 8) * 8 for group in groups]
    removed, _ = chosen(subject, Bounds(0.3 * size_at(costs, {}).parameters, None), 8, least)
    for group, gone, kept in zip(groups, removed, least, strict=True):
        assert (group.channels - len(gone)) % 8 == 0 and group.channels - len(gone) >= kept


def test_a_target_that_cannot_be_met_is_refused(subject):
    groups, _, costs = subject
    least = [group.channels - 1 for group in groups]
    with pytest.raises(InputError, match=r"lower prune\.least"):
        chosen(subject, Bounds(0.2 * size_at(costs, {}).parameters, None), 1, least)


def test_what_hurts_is_spared(subject):
    groups, _, costs = subject
    bounds = Bounds(0.4 * size_at(costs, {}).parameters, None)
    alike, _ = chosen(subject, bounds)
    harms = [Harm(weight=100.0 if i == 3 else 1.0) for i in range(len(groups))]
    spared, _ = chosen(subject, bounds, harms=harms)
    assert len(spared[3]) < len(alike[3]) / 2
    before = [Harm(lost=0.5 if i == 3 else 0.0) for i in range(len(groups))]
    assert len(chosen(subject, bounds, harms=before)[0][3]) < len(alike[3])


def test_the_least_harm_at_equal_prices_is_an_equal_share_of_each():
    """Two groups of equal layers: by Cauchy–Schwarz Σ R² is least where the shares are equal, inversely to their weights."""
    costs = {name: LayerCost(1.0, 0.0, 1.0, (100, 100), shared=True) for name in "ab"}
    groups = [Group(name, 100, 1, (Use(name, "out", tuple(range(100))),)) for name in "ab"]
    for weights in ((1.0, 1.0), (1.0, 3.0)):
        harms = [Harm(weight) for weight in weights]
        removed = choose_channels(groups, [torch.ones(100)] * 2, harms, costs, Bounds(120, None), 1, [1, 1])
        assert len(removed[0]) == pytest.approx(80 * weights[1] / sum(weights), abs=1)
        assert len(removed[1]) == pytest.approx(80 * weights[0] / sum(weights), abs=1)


def test_sensitivity_is_fitted_by_a_square():
    layers = [
        LayerSensitivity(layer="a", channels=8, layers=1, dice={"0.25": 0.8 - 0.6 / 16, "0.5": 0.8 - 0.6 / 4}),
        LayerSensitivity(layer="b", channels=8, layers=1, dice={"0.25": 0.81, "0.5": 0.8}),
    ]
    made = Sensitivity(dice=0.8, cases=3, layers=tuple(layers))
    assert made.weights() == {"a": pytest.approx(0.6), "b": pytest.approx(0.03)}
    assert made.worst({"a": 0.3, "b": 0.3}) == ["a (lost 30%; by itself and untrained Dice −0.150)"]
