"""Golden cases: synthetic scans, and what the live network makes of them. They hold no patient's data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from resunet.bundle.contract import Golden
from resunet.bundle.golden import GoldenCase, answer, mask_of, write_golden
from resunet.inference.predict import Behaviour
from resunet.inference.window import Scorer

# Even, odd, long and short ones: of the coarsest level one position and many.
_SIZES = {
    2: ((64, 64), (67, 81), (128, 96), (33, 100), (5, 40)),
    3: ((32, 32, 32), (21, 33, 19), (9, 40, 17), (24, 31, 28), (33, 17, 5)),
}
# Seen through windows and mirrored: for a 2D network a volume, slice by slice along its first axis.
_WINDOWED = {2: ((3, 75, 43), 32, (5.0, 1.0, 1.0)), 3: ((20, 33, 19), 16, (1.0, 1.0, 1.0))}


def write_goldens(
    folder: Path,
    live: Callable[[bool], Scorer],
    channels: int,
    spatial_dims: int,
    behaviour: Behaviour,
    overlap: float,
    precision: Literal["fp32", "int8"] = "fp32",
) -> tuple[Golden, ...]:
    """Write golden/*.npz; what the contract says of them. live: the network, mirrored or not, whose answers they are."""
    (folder / "golden").mkdir(exist_ok=True)
    written = []
    windowed, window, windowed_spacing = _WINDOWED[spatial_dims]
    wanted = [(size, (1.0,) * spatial_dims, None, False) for size in _SIZES[spatial_dims]]
    for number, (size, spacing, side, flips) in enumerate([*wanted, (windowed, windowed_spacing, window, True)]):
        name = "x".join(map(str, size)) + ("-int8" if precision == "int8" else "")
        golden = Golden(f"golden/{name}.npz", precision, side, flips)
        values = synthetic_scan(channels, size, number)
        logits = answer(live(flips), values, np.array(spacing), behaviour.rule, golden, overlap)
        case = GoldenCase(values, np.array(spacing), logits, mask_of(logits, behaviour.object_rules))
        write_golden(folder / golden.file, case)
        written.append(golden)
    return tuple(written)


def synthetic_scan(channels: int, size: Sequence[int], seed: int) -> NDArray[np.uint16]:
    """(channels, *size): smooth tissue, bright and dark balls in it, and noise; 12 bits, so that percentiles matter."""
    random = np.random.default_rng(seed)
    scan = np.empty((channels, *size))
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"))
    for channel in scan:
        smooth = ndimage.gaussian_filter(random.normal(size=size), 6)
        channel[:] = 1200 + 400 * smooth / (smooth.std() + 1e-9)
        for _ in range(6):
            centre = random.uniform(0, size).reshape(-1, *[1] * len(size))
            inside = ((grid - centre) ** 2).sum(axis=0) < random.uniform(1, max(4, min(size) / 5)) ** 2
            channel[inside] += random.choice([-800, 1000, 2000])
        channel += random.normal(0, 60, size)
    return scan.clip(0, 4095).round().astype(np.uint16)
