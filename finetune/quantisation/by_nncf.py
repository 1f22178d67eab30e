"""NNCF on the PyTorch network, for OpenVINO: ranges from batches, or trained from there, then OpenVINO's own format."""

import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.deploy.graph import INPUT, OUTPUT, example_of, graphable
from resunet.bundle.engines import ir_of


def prepare(network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose convolutions see rounded values, their ranges from batches; it trains as any network."""
    # NNCF compiles its operators at the first call; a compilation that it gives up on leaves a lock that the next one waits for
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    with _quiet():
        import nncf

        quantised = nncf.quantize(
            graphable(network).eval(),
            nncf.Dataset(list(batches)),
            subset_size=len(batches),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
        )
    assert isinstance(quantised, nn.Module)
    return quantised


def write(quantised: nn.Module, channels: int, dims: int, path: Path) -> int:
    """path.xml and path.bin, of any batch and size; the version of the format."""
    import openvino

    with _quiet(), torch.no_grad():
        model = openvino.convert_model(
            quantised.eval(), example_input=example_of(channels, dims), input=[-1, channels, *[-1] * dims]
        )
        model.inputs[0].set_names({INPUT})
        model.outputs[0].set_names({OUTPUT})
        openvino.save_model(model, path, compress_to_fp16=False)
    version = ir_of(path)
    assert version is not None, "openvino.save_model writes the version"
    return version


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's progress, its log and the warnings of its parts."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
