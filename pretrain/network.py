"""The network of a pretraining run on its device: an encoder, what of a decoder is trained, and heads; and the optimiser of it."""

from collections.abc import Sequence
from typing import NamedTuple

from accelerate import Accelerator
from lightly.models.modules import SimCLRProjectionHead
from lightly.utils.lars import LARS
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pretrain.dense import DenseBranch
from pretrain.recipe import DenseSettings, HeadSettings, PretrainRecipe
from resunet.data.images import channel_count
from resunet.decoders import AnyDecoder, AnyEncoder, decoder_of
from resunet.encoder import initialise
from resunet.layout import place
from resunet.light_weights import load_weights
from resunet.mobile import MobileEncoder
from resunet.model import build_model
from resunet.progress import say
from resunet.training import parameter_groups


class Inputs(NamedTuple):
    """What a step gives the network.

    views: (2N, C, *sides), the first views and then the second. places: (2N, count, dimensions) in them, of dense contrast.
    """

    views: Tensor
    places: Tensor | None = None


class Outputs(NamedTuple):
    """What it makes of them: embedding (2N, channels[-1]), projection (2N, output) and places (2N, count, its output)."""

    embedding: Tensor
    projection: Tensor
    places: Tensor | None = None


class PretrainingNetwork(nn.Module):
    """Encoder and projection head, and with dense contrast what of a decoder it trains: see `Inputs` and `Outputs`.

    Args:
        decoder_channels: of a light decoder; see `resunet.decoders`.
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
        # what is optional comes last, so that encoder and head begin as they would without it
        self.decoder: AnyDecoder | None = None
        self.dense: DenseBranch | None = None
        if dense is not None:
            self.decoder = decoder_of(encoder, squeeze_excite, dense.level, decoder_channels)
            initialise(self.decoder)
            self.dense = DenseBranch(encoder, self.decoder, dense)

    def forward(self, views: Tensor, places: Tensor | None = None) -> Outputs:
        features = self.encoder(views)
        embedding = features[-1].mean(dim=tuple(range(2, views.ndim)))
        found = Outputs(embedding, self.head(embedding))
        if self.dense is None:
            return found
        assert self.decoder is not None and places is not None
        level = self.decoder(features, self.dense.level)
        return found._replace(places=self.dense(level, views.shape[2:], places))


def build_network(recipe: PretrainRecipe, accelerator: Accelerator) -> PretrainingNetwork:
    architecture = recipe.model.architecture(channel_count(recipe.data.channels))
    encoder = build_model(architecture)
    assert isinstance(encoder, AnyEncoder)
    light = isinstance(encoder, MobileEncoder)
    network = PretrainingNetwork(
        encoder,
        recipe.head,
        recipe.dense,
        recipe.model.squeeze_excite,
        recipe.model.channels if light else None,
    )
    if isinstance(encoder, MobileEncoder) and recipe.model.weights is not None:
        load_weights(encoder, recipe.model.weights)
    if accelerator.num_processes > 1:
        if accelerator.device.type == "cuda":
            network = synchronised(network)
        elif accelerator.is_main_process and recipe.batch_statistics:
            say(
                "batch norm on CPUs has each rank's own statistics, so that the result depends on the number of ranks; exact are "
                "model.norm=group head.batch_norm=false"
            )
    return place(network, accelerator.device)


def synchronised(network: PretrainingNetwork) -> PretrainingNetwork:
    """Batch norms as SyncBatchNorm, timm's with their activation, which torch's own converter would drop."""
    from timm.layers import convert_sync_batchnorm

    converted = convert_sync_batchnorm(network)
    assert isinstance(converted, PretrainingNetwork)
    return converted


def build_optimizer(recipe: PretrainRecipe, network: PretrainingNetwork) -> Optimizer:
    groups = parameter_groups({"network": network}, recipe.optimizer.weight_decay)
    if recipe.optimizer.name == "lars":
        lars: Optimizer = LARS(groups, lr=recipe.peak_lr, momentum=0.9)
        return lars
    return AdamW(groups, lr=recipe.peak_lr)
