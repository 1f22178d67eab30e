"""`resunet doctor`: what this machine has, and what will not work on it."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from resunet.config import Precision
from resunet.data.identity import default_salt_file
from resunet.machine import git_commit, machine, versions
from resunet.mirror import wandb_state

_REPEATS = 5


def examine() -> list[tuple[str, str]]:
    """(what, finding) rows for a person to read."""
    found = machine()
    rows = [(f"version of {name}", value) for name, value in versions().items()]
    rows.append(("git commit", git_commit() or "not a checkout"))
    rows.append(("system", f"{found['system']} on {found['architecture']}"))
    rows.append(("cores and threads", f"{found['cores']} cores, {found['threads']} threads in torch"))
    rows.append(("GPUs", ", ".join(found["gpus"]) or "none; training runs on the CPU"))
    rows.append(("precision", _precision_line()))
    for what, folder in (("working folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        rows.append((what, _folder_line(folder)))
    rows.append(("salt for ids", _salt_line()))
    rows.append(("Weights & Biases", wandb_state()))
    return rows


def step_seconds(precision: Precision) -> float:
    """Median seconds of a forward and backward pass of a residual stack on the CPU in some precision."""
    network = nn.Sequential(*[nn.Conv2d(32 if i else 1, 32, 3, padding=1) for i in range(4)])
    network = network.to(memory_format=torch.channels_last)
    x = torch.ones(4, 1, 128, 128).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            network(x).square().mean().backward()

    return _median_seconds(step)


def fastest_precision() -> Precision:
    """bf16 where it is faster than fp32 on this machine (measured, or a GPU that has it), else fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if step_seconds("bf16") < step_seconds("fp32") else "fp32"


def _median_seconds(step: Callable[[], None]) -> float:
    step()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return sorted(times)[_REPEATS // 2]


def _precision_line() -> str:
    if torch.cuda.is_available():
        return "bf16 and fp16 on the GPU" if torch.cuda.is_bf16_supported() else "fp16 on the GPU, no bf16"
    ratio = step_seconds("fp32") / step_seconds("bf16")
    advice = "use precision=bf16" if ratio > 1 else "use precision=fp32"
    return f"bf16 trains a small network {ratio:.1f} times as fast as fp32 here: {advice}; fp16 needs a GPU"


def _folder_line(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder}: NOT writable ({error.strerror})"
    return f"{folder}: writable, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"


def _salt_line() -> str:
    file = default_salt_file()
    return f"{file}: {'there' if file.exists() else 'is made by the first run'}"
