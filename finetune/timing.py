"""What a recipe costs on this machine, from a few steps of the step that training takes."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from finetune.loop import validate
from finetune.patches import PatchSampler
from finetune.recipe import FinetuneRecipe
from finetune.step import build, forward_backward, make_optimizer, start_step
from resunet.data.cases import LoadedCase
from resunet.training import refuse_non_finite

_STEPS = 5
_ENOUGH_SECONDS = 20.0  # of measured steps: fewer of them where one takes long
_VAL_CASES = 4
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """What was measured.

    step: seconds of one, the median; the first is left out, as it allocates.
    case_slice: seconds to predict and measure one slice of a val case.
    memory: bytes; of the process at its peak, its data included, on a CPU; of the device's tensors on a GPU.
    device: 'cpu' or 'cuda'.
    busy: processes that wanted a core meanwhile, this one's threads among them, for each core there is.
    """

    step: float
    steps_measured: int
    case_slice: float
    memory: int
    device: str
    busy: float


def measure_cost(
    recipe: FinetuneRecipe, train: Sequence[LoadedCase], val: Sequence[LoadedCase], accelerator: Accelerator
) -> Cost:
    """Take a few steps of a fresh network and predict a few val cases; the network is thrown away.

    Raises:
        CheckFailed: a loss that is not finite.
    """
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, receipt = build(recipe)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(recipe, model))
    sampler = PatchSampler(train, recipe.patch, recipe.foreground)

    def take(step: int) -> None:
        start_step(recipe, model, optimizer, min(step, recipe.steps - 1), transferred=receipt is not None)
        optimizer.zero_grad(set_to_none=True)
        metrics = forward_backward(recipe, wrapped, sampler, step, accelerator)
        refuse_non_finite({"loss": metrics["loss"]}, step, accelerator)
        accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()

    take(0)
    seconds: list[float] = []
    while len(seconds) < _STEPS and sum(seconds) < _ENOUGH_SECONDS:
        seconds.append(_timed(lambda: take(len(seconds) + 1)))
    some = val[:_VAL_CASES]
    for_val = _timed(lambda: validate(model, some, recipe, accelerator)) if some else 0.0
    return Cost(
        step=float(np.median(seconds)),
        steps_measured=len(seconds),
        case_slice=for_val / max(1, sum(case.num_slices for case in some)),
        memory=torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory(),
        device=device.type,
        busy=os.getloadavg()[0] / (os.cpu_count() or 1),
    )


def peak_memory() -> int:
    """Bytes that this process held at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
