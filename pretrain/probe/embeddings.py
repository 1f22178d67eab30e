"""What embeddings are like, without labels: alignment, uniformity, effective rank, spread."""

import torch
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor
from torch.nn import functional as F

_RANK_EPSILON = 1e-7  # as Garrido et al. have it for float32


def describe_embeddings(first: Tensor, second: Tensor) -> dict[str, float]:
    """Of the embeddings (N, d) of two views of N scans."""
    both = torch.cat([first, second]).float()
    return {
        "probe_alignment": alignment(first, second),
        "probe_uniformity": (uniformity(first) + uniformity(second)) / 2,
        "probe_rankme": rankme(both),
        "probe_std": float(std_of_l2_normalized(both)),
    }


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views of a scan, on the unit sphere: 0 is best (Wang & Isola 2020, arXiv 2005.10242)."""
    distance = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return float(distance.square().sum(dim=1).mean())


def uniformity(embedding: Tensor) -> float:
    """log mean exp(−2 ‖x − y‖²) over pairs, on the unit sphere: 0 is collapse, −4 the bound for a sphere of many dimensions.

    Wang & Isola 2020, arXiv 2005.10242, section 4.1, t 2.
    """
    distance = torch.pdist(F.normalize(embedding.float(), dim=1))
    return float(distance.square().mul(-2).exp().mean().log())


def rankme(embedding: Tensor) -> float:
    """exp of the entropy of the singular values' shares: from 1 to min(N, d) (Garrido et al. 2023, arXiv 2210.02885, eq. 1)."""
    values = torch.linalg.svdvals(embedding.float())
    share = values / values.sum().clamp_min(torch.finfo(torch.float32).tiny) + _RANK_EPSILON
    return float((-(share * share.log()).sum()).exp())
