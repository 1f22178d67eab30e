"""What a student learns from its teacher: softened probabilities, and where the decoder's levels look. In float32.

As `resunet.losses`, every term is a function of sums over the batch of all ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.training.supervision import Supervised
from resunet.blocks import crop_to
from resunet.errors import InputError
from resunet.light_model import MobileResUNet
from resunet.losses import Total, one_rank
from resunet.model import ResUNet, UNet


def soft_target_loss(
    logits: Tensor, teacher_logits: Tensor, inside: Tensor, temperature: float = 1.0, total: Total = one_rank
) -> Tensor:
    """T² times the mean over pixels of KL(teacher ‖ student), both of logits / T (Hinton et al. 2015, arXiv 1503.02531, section 2).

    The factor keeps the gradient's size whatever the temperature. One logit z stands for two classes, as a softmax of (0, z).

    Args:
        logits: the student's, (N, 1 or K, *size), any float dtype; teacher_logits: the teacher's, alike.
        inside: (N, *size), the pixels that count.
        total: the sum over the ranks of a tensor of any shape.
    """
    ours, theirs = (_log_probabilities(one.float() / temperature) for one in (logits, teacher_logits))
    divergence = (theirs.exp() * (theirs - ours)).sum(dim=1)
    summed, count = total(torch.stack([(divergence * inside).sum(), inside.sum().float()])).unbind()
    return temperature**2 * summed / count.clamp_min(1)


def relative_difference(logits: Tensor, teacher_logits: Tensor, inside: Tensor, total: Total = one_rank) -> Tensor:
    """Σ|p − q| / Σ(p + q) of the probabilities p and q of a class, over all pixels; the mean over the classes but background.

    For masks it is 1 − Dice, and for soft targets it is 0 where both agree, as Dice is not: a Dice semimetric loss (Wang et al.
    2023, arXiv 2303.16296, section 3). Arguments as `soft_target_loss`.
    """
    ours, theirs = (_log_probabilities(one.float()).exp()[:, 1:] * inside[:, None] for one in (logits, teacher_logits))
    over = (0, *range(2, ours.ndim))
    difference, both = total(torch.stack([(ours - theirs).abs().sum(over), (ours + theirs).sum(over)])).unbind()
    return (difference / both.clamp_min(torch.finfo(both.dtype).tiny)).mean()


def _log_probabilities(logits: Tensor) -> Tensor:
    """(N, 1 or K, *size) → (N, 2 or K, *size)."""
    if logits.shape[1] == 1:
        return F.logsigmoid(torch.cat([-logits, logits], dim=1))
    return F.log_softmax(logits, dim=1)


def attention_maps(levels: Sequence[Tensor]) -> list[Tensor]:
    """Of each level (N, C, *size) the mean over channels of squares, of length 1 a patch: (N, *size) float32.

    The maps F²_sum of Zagoruyko & Komodakis 2017 (arXiv 1612.03928, section 3.1), which have no channels: networks of other widths
    compare without a layer between them.
    """
    return [F.normalize(level.float().square().mean(dim=1).flatten(1), dim=1).view_as(level[:, 0]) for level in levels]


def attention_loss(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], total: Total = one_rank) -> Tensor:
    """The mean over patches and levels of the squared distance of `attention_maps`, between 0 and 2.

    Zagoruyko & Komodakis 2017, equation 2, with the square that their code has. Levels meet by their size, those of one size in
    their order, so that networks of other depths compare by those that both have.

    Raises:
        InputError: no level of one has the size of any level of the other.
    """
    theirs = _by_size(teacher_maps)
    pairs = [(ours, theirs[which]) for which, ours in _by_size(maps).items() if which in theirs]
    if not pairs:
        raise InputError(
            "distillation.attention_weight: no level of the student's decoder has the size of one of the teacher's. Give "
            "model.channels more levels, or set it to 0."
        )
    distances = torch.stack([(ours - theirs).square().flatten(1).sum(dim=1) for ours, theirs in pairs])
    summed, count = total(torch.stack([distances.sum(), distances.new_tensor(distances.numel())])).unbind()
    return summed / count


def _by_size(maps: Sequence[Tensor]) -> dict[tuple[torch.Size, int], Tensor]:
    """By size, and by place among those of that size."""
    found: dict[tuple[torch.Size, int], Tensor] = {}
    for one in maps:
        size = one.shape[1:]
        found[size, sum(known == size for known, _ in found)] = one
    return found


class Attentive(nn.Module):
    """What is trained, whose forward pass gives its attention maps beside its logits."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, x: Tensor) -> tuple[Tensor | list[Tensor], list[Tensor]]:
        """(N, in_channels, *size) → what `trained` gives, and `attention_maps` of its decoder's levels, finest first."""
        if isinstance(self.trained, Supervised):
            levels = self.trained.network.levels(x)
            return self.trained.heads_of(levels), attention_maps(levels)
        assert isinstance(self.trained, ResUNet | UNet | MobileResUNet)
        levels = self.trained.levels(x)
        return crop_to(self.trained.head(levels[0]), x.shape[2:]), attention_maps(levels)
