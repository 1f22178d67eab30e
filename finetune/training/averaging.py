"""The exponential moving average of the weights, by torch's own `AveragedModel`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """A copy of the network, `.module`, that `update_parameters(network)` moves towards it after every step.

    Floating-point buffers, such as batch statistics, are averaged with the weights; counters are copied. The first update copies
    all; the n-th after it keeps min(decay, (1 + n) / (10 + n)) of the average, so that a short run does not end on its random start
    (TensorFlow's tf.train.ExponentialMovingAverage with num_updates; Tarvainen & Valpola 2017, arXiv 1703.01780, for the average).
    """
    return AveragedModel(network, multi_avg_fn=_warming_up(decay), use_buffers=True)


def _warming_up(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    @torch.no_grad()
    def average(averages: Any, values: Any, count: Tensor | int) -> None:
        if not averages[0].is_floating_point():
            for mine, theirs in zip(averages, values, strict=True):
                mine.copy_(theirs)
            return
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(now)(averages, values, count)

    return average
