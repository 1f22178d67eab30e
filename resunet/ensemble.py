"""Several segmenters as one: the mean of their probabilities, as logits, so that whatever takes a segmenter takes an ensemble.

Deep ensembles, Lakshminarayanan et al. 2017 (arXiv 1612.01474, section 2.4: "a uniformly-weighted mixture model", predictions
averaged); of the networks of a cross-validation's folds it is what nnU-Net predicts with (Isensee et al. 2021,
doi 10.1038/s41592-020-01008-z). `resunet.members` makes one of finished runs.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.architecture import Architecture, EnsembleArchitecture, MemberArchitecture
from resunet.checkpoint import Checkpointed, ModelConfig


class Ensemble(nn.Module, Checkpointed):
    """Segmenters of one architecture, which see a scan one after another: a forward pass needs one member's memory.

    Args:
        members: two or more; they become parts of the ensemble, and are not copied.
    """

    kind: ClassVar[str] = "ensemble"

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        described = [_described(member) for member in members]
        assert all(one == described[0] for one in described), "members of one architecture; resunet.members says what differs"
        self.one_logit = described[0].num_classes == 2
        self.config = ModelConfig(architecture=EnsembleArchitecture(member=described[0], count=len(described)))

    @classmethod
    def build(cls, architecture: Architecture) -> Self:
        """Members with fresh weights."""
        from resunet.model import build_model  # which lists this class among the networks

        assert isinstance(architecture, EnsembleArchitecture)
        return cls([build_model(architecture.member) for _ in range(architecture.count)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *size) → float32 logits (N, 1 or num_classes, *size), of the members' mean probabilities."""
        return self.mean_of(member(x) for member in self.members)

    def mean_of(self, logits: Iterable[Tensor]) -> Tensor:
        """Logits (N, 1 or num_classes, *size) of each member → float32 logits of their mean probabilities."""
        total: Tensor | None = None
        for one in logits:
            scores = _log_probabilities(one.float(), self.one_logit)
            total = scores if total is None else torch.logaddexp(total, scores)
        assert total is not None
        if self.one_logit:
            return total[:, :1] - total[:, 1:]  # log p − log(1 − p), in which the number of members cancels
        return total - math.log(len(self.members))


def _log_probabilities(logits: Tensor, one_logit: bool) -> Tensor:
    """Logits (N, 1 or K, *size) → log probabilities (N, 2 or K, *size), of one logit the foreground's first."""
    if one_logit:
        return F.logsigmoid(torch.cat([logits, -logits], dim=1))
    return F.log_softmax(logits, dim=1)


def _described(member: nn.Module) -> MemberArchitecture:
    assert isinstance(member, Checkpointed)
    architecture = member.config.architecture
    assert isinstance(architecture, MemberArchitecture), "segmenters, and no ensembles of ensembles"
    return architecture
