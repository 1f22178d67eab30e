"""What a recipe costs on this machine, from a few steps of the step that training takes."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from finetune.distillation.teacher import load_teacher
from finetune.judging import validate
from finetune.labelled import LabelledData, sampler_of
from finetune.recipe import FinetuneRecipe
from finetune.step import (
    apply_gradients,
    begins_trained,
    build,
    forward_backward,
    prepare,
    refresh_statistics,
    start_step,
    teacher_of,
)
from resunet.measuring import ENOUGH_SECONDS, load, peak_memory, timed

_STEPS = 5
_VAL_CASES = 4


@dataclass(frozen=True)
class Cost:
    """What was measured.

    step: seconds of one, the median; the first is left out, as it allocates.
    case_slice: seconds to predict and measure one slice of a val case.
    statistics: seconds to recompute batch statistics before a validation; 0 where the recipe does not.
    memory: bytes; of the process at its peak, its data included, on a CPU; of the device's tensors on a GPU.
    device: 'cpu' or 'cuda'.
    busy: processes that wanted a core meanwhile, this one's threads among them, for each core there is.
    """

    step: float
    steps_measured: int
    case_slice: float
    statistics: float
    memory: int
    device: str
    busy: float


def measure_cost(recipe: FinetuneRecipe, data: LabelledData, accelerator: Accelerator) -> Cost:
    """Take a few steps of a fresh network and predict a few val cases; the network is thrown away.

    Raises:
        CheckFailed: a loss that is not finite.
    """
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, receipt = build(recipe)
    learner = prepare(recipe, model, receipt, accelerator)
    teacher = teacher_of(recipe, learner, load_teacher(recipe, device))
    sampler = sampler_of(recipe, data)

    def take(step: int) -> None:
        start_step(recipe, model, learner.optimizer, min(step, recipe.steps - 1), transferred=begins_trained(recipe))
        learner.optimizer.zero_grad(set_to_none=True)
        metrics = forward_backward(recipe, learner.wrapped, sampler, step, accelerator, teacher)
        apply_gradients(recipe, learner.trained, learner.optimizer, metrics["loss"], step, accelerator)

    take(0)
    seconds: list[float] = []
    while len(seconds) < _STEPS and sum(seconds) < ENOUGH_SECONDS:
        seconds.append(timed(lambda: take(len(seconds) + 1)))
    for_statistics = timed(lambda: refresh_statistics(recipe, model, model, sampler, accelerator))
    some = data.val[:_VAL_CASES]
    for_val = timed(lambda: validate(model, some, recipe, accelerator)) if some else 0.0
    return Cost(
        step=float(np.median(seconds)),
        steps_measured=len(seconds),
        case_slice=for_val / max(1, sum(case.num_slices for case in some)),
        statistics=for_statistics,
        memory=peak_memory(device),
        device=device.type,
        busy=load(),
    )
