"""SimCLR: two views of a scan attract, all others in the set repel (Chen et al. 2020, arXiv 2002.05709, section 2).

Projection head and NT-Xent are lightly's. Embedding: global average pool of the encoder's last level; both views go
through the encoder in one forward pass, so that they share their batch statistics.
"""

from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn

from pretrain.recipe import HeadSettings
from resunet.encoder import ResidualEncoder


class SimCLR(nn.Module):
    """Encoder and projection head: (2N, C, S, S) → embeddings (2N, channels[-1]) and projections (2N, output)."""

    def __init__(self, encoder: ResidualEncoder, head: HeadSettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SimCLRProjectionHead(encoder.channels[-1], head.hidden, head.output)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.encoder.embed(views)
        return embedding, self.head(embedding)


def nt_xent(temperature: float) -> NTXentLoss:
    """lightly's NT-Xent over all ranks; the gather carries gradients."""
    return NTXentLoss(temperature=temperature, gather_distributed=True)


def contrast(embedding: Tensor, projection: Tensor, criterion: NTXentLoss) -> dict[str, Tensor]:
    """The loss of one contrastive set in float32, and two signs of collapse.

    Args:
        embedding, projection: (2N, …), the first views and then the second.

    Returns:
        loss; std of the l2-normalised projections and of the embeddings. A healthy value is about 1/√d; 0 is collapse,
        where the loss is ln(2N − 1).
    """
    first, second = projection.float().chunk(2)
    return {
        "loss": criterion(first, second),
        "projection_std": std_of_l2_normalized(projection.detach().float()),
        "embedding_std": std_of_l2_normalized(embedding.detach().float()),
    }
