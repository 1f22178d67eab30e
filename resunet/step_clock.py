"""What a run took: seconds on the wall and of the CPU, over all the processes that it was trained by."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator


class StepClock:
    """Seconds of a run so far, and of its steps, the first of a process left out: it allocates and compiles."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """state: what `state` gave of the processes before; in a checkpoint of an earlier version cpu_seconds are missing."""
        state = {"seconds": 0.0, "cpu_seconds": 0.0} if state is None else state
        self._before, self._cpu_before = state["seconds"], state.get("cpu_seconds")
        self._started, self._cpu_started = time.perf_counter(), _cpu_seconds()
        self._times: list[float] = []

    def state(self) -> dict[str, float]:
        """seconds by the clock on the wall, and cpu_seconds of all threads and of the processes that read and have ended: what a
        run costs where others use the machine, too."""
        found = {"seconds": self._before + (time.perf_counter() - self._started)}
        if self._cpu_before is not None:
            found["cpu_seconds"] = self._cpu_before + (_cpu_seconds() - self._cpu_started)
        return found

    def record(self, accelerator: Accelerator) -> dict[str, float | None]:
        """The same for run.json, cpu_seconds of all ranks, with seconds_per_step. All ranks call it."""
        found = self.state()
        if "cpu_seconds" in found and accelerator.num_processes > 1:
            spent = torch.tensor(found["cpu_seconds"], device=accelerator.device)
            found["cpu_seconds"] = float(accelerator.reduce(spent, reduction="sum"))
        return {name: round(value, 1) for name, value in found.items()} | {"seconds_per_step": self.seconds_per_step()}

    def tick(self) -> None:
        """Once at the end of every step."""
        self._times.append(time.perf_counter())

    def seconds_per_step(self) -> float | None:
        """The median over the steps of this process; None before two have ended."""
        steps = np.diff(self._times)
        return round(float(np.median(steps)), 5) if len(steps) else None


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
