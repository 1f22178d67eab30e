"""What both training loops need and neither should repeat: ranks and precision, the schedule, order, state, reduced figures.

The loops themselves stay visible in pretrain/loop.py and finetune/loop.py.
"""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import Tensor, nn
from torch.optim import Optimizer

from resunet.arithmetic import refuse_without_gpu
from resunet.checkpoint import load_exactly
from resunet.config import Recipe
from resunet.errors import CheckFailed, InputError
from resunet.plain import number_of
from resunet.progress import say

Decay = Literal["cosine", "polynomial"]
_POWER = 0.9
_LOWEST_SCALE = 1e-4  # as fairseq's --min-loss-scale; torch's scaler begins at 65536
_PATIENCE = timedelta(hours=12)
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
T = TypeVar("T")


def start_ranks(recipe: Recipe, batch: int, what: str) -> Accelerator:
    """The accelerator of this rank, with the recipe's precision; says ranks and batch first.

    Args:
        batch: what is processed together over all ranks; ranks must divide it exactly.
        what: its unit, for messages ('scans', 'patches').

    Raises:
        InputError: other ranks than `processes`, or ranks that do not divide the batch.
        EnvironmentFault: fp16 without a GPU.
    """
    refuse_without_gpu("precision=", recipe.precision)
    # Accelerate keeps its precision for the life of a process, and refuses another: forget it, keep the process group
    AcceleratorState._reset_state()
    # without a GPU Accelerate joins ranks only where it is told to use the CPU
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)  # ranks read their shares of an archive at different speeds
    accelerator = Accelerator(
        mixed_precision=_MIXED[recipe.precision], cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience]
    )
    ranks = accelerator.num_processes
    if ranks != recipe.processes:
        raise InputError(
            f"processes={recipe.processes}: the recipe wants {recipe.processes} ranks, {ranks} started. Launch with "
            f"`accelerate launch --multi_gpu --num_processes {recipe.processes} -m …` or torchrun (on CPUs too: "
            f"`accelerate launch --cpu` starts one whatever it is told), or set processes={ranks}."
        )
    if batch % ranks:
        raise InputError(f"batch={batch}: {ranks} ranks do not divide it exactly. Set a multiple of {ranks}.")
    if accelerator.is_main_process:
        say(
            f"{number_of(ranks, 'rank')} on {accelerator.device.type}, batch {batch} {what} "
            f"({batch // ranks} a rank), {recipe.precision}, {recipe.steps} steps"
        )
    return accelerator


def learning_rate(step: int, steps: int, warmup: float, peak: float, decay: Decay = "cosine") -> float:
    """Linear warm-up over a share of the steps, then a decay to zero, which it reaches after the last step.

    cosine: Loshchilov & Hutter 2017, arXiv 1608.03983. polynomial: (1 − progress)^0.9, as nnU-Net has it (Isensee et al. 2021,
    doi 10.1038/s41592-020-01008-z, supplementary note 2; Chen et al. 2017, arXiv 1606.00915).
    """
    warmup_steps = min(round(warmup * steps), steps - 1)
    if decay == "polynomial" and step >= warmup_steps:
        return float(peak * (1 - (step - warmup_steps) / (steps - warmup_steps)) ** _POWER)
    # one step more than there are: the cosine ends after the last step, which is not wasted on a rate of 0
    return float(cosine_warmup_schedule(step, steps + 1, peak, 0.0, warmup_steps, 0.0))


