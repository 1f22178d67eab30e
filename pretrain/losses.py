"""NT-Xent that knows whose scans it contrasts, and where in their volumes the slices are.

Slices of one patient are alike, and repelling them teaches what tells them apart. Left out of the negatives, they do neither.
Slices at the same relative position of other patients show the same anatomy, and may attract (Chaitanya et al. 2020, arXiv
2006.10511, section 3.1; Zeng et al. 2021, arXiv 2106.09157, section 2.2).
"""

from dataclasses import dataclass

import torch
from lightly.utils import dist
from torch import Tensor, nn
from torch.nn import functional as F


def of_all_ranks(values: Tensor) -> Tensor:
    """(N, …) of every rank in their order: (M, …); with gradients."""
    return torch.cat(dist.gather(values)) if dist.world_size() > 1 else values


@dataclass(frozen=True)
class Items:
    """What is known of the scans of a set, (N,) each.

    group: int64, of the patient or the item.
    axis: int64, that the volume is sliced along; only slices along the same one are compared. Of an image any.
    position: float32 in [0, 1] along it; NaN where it is not known.
    """

    group: Tensor
    axis: Tensor
    position: Tensor

    def of_all_ranks(self) -> "Items":
        """Those of every rank, in the order of the ranks."""
        together = torch.stack([self.group.double(), self.axis.double(), self.position.double()], dim=1)
        group, axis, position = of_all_ranks(together).unbind(dim=1)
        return Items(group.long(), axis.long(), position.float())


class ScanAwareNTXent(nn.Module):
    """NT-Xent with several positives and pairs that are left out: (N, D), (N, D), items of N → a scalar.

    The mean over views i of −1/|P(i)| Σ_{p ∈ P(i)} log(exp(s_ip / T) / Σ_{a ∈ A(i)} exp(s_ia / T)), s the cosine. P(i): the
    other view of the scan, and all slices of other groups whose position differs by less than the threshold. A(i): P(i) and
    the negatives, which are all other views but, with `ignore_group`, those of the same group. Over all ranks; the gather
    carries gradients (Khosla et al. 2020, arXiv 2004.11362, equation 2). Where every scan is its own group and no position
    is known this is NT-Xent.

    Args:
        ignore_group: pairs of one group that are no positives are left out.
        threshold: of the difference of positions; None for no such positives.
    """

    def __init__(self, temperature: float, ignore_group: bool, threshold: float | None) -> None:
        super().__init__()
        self.temperature, self.ignore_group, self.threshold = temperature, ignore_group, threshold

    def forward(self, first: Tensor, second: Tensor, items: Items) -> dict[str, Tensor]:
        """loss, and means over the views: positives |P|, and chance ln|A|, the loss where all projections are the same."""
        pairs = [F.normalize(first, dim=1), F.normalize(second, dim=1)]
        logits = torch.cat(pairs) @ torch.cat([of_all_ranks(one) for one in pairs]).T / self.temperature  # (2N, 2M)
        positives, left_out = self._roles(items, items.of_all_ranks())
        log_share = logits.masked_fill(left_out, -torch.inf).log_softmax(dim=1)
        counts = positives.sum(dim=1)
        losses = -torch.where(positives, log_share, 0).sum(dim=1) / counts
        return {
            "loss": losses.mean(),
            "positives": counts.float().mean(),
            "chance": (~left_out).sum(dim=1).float().log().mean(),
        }

    def _roles(self, here: Items, everyone: Items) -> tuple[Tensor, Tensor]:
        """Which pairs attract and which are left out: (2N, 2M) each."""
        count, total = len(here.group), len(everyone.group)
        rows = torch.arange(count, device=here.group.device)
        same_scan = torch.zeros(count, total, dtype=torch.bool, device=rows.device)
        same_scan[rows, dist.rank() * count + rows] = True
        nothing = torch.zeros_like(same_scan)
        itself = torch.cat([torch.cat([same_scan, nothing], dim=1), torch.cat([nothing, same_scan], dim=1)])
        same_group = here.group[:, None] == everyone.group[None]
        near = nothing
        if self.threshold is not None:
            apart = (here.position[:, None] - everyone.position[None]).abs()  # NaN is not below anything
            near = (apart < self.threshold) & (here.axis[:, None] == everyone.axis[None]) & ~same_group
        positives = (same_scan | near).repeat(2, 2) & ~itself
        ignored = same_group.repeat(2, 2) & ~positives if self.ignore_group else torch.zeros_like(itself)
        return positives, itself | ignored
