import math

import pytest
import torch

from pretrain.probe.embeddings import alignment, describe_embeddings, rankme, uniformity


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


def test_alignment_and_uniformity_are_the_naive_sums():
    first, second = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    wanted = sum(float((unit(a) - unit(b)).norm() ** 2) for a, b in zip(first, second, strict=True)) / 7
    assert alignment(first, second) == pytest.approx(wanted, rel=1e-5)
    pairs = [math.exp(-2 * float((unit(first[i]) - unit(first[j])).norm() ** 2)) for i in range(7) for j in range(i)]
    assert uniformity(first) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def test_lengths_do_not_count_and_collapse_is_seen():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert uniformity(x * torch.arange(1, 7)[:, None]) == pytest.approx(uniformity(x), rel=1e-5)
    collapsed = torch.ones(6, 4)
    found = describe_embeddings(collapsed, collapsed)
    assert found == {
        "probe_alignment": 0,
        "probe_uniformity": pytest.approx(0, abs=1e-6),
        "probe_rankme": pytest.approx(1, abs=1e-4),
        "probe_std": pytest.approx(0, abs=1e-6),
    }


def test_rankme_counts_equal_directions():
    assert rankme(3 * torch.eye(8)) == pytest.approx(8, rel=1e-4)
    two = torch.zeros(10, 6)
    two[0, 0] = two[1, 1] = 5
    assert rankme(two) == pytest.approx(2, rel=1e-4)
    share = torch.tensor([0.5, 0.25, 0.25])
    assert rankme(torch.diag(share * 7)) == pytest.approx(math.exp(float(-(share * share.log()).sum())), rel=1e-4)


def test_half_precision_is_not_where_it_is_computed():
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert describe_embeddings(x, x) == describe_embeddings(x.float(), x.float())
