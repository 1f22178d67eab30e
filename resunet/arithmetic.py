"""In which precision a network computes: torch.autocast by the name that recipes have for it."""

import torch

from resunet.config import Precision
from resunet.errors import EnvironmentFault

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """fp32 computes so within another autocast, too."""
    dtype = _DTYPES.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def refuse_without_gpu(given: str, precision: Precision) -> None:
    """Raises EnvironmentFault for fp16 where no GPU is visible. given: what stands before the value, as "precision="."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise EnvironmentFault(f"{given}fp16: needs a GPU, and none is visible. On a CPU use bf16 or fp32.")
