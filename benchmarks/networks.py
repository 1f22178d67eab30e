"""Parameters and FLOPs of the networks, as the table in the README: `python -m benchmarks.networks`."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resunet.light_model import MobileResUNet
from resunet.model import ResUNet, UNet

SIZE = 256
NETWORKS = {
    "Res-UNet (32–512)": lambda: ResUNet(),
    "Res-UNet, squeeze-and-excitation": lambda: ResUNet(squeeze_excite=True),
    "Res-UNet, half width (16–256)": lambda: ResUNet(channels=(16, 32, 64, 128, 256)),
    "light, MobileNetV3 small 1.0": lambda: MobileResUNet(backbone="mobilenetv3_small_100"),
    "light, MobileNetV3 large 1.0": lambda: MobileResUNet(backbone="mobilenetv3_large_100"),
    "U-Net (64–1024)": lambda: UNet(),
    "U-Net, half width (32–512)": lambda: UNet(channels=(32, 64, 128, 256, 512)),
}


def parameters(network: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(network: nn.Module, size: int = SIZE) -> int:
    """Floating-point operations of one forward pass of one grey image of size²; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, size, size))
    return int(counter.get_total_flops())


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def table() -> str:
    """The table in Markdown."""
    lines = [f"| network | parameters | GFLOP at {SIZE}² |", "|---|---|---|"]
    for name, build in NETWORKS.items():
        network = build()
        lines.append(f"| {name} | {parameters(network) / 1e6:.2f} M | {_digits(flops(network) / 1e9)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
