"""The step of fine-tuning: the network, its optimiser, rates, batches and gradients. What the loop does, and what is measured.

`finetune.loop` trains with it; the plan and the checks before training time and try the same code.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from finetune.distillation.losses import Attentive
from finetune.distillation.teacher import Teacher
from finetune.recipe import FinetuneRecipe
from finetune.start import load_start
from finetune.training.augment import augment
from finetune.training.averaging import averaged
from finetune.training.batch_statistics import batch_norms, moving, recompute_statistics, refuse_without_batch_norm
from finetune.training.consistency import HardView, MeanTeacher
from finetune.training.patches import UNLABELLED, Batches
from finetune.training.schedule import encoder_stands_still, rates
from finetune.training.supervision import Supervised, supervised_loss
from resunet.blocks import crop_to
from resunet.data.cases import IGNORE
from resunet.data.images import channel_count
from resunet.layout import channels_last, place
from resunet.light_model import MobileResUNet
from resunet.light_weights import load_weights
from resunet.losses import segmentation_loss
from resunet.model import Segmenter, UNet, WithEncoder, build_model
from resunet.training import parameter_groups, refuse_non_finite, step_generator, sum_over_ranks, take_step
from resunet.transfer import Receipt, transfer_encoder

# Names of the random streams: of training, and of the batches that statistics are recomputed from.
_TRAINING, _STATISTICS = (2, 3), (4, 5)

# Of a batch: the sum of the squared rms displacements of its deformed patches, in pixels, and how many these are.
ELASTIC = ("elastic_squares", "elastic_patches")


def build(recipe: FinetuneRecipe) -> tuple[Segmenter, Receipt | None]:
    """The network, fresh but for what the receipt says. The seed makes the fresh part the same in every arm.

    Raises:
        InputError: an encoder, weights or a start that do not fit, or batch statistics that the network does not have.
    """
    torch.manual_seed(recipe.seed)
    assert recipe.model.norm is not None, "resolve() comes first"
    refuse_without_batch_norm(recipe)
    if recipe.start is not None:
        return load_start(recipe)
    in_channels = channel_count(recipe.data.channels)
    architecture = recipe.model.architecture(in_channels, len(recipe.data.classes), recipe.model.norm)
    model = build_model(architecture)
    assert isinstance(model, Segmenter)
    if recipe.model.weights is not None:
        assert isinstance(model, MobileResUNet), "the recipe refuses weights for another network"
        load_weights(model.encoder, recipe.model.weights)
    if recipe.encoder is None:
        return model, None
    assert isinstance(model, WithEncoder), "the recipe refuses an encoder for another network"
    return model, transfer_encoder(recipe.encoder, model, "input_channels" in recipe.allow, recipe.transfer)


def supervise(recipe: FinetuneRecipe, model: Segmenter) -> nn.Module:
    """What is trained: the model, or the model with its heads for deep supervision, fresh by the seed.

    Raises:
        InputError: deep supervision of a network with too few levels.
    """
    if not recipe.loss.deep_supervision:
        return model
    assert isinstance(model, UNet | WithEncoder)
    torch.manual_seed(recipe.seed)
    supervised = Supervised(model)
    supervised.heads.to(next(model.parameters()).device)
    return supervised


def attending(recipe: FinetuneRecipe, trained: nn.Module) -> nn.Module:
    """What a step calls: what is trained, with its attention maps where the recipe compares them with the teacher's."""
    if recipe.teacher is None or not recipe.distillation.attention_weight:
        return trained
    return Attentive(trained)


def make_optimizer(recipe: FinetuneRecipe, trained: nn.Module, receipt: Receipt | None = None) -> Optimizer:
    """AdamW with groups named encoder, decoder and head, stem for its adapted input convolutions, heads for deep supervision."""
    network = trained.network if isinstance(trained, Supervised) else trained
    modules: dict[str, nn.Module] = {"network": network}
    if isinstance(network, WithEncoder):
        modules = {"encoder": network.encoder, "decoder": network.decoder, "head": network.head}
    if isinstance(trained, Supervised):
        modules["heads"] = trained.heads
    groups = parameter_groups(modules, recipe.optimizer.weight_decay)
    adapted = {tensor.name for tensor in receipt.tensors if tensor.state == "adapted"} if receipt is not None else set()
    if adapted:
        stem = [parameter for name, parameter in network.named_parameters() if name in adapted]
        ids = {id(parameter) for parameter in stem}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        groups.append({"name": "stem", "params": stem, "weight_decay": recipe.optimizer.weight_decay})
    return AdamW(groups, lr=recipe.optimizer.lr)


