import math

import pytest
import torch
from lightly.loss import NTXentLoss

from pretrain.network import PretrainingNetwork
from pretrain.objective import contrast, nt_xent
from pretrain.recipe import HeadSettings
from resunet.encoder import ResidualEncoder


def network() -> PretrainingNetwork:
    torch.manual_seed(0)
    return PretrainingNetwork(ResidualEncoder(2, (4, 6), units=1), HeadSettings(hidden=8, output=5))


def views(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 12, 12, generator=torch.Generator().manual_seed(count))


def naive_nt_xent(projection: torch.Tensor, temperature: float) -> float:
    """Equation 1 of Chen et al. 2020, pair by pair."""
    z = [row / row.norm() for row in projection.double()]
    count = len(z)
    total = 0.0
    for i in range(count):
        partner = (i + count // 2) % count
        others = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(count) if k != i]
        total -= math.log(math.exp(float(z[i] @ z[partner]) / temperature) / sum(others))
    return total / count


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("count", [2, 6])
def test_the_loss_is_nt_xent(temperature, count):
    embedding, projection = network()(views(2 * count))[:2]
    loss = contrast(embedding, projection, nt_xent(temperature))["loss"]
    first, second = projection.chunk(2)
    torch.testing.assert_close(loss, NTXentLoss(temperature=temperature)(first, second))
    assert loss.item() == pytest.approx(naive_nt_xent(projection.detach(), temperature), rel=1e-5)


def test_collapse_gives_its_closed_form():
    for count in (2, 7, 64):
        same = torch.ones(2 * count, 4)
        terms = contrast(same, same, nt_xent(0.2))
        assert terms["loss"].item() == pytest.approx(math.log(2 * count - 1), rel=1e-6)
        assert terms["projection_std"].item() == terms["embedding_std"].item() == 0


def test_spread_vectors_have_a_spread_of_one_over_root_d():
    spread = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    terms = contrast(spread, 100 * spread, nt_xent(0.2))
    for name in ("projection_std", "embedding_std"):
        assert terms[name].item() == pytest.approx(1 / 4, rel=0.02)


def test_the_loss_is_float32_and_only_the_loss_has_a_gradient():
    embedding, projection = network()(views(8))[:2]
    terms = contrast(embedding.half(), projection.half(), nt_xent(0.2))
    assert {value.dtype for value in terms.values()} == {torch.float32}
    assert (
        terms["loss"].requires_grad and not terms["projection_std"].requires_grad and not terms["embedding_std"].requires_grad
    )


def test_both_views_share_their_batch_statistics():
    model, x = network(), views(8)
    calls = []
    model.encoder.levels[0].register_forward_hook(lambda module, given, out: calls.append(given[0].shape))
    embedding, projection = model(x)[:2]
    assert calls == [x.shape]
    assert embedding.shape == (8, 6) and projection.shape == (8, 5)
    apart = torch.cat([model(half)[0] for half in x.chunk(2)])
    assert not torch.allclose(embedding, apart, atol=1e-3)


def test_the_embedding_is_the_global_average_pool():
    model, x = network().eval(), views(3)
    embedding, projection = model(x)[:2]
    last = model.encoder(x)[-1]
    assert last.shape == (3, 6, 6, 6)
    torch.testing.assert_close(embedding, last.flatten(2).mean(dim=2))
    torch.testing.assert_close(projection, model.head(embedding))


def test_a_gradient_reaches_every_parameter():
    model = network()
    contrast(*model(views(8))[:2], nt_xent(0.2))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
