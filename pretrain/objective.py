"""SimCLR: two views of a scan attract, all others in the set repel (Chen et al. 2020, arXiv 2002.05709, section 2).

Projection head and losses are lightly's, but for the one that knows groups and positions. Embedding: global average pool of the
encoder's last level; both views go through the encoder in one forward pass, so that they share their batch statistics.
"""

from collections.abc import Callable, Mapping, Sequence

from lightly.loss import DCLLoss, NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn

from pretrain.dense import DenseBranch, contrast_places
from pretrain.losses import Items, ScanAwareNTXent, of_all_ranks
from pretrain.recipe import DenseSettings, HeadSettings, ObjectiveSettings
from resunet.decoders import AnyDecoder, AnyEncoder


class SimCLR(nn.Module):
    """Encoder and projection head: (2N, C, *size) → embeddings (2N, channels[-1]) and projections (2N, output).

    With a dense branch also the projections of places in the views: (2N, count, dimensions) → (2N, count, its output).
    """

    def __init__(
        self,
        encoder: AnyEncoder,
        head: HeadSettings,
        dense: DenseSettings | None = None,
        squeeze_excite: bool = False,
        decoder_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SimCLRProjectionHead(encoder.channels[-1], head.hidden, head.output, batch_norm=head.batch_norm)
        # last, so that encoder and head begin as they would without it
        self.dense = None if dense is None else DenseBranch(encoder, dense, squeeze_excite, decoder_channels)

    @property
    def decoder(self) -> AnyDecoder | None:
        """What of a decoder is trained."""
        return None if self.dense is None else self.dense.decoder

    def forward(self, views: Tensor, places: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.dense is None:
            embedding = self.encoder.embed(views)
            return embedding, self.head(embedding)
        assert places is not None
        features = self.encoder(views)
        embedding = features[-1].mean(dim=tuple(range(2, views.ndim)))
        return embedding, self.head(embedding), self.dense(features, views.shape[2:], places)


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


def contrast_both(
    embedding: Tensor,
    projection: Tensor,
    of_places: Tensor,
    contrast_scans: Callable[[Tensor, Tensor], dict[str, Tensor]],
    found: Tensor,
    weight: float,
    dense: DenseSettings,
) -> dict[str, Tensor]:
    """`contrast`, whose loss is global_loss here, and `contrast_places`; loss: their sum by weight.

    Args:
        of_places: (2N, count, D), and found: (N, count), as `contrast_places` takes them.
        contrast_scans: `contrast`, with its criterion and items.
        weight: of the global loss.
    """
    terms, places = contrast_scans(embedding, projection), contrast_places(of_places, found, dense)
    loss = weight * terms["loss"] + dense.weight * places["dense_loss"]
    return terms | {"loss": loss, "global_loss": terms["loss"]} | places