@dataclass(frozen=True)
class Learner:
    """What is trained, and what trains it.

    judged: what is validated and saved: the model, or its moving average. trained: the model, with its heads for deep supervision.
    wrapped: what a step calls.
    """

    model: Segmenter
    judged: Segmenter
    average: AveragedModel | None
    trained: nn.Module
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer

    def beside(self) -> dict[str, nn.Module]:
        """What a checkpoint holds beside the network and is not part of the saved model."""
        beside: dict[str, nn.Module] = {"heads": self.trained.heads} if isinstance(self.trained, Supervised) else {}
        return beside if self.average is None else beside | {"average": self.average}


def prepare(recipe: FinetuneRecipe, model: Segmenter, receipt: Receipt | None, accelerator: Accelerator) -> Learner:
    """A model that `build` gave, on the accelerator's device, ready for its first step."""
    model = place(model, accelerator.device)
    average = averaged(model, recipe.ema) if recipe.ema is not None else None
    judged = model if average is None else average.module
    assert isinstance(judged, Segmenter)
    trained = supervise(recipe, model)
    wrapped, optimizer = accelerator.prepare(attending(recipe, trained), make_optimizer(recipe, trained, receipt))
    return Learner(model, judged, average, trained, wrapped, optimizer)


def begins_trained(recipe: FinetuneRecipe) -> bool:
    """Whether the encoder has learned something before the first step: rates and schedules of a transferred one are for it."""
    return recipe.encoder is not None or recipe.start is not None or recipe.model.weights is not None


def start_step(recipe: FinetuneRecipe, model: Segmenter, optimizer: Optimizer, step: int, transferred: bool) -> float:
    """Training mode and learning rates of a step; the rate of all but a transferred encoder.

    While the decoder goes first, a transferred encoder stands still: neither its weights nor its batch statistics move. Its adapted
    input convolutions, which have seen no such input, go with the decoder.
    """
    lr, encoder_lr = rates(recipe, step, transferred)
    for group in optimizer.param_groups:
        group["lr"] = encoder_lr if group["name"] == "encoder" else lr
    training_mode(recipe, model)
    if encoder_stands_still(recipe, step, transferred):
        assert isinstance(model, WithEncoder)
        model.encoder.eval()
    return lr


def teacher_of(recipe: FinetuneRecipe, learner: Learner, teacher: Teacher | None) -> Teacher | MeanTeacher | None:
    """Who is asked about unlabelled scans: the learner's own average, if the recipe says so, or the teacher."""
    if recipe.consistency is None:
        return teacher
    assert learner.average is not None
    return MeanTeacher(learner.judged, recipe.consistency, recipe.seed, recipe.steps)


def training_mode(recipe: FinetuneRecipe, model: Segmenter) -> None:
    """Training mode, but for the batch statistics of an encoder that the recipe keeps frozen."""
    model.train()
    if recipe.model.statistics == "frozen":
        assert isinstance(model, WithEncoder)
        for layer in batch_norms(model.encoder).values():
            layer.eval()


def forward_backward(
    recipe: FinetuneRecipe,
    wrapped: nn.Module,
    sampler: Batches,
    step: int,
    accelerator: Accelerator,
    teacher: Teacher | MeanTeacher | None = None,
) -> dict[str, float]:
    """The gradients of one optimiser step, accumulated; its losses and ELASTIC of this rank's patches, for `told`.

    wrapped: what `attending` gives, if there is a teacher.
    """
    metrics: dict[str, float] = {}
    for part in range(recipe.accumulate):
        index = step * recipe.accumulate + part
        images, labels, moved = _batch(recipe, sampler, index, accelerator, _TRAINING)
        view = None
        if isinstance(teacher, MeanTeacher):
            view = teacher.hard_view(images, labels, index, _first(recipe, accelerator))
        with nullcontext() if part == recipe.accumulate - 1 else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                made = wrapped(images if view is None else view.images)
            terms = _terms(recipe, made, images, labels, step, accelerator, teacher, view)
            accelerator.backward(terms["loss"] / recipe.accumulate)
        values = {name: float(term.detach()) for name, term in terms.items()} | dict(zip(ELASTIC, moved, strict=True))
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value / recipe.accumulate
    return metrics