def parameter_groups(modules: Mapping[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups by name, without weight decay on norms and biases."""
    groups = []
    for name, module in modules.items():
        decayed, plain = get_weight_decay_parameters([module])
        groups.append({"name": name, "params": decayed, "weight_decay": weight_decay})
        groups.append({"name": name, "params": plain, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def step_generator(device: torch.device, seed: int, stream: int, index: int, place: int) -> torch.Generator:
    """The random generator of one place in the `index`-th batch or set, a pure function of its arguments: no rank is among them."""
    entropy = np.random.SeedSequence([seed, stream, index, place]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(entropy[0]) << 32 | int(entropy[1]))


def training_state(
    step: int, network: nn.Module, optimizer: Optimizer, accelerator: Accelerator, beside: Mapping[str, nn.Module] | None = None
) -> dict[str, Any]:
    """All that a loop needs to go on after `step` steps; order and random numbers are functions of the step.

    beside: what else has a state, by the name it gets in the checkpoint.
    """
    return {name: module.state_dict() for name, module in (beside or {}).items()} | {
        "step": step,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }


def restore_training(
    state: Mapping[str, Any],
    network: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    beside: Mapping[str, nn.Module] | None = None,
) -> int:
    """Load what `training_state` gave; the number of steps already done.

    Raises:
        InputError: a checkpoint of another network, such as an earlier version's; it lists the tensors.
    """
    for name, module in ({"network": network} | dict(beside or {})).items():
        load_exactly(module, state[name], f"the last checkpoint's {name}")
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set on any rank."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor([int(flag)], device=accelerator.device)
    return bool(accelerator.reduce(flags, reduction="sum").item())


def mean_over_ranks(metrics: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Each metric averaged over the ranks."""
    if accelerator.num_processes == 1:
        return dict(metrics)
    values = torch.tensor(list(metrics.values()), device=accelerator.device)
    return dict(zip(metrics, accelerator.reduce(values, reduction="mean").tolist(), strict=True))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.ranks, None


def sum_over_ranks(values: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over the ranks, with gradients, for a loss that is a function of sums over the whole batch.

    Every rank then has the same loss L(S), S = Σ s_r, and the gradient it is due is L'(S) ds_r: the others' derivatives are the
    others' affair. DistributedDataParallel averages the ranks' gradients where they should be added, hence the factor.
    """
    if accelerator.num_processes == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values, accelerator.num_processes)
    return total


def refuse_non_finite(losses: Mapping[str, float], step: int, accelerator: Accelerator) -> None:
    """Stop, on every rank, on a loss (or a gradient's norm) that is not finite on any.

    Raises:
        CheckFailed: with the step and what usually helps.
    """
    if not any_rank(not all(math.isfinite(value) for value in losses.values()), accelerator):
        return
    shown = ", ".join(f"{name}={value}" for name, value in losses.items())
    bad = [name for name, value in losses.items() if not math.isfinite(value)] or ["loss"]  # of another rank
    raise CheckFailed(
        f"step {step}: the {' and '.join(bad)} is not finite ({shown}). Start anew, under another out, with a lower optimizer.lr, "
        "a longer warmup, or precision=bf16 or fp32: resumed as it is the run would come to the same step."
    )


def take_step(optimizer: Optimizer, norm: float, step: int, accelerator: Accelerator) -> dict[str, float]:
    """One step of a prepared optimiser. With a scaler (fp16) a step whose gradients overflow is skipped, and the scale halved.

    Args:
        norm: of the gradients, without the scale.

    Returns:
        gradient_norm, where it is finite, JSON having no other; with a scaler loss_scale and skipped (0 or 1) too.

    Raises:
        CheckFailed: the scale has fallen so low that none will do.
    """
    optimizer.step()
    scaler = accelerator.scaler
    if scaler is None:
        return {"gradient_norm": norm}
    if (scale := float(scaler.get_scale())) < _LOWEST_SCALE:
        raise CheckFailed(
            f"step {step}: gradients overflow in fp16 even with the loss scaled by {scale:.0e}. Start anew, under another out, "
            "with a lower optimizer.lr, a longer warmup, or precision=bf16 or fp32."
        )
    assert isinstance(optimizer, AcceleratedOptimizer)
    metrics = {"loss_scale": scale, "skipped": float(optimizer.step_was_skipped)}
    return metrics | ({"gradient_norm": norm} if math.isfinite(norm) else {})
