"""The network of a pretraining run on its device, and the optimiser of it."""

from accelerate import Accelerator
from lightly.utils.lars import LARS
from torch.optim import AdamW, Optimizer

from pretrain.objective import SimCLR
from pretrain.recipe import PretrainRecipe
from resunet.data.images import channel_count
from resunet.decoders import AnyEncoder
from resunet.layout import place
from resunet.light_weights import load_weights
from resunet.mobile import MobileEncoder
from resunet.model import build_model
from resunet.progress import say
from resunet.training import parameter_groups


def build_network(recipe: PretrainRecipe, accelerator: Accelerator) -> SimCLR:
    architecture = recipe.model.architecture(channel_count(recipe.data.channels))
    encoder = build_model(architecture)
    assert isinstance(encoder, AnyEncoder)
    light = isinstance(encoder, MobileEncoder)
    network = SimCLR(encoder, recipe.head, recipe.dense, recipe.model.squeeze_excite, recipe.model.channels if light else None)
    if isinstance(encoder, MobileEncoder) and recipe.model.weights is not None:
        load_weights(encoder, recipe.model.weights)
    if accelerator.num_processes > 1:
        if accelerator.device.type == "cuda":
            network = synchronised(network)
        elif accelerator.is_main_process and (recipe.model.norm == "batch" or recipe.head.batch_norm):
            say(
                "batch norm on CPUs has each rank's own statistics, so that the result depends on the number of ranks; exact are "
                "model.norm=group head.batch_norm=false"
            )
    return place(network, accelerator.device)


def synchronised(network: SimCLR) -> SimCLR:
    """Batch norms as SyncBatchNorm, timm's with their activation, which torch's own converter would drop."""
    from timm.layers import convert_sync_batchnorm

    converted = convert_sync_batchnorm(network)
    assert isinstance(converted, SimCLR)
    return converted


def build_optimizer(recipe: PretrainRecipe, network: SimCLR) -> Optimizer:
    groups = parameter_groups({"network": network}, recipe.optimizer.weight_decay)
    if recipe.optimizer.name == "lars":
        lars: Optimizer = LARS(groups, lr=recipe.peak_lr, momentum=0.9)
        return lars
    return AdamW(groups, lr=recipe.peak_lr)