def told(metrics: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics, of all ranks, as they are logged: the rms elastic displacement in pixels in place of ELASTIC."""
    squares, moved = (metrics[name] for name in ELASTIC)
    kept = {name: value for name, value in metrics.items() if name not in ELASTIC}
    return kept | {"elastic_rms": math.sqrt(squares / moved) if moved else 0.0}


def apply_gradients(
    recipe: FinetuneRecipe, trained: nn.Module, optimizer: Optimizer, loss: float, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Clip and `take_step`; the norm is the one before clipping.

    Raises:
        CheckFailed: the loss is not finite, or a gradient that nobody scaled; or what `take_step` raises.
    """
    norm = float(accelerator.clip_grad_norm_(trained.parameters(), recipe.optimizer.clip))
    refuse_non_finite({"loss": loss} | ({"gradient_norm": norm} if accelerator.scaler is None else {}), step, accelerator)
    return take_step(optimizer, norm, step, accelerator)


def loss_of(
    recipe: FinetuneRecipe, logits: Tensor | Sequence[Tensor], labels: Tensor, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The recipe's loss of the batch of all ranks, and its terms. logits: of the levels, finest first, with deep supervision."""
    settings = recipe.loss
    weights = None
    if settings.class_weights is not None:
        names = recipe.data.classes.values() if recipe.data.regions is None else recipe.data.regions
        weights = [settings.class_weights.get(name, 1.0) for name in names]
    loss = partial(
        segmentation_loss,
        gamma=settings.gamma,
        focal_weight=settings.focal_weight,
        dice_weight=settings.dice_weight,
        component_weight=settings.component_weight,
        class_weights=weights,
        total=partial(sum_over_ranks, accelerator=accelerator),
        regions=recipe.data.region_members(),
    )
    return loss(logits, labels) if isinstance(logits, Tensor) else supervised_loss(logits, labels, loss)


def _terms(
    recipe: FinetuneRecipe,
    made: Any,
    images: Tensor,
    labels: Tensor,
    step: int,
    accelerator: Accelerator,
    teacher: Teacher | MeanTeacher | None,
    view: HardView | None,
) -> dict[str, Tensor]:
    """`loss_of` a batch, and what is learned from the teacher.

    made: what the network, as `attending` gives it, made of the images, or of the mean teacher's view of them.
    """
    attentive = isinstance(teacher, Teacher) and recipe.distillation.attention_weight
    logits, maps = made if attentive else (made, None)
    terms = loss_of(recipe, logits, labels.masked_fill(labels == UNLABELLED, IGNORE), accelerator)
    if teacher is None:
        return terms
    finest = crop_to(logits if isinstance(logits, Tensor) else logits[0], images.shape[2:])
    if isinstance(teacher, MeanTeacher):
        assert view is not None
        learned = teacher.terms(images, finest, view, step, accelerator)
        return terms | learned | {"loss": terms["loss"] + learned["consistency"]}
    learned = teacher.terms(images, finest, maps, labels != IGNORE, accelerator)
    return terms | learned | {"loss": terms["loss"] + learned["distillation"]}


def refresh_statistics(
    recipe: FinetuneRecipe, model: Segmenter, judged: Segmenter, sampler: Batches, accelerator: Accelerator
) -> None:
    """With precise statistics: those of the network that will be judged, recomputed in place.

    From the same training batches at every call, whose random streams are their own. Statistics that do not move in training, of an
    encoder that stands still, are left.

    Args:
        model: as it has just trained: its modes say what moves.
        judged: the model, or its moving average.
    """
    if recipe.model.statistics != "precise":
        return
    batches = (_batch(recipe, sampler, index, accelerator, _STATISTICS)[0] for index in range(recipe.model.statistics_batches))
    recompute_statistics(judged, moving(model), batches, accelerator)


def _batch(
    recipe: FinetuneRecipe, sampler: Batches, index: int, accelerator: Accelerator, streams: tuple[int, int]
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """This rank's share of the `index`-th batch, augmented, and ELASTIC.

    Every patch has random streams of its own, named by its place in the whole batch: the batch is the same on any number of ranks.
    """
    device, share, first = accelerator.device, recipe.batch // accelerator.num_processes, _first(recipe, accelerator)
    made = []
    for patch in range(first, first + share):
        images, labels, spacing = sampler.batch(1, (recipe.seed, streams[0], index, patch))
        generator = step_generator(device, recipe.seed, streams[1], index, patch)
        made.append(augment(images.to(device), labels.to(device), recipe.augment, generator, spacing.to(device)))
    moved = [rms**2 for *_, rms in made if rms]
    images, labels = torch.cat([images for images, *_ in made]), torch.cat([labels for _, labels, _ in made])
    return channels_last(images), labels, (sum(moved), float(len(moved)))


def _first(recipe: FinetuneRecipe, accelerator: Accelerator) -> int:
    """The place of this rank's first patch in the whole batch."""
    place: int = accelerator.process_index * (recipe.batch // accelerator.num_processes)
    return place
