"""The losses of a recipe: SimCLR's contrast of scans, here; `pretrain.dense`'s, of places.

SimCLR: two views of a scan attract, all others in the set repel (Chen et al. 2020, arXiv 2002.05709, section 2). Projection head
and losses are lightly's, but for the one that knows groups and positions. Embedding: global average pool of the encoder's last
level; both views go through the encoder in one forward pass, so that they share their batch statistics.
"""

from collections.abc import Mapping

from lightly.loss import DCLLoss, NTXentLoss
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn

from pretrain.dense import contrast_places
from pretrain.losses import Items, ScanAwareNTXent, of_all_ranks
from pretrain.network import Outputs
from pretrain.recipe import ObjectiveSettings, PretrainRecipe


def nt_xent(temperature: float) -> NTXentLoss:
    """lightly's NT-Xent over all ranks; the gather carries gradients."""
    return NTXentLoss(temperature=temperature, gather_distributed=True)


def build_loss(settings: ObjectiveSettings, temperature: float, output: int) -> nn.Module:
    """The loss of a recipe, over all ranks.

    A memory bank begins with random directions (torch's global generator) and holds the second views' projections of the
    latest sets, those of all ranks in their order, so that it is the same on every rank if it began so.

    Args:
        output: numbers in a projection.
    """
    if settings.knows_scans:
        return ScanAwareNTXent(temperature, settings.same_group == "ignore", settings.position_threshold)
    if settings.loss == "decoupled":
        decoupled: nn.Module = DCLLoss(temperature=temperature, gather_distributed=True)
        return decoupled
    if settings.memory_bank is not None:
        size = (settings.memory_bank, output)
        with_bank: nn.Module = NTXentLoss(temperature=temperature, memory_bank_size=size, gather_distributed=True)
        return with_bank
    plain: nn.Module = nt_xent(temperature)
    return plain


def loss_state(criterion: nn.Module) -> dict[str, Tensor]:
    """What a loss remembers of earlier sets, copied: the memory bank, which lightly leaves out of its state_dict."""
    return {name: buffer.clone() for name, buffer in criterion.named_buffers()} if _has_bank(criterion) else {}


def restore_loss(criterion: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `loss_state` gave."""
    buffers = dict(criterion.named_buffers()) if _has_bank(criterion) else {}
    assert buffers.keys() == state.keys(), (buffers.keys(), state.keys())
    for name, buffer in buffers.items():
        buffer.copy_(state[name])


def _has_bank(criterion: nn.Module) -> bool:
    # without one its buffers are there all the same, and hold whatever the memory held
    return isinstance(criterion, NTXentLoss) and criterion.memory_bank.size[0] > 0


def contrast(embedding: Tensor, projection: Tensor, criterion: nn.Module, items: Items | None = None) -> dict[str, Tensor]:
    """The loss of one contrastive set in float32, and two signs of collapse.

    Args:
        embedding, projection: (2N, …), the first views and then the second.
        items: of the N scans, for a loss that asks for them.

    Returns:
        loss; std of the l2-normalised projections and of the embeddings. A healthy value is about 1/√d; 0 is collapse,
        where the loss of plain NT-Xent is ln(2N − 1). What the loss itself tells, beside.
    """
    first, second = projection.float().chunk(2)
    if isinstance(criterion, ScanAwareNTXent):
        assert items is not None
        terms: dict[str, Tensor] = criterion(first, second, items)
    else:
        terms = {"loss": criterion(first, second)}
    return terms | {
        "projection_std": std_of_l2_normalized(of_all_ranks(projection.detach().float())),
        "embedding_std": std_of_l2_normalized(of_all_ranks(embedding.detach().float())),
    }


def score(
    outputs: Outputs, recipe: PretrainRecipe, criterion: nn.Module, items: Items | None, matched: Tensor | None = None
) -> dict[str, Tensor]:
    """The losses of a set, of `contrast` and `contrast_places` as the recipe has them, and what they tell.

    Args:
        items, matched: what they take beside the network's outputs.

    Returns:
        loss: the sum by the recipe's weights. Where there are two, that of `contrast` is global_loss.
    """
    terms = contrast(outputs.embedding, outputs.projection, criterion, items)
    if recipe.dense is None:
        return terms
    assert outputs.places is not None and matched is not None
    terms["global_loss"] = terms.pop("loss")
    terms |= contrast_places(outputs.places, matched, recipe.dense)
    return {"loss": recipe.objective.weight * terms["global_loss"] + recipe.dense.weight * terms["dense_loss"]} | terms
