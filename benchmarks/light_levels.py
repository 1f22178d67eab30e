"""Where the light network's time goes, level by level, and what other ends and ways up would cost.

    python -m benchmarks.light_levels

One thread, batch 1, channels last, fp32, evaluation mode; medians of interleaved rounds in this thread's CPU time, so that what
shares the machine disturbs little. Shares are of the sum over the levels.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resunet.light_decoder import LightResidualUnit
from resunet.light_model import MobileResUNet
from resunet.model import ResUNet

_WARM = 3


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def interleaved(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """name → median milliseconds of CPU time."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(_WARM + rounds):
        for name, action in actions.items():
            started = time.thread_time()
            action()
            if turn >= _WARM:
                seconds[name].append(time.thread_time() - started)
    return {name: 1000 * float(np.median(its)) for name, its in seconds.items()}


def stages(network: MobileResUNet | ResUNet) -> dict[str, nn.Module]:
    """Encoder levels, finest first, decoder blocks, coarsest first, and the head."""
    named: dict[str, nn.Module] = {f"encoder {level}": one for level, one in enumerate(network.encoder.levels)}
    named |= {f"decoder {len(network.decoder.blocks) - 1 - place}": one for place, one in enumerate(network.decoder.blocks)}
    return named | {"head": network.head}


@torch.inference_mode()
def levels(network: MobileResUNet | ResUNet, x: Tensor, rounds: int) -> list[tuple[str, str, float]]:
    """(stage, size of what it gives, milliseconds)."""
    given: dict[str, tuple[Tensor, ...]] = {}
    sizes: dict[str, str] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given[name], sizes[name] = inputs, " × ".join(map(str, output.shape[1:]))

        return hook

    named = stages(network)
    handles = [one.register_forward_hook(keep(name)) for name, one in named.items()]
    network(x)
    for handle in handles:
        handle.remove()
    actions = {name: (lambda one=one, inputs=given[name]: one(*inputs)) for name, one in named.items()}
    found = interleaved(actions, rounds)
    return [(name, sizes[name], found[name]) for name in named]


class FullResolution(nn.Module):
    """An end that was not taken: a unit of `width` channels at full resolution, with a skip from the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(channels, width, 1)
        self.skip = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.unit = LightResidualUnit(width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        up = F.interpolate(self.up(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        logits: Tensor = self.head(self.unit(up + self.skip(image)))
        return logits


@torch.inference_mode()
def ends(size: int, rounds: int, channels: int = 16) -> dict[str, float]:
    """From half resolution to logits at full resolution."""
    x, image = channels_last(torch.randn(1, channels, size // 2, size // 2)), channels_last(torch.randn(1, 1, size, size))
    one, four = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, 4, 1)
    transposed = nn.ConvTranspose2d(channels, 1, 2, stride=2)
    unit = FullResolution(channels, 8).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    actions: dict[str, Callable[[], object]] = {
        "1×1 convolution, logits resized": lambda: F.interpolate(
            one(x), scale_factor=2.0, mode="bilinear", align_corners=False
        ),
        "1×1 convolution to 4, pixels shuffled (ours)": lambda: F.pixel_shuffle(four(x), 2),
        "transposed convolution to 1": lambda: transposed(x),
        "a separable unit of 8 channels at full resolution": lambda: unit(x, image),
    }
    return interleaved(actions, rounds)


@torch.inference_mode()
def ways_up(size: int, rounds: int, below: int = 24, channels: int = 16) -> dict[str, float]:
    """From 1/4 to 1/2, before the unit."""
    x = channels_last(torch.randn(1, below, size // 4, size // 4))
    one, four = nn.Conv2d(below, channels, 1), nn.Conv2d(below, 4 * channels, 1)
    transposed = nn.ConvTranspose2d(below, channels, 2, stride=2)
    actions: dict[str, Callable[[], object]] = {
        "1×1 convolution, resized by bilinear (ours)": lambda: F.interpolate(
            one(x), scale_factor=2.0, mode="bilinear", align_corners=False
        ),
        "1×1 convolution, resized by nearest": lambda: F.interpolate(one(x), scale_factor=2.0, mode="nearest"),
        "1×1 convolution to 4 times, pixels shuffled": lambda: F.pixel_shuffle(four(x), 2),
        "transposed convolution (the Res-UNet's)": lambda: transposed(x),
    }
    return interleaved(actions, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv3_small_100", "mobilenetv3_large_100"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = channels_last(torch.randn(1, 1, options.size, options.size))
    networks: dict[str, MobileResUNet | ResUNet] = {name: MobileResUNet(1, 2, name) for name in options.backbones}
    for name, network in (networks | {"Res-UNet (32–512), fp32": ResUNet()}).items():
        network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        rows = levels(network, x, options.rounds)
        total = sum(milliseconds for *_, milliseconds in rows)
        print(f"\n{name}: {total:.1f} ms\n\n| level | gives | ms | share |\n|---|---|---|---|")
        print("\n".join(f"| {stage} | {size} | {ms:.2f} | {ms / total:.0%} |" for stage, size, ms in rows))
    for title, found in (
        ("end", ends(options.size, options.rounds)),
        ("way up, 1/4 to 1/2", ways_up(options.size, options.rounds)),
    ):
        print(f"\n| {title} | ms |\n|---|---|")
        print("\n".join(f"| {name} | {ms:.2f} |" for name, ms in found.items()))


if __name__ == "__main__":
    main()
