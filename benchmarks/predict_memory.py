"""Peak memory of `resunet predict`, each scan in a process of its own: what was planned against what it takes.

    python -m benchmarks.predict_memory [--widths 8,32] [--memory 4] [--scans image,volume] [--tta] [--probabilities]
        [--spatial-dims 3] FOLDER

The network has random weights: memory does not depend on them. FOLDER is for models, scans and masks (about 2 GiB).
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import tifffile

from resunet.checkpoint import ModelConfig
from resunet.model import ResUNet

GIB = 2**30


def image(folder: Path) -> Path:
    return _tiff(folder / "image.tif", (8192, 8192), np.uint16)


def colour(folder: Path) -> Path:
    return _tiff(folder / "colour.tif", (8192, 8192, 3), np.uint8)


def volume(folder: Path) -> Path:
    return _nifti(folder / "volume.nii.gz", np.int16)


def floats(folder: Path) -> Path:
    return _nifti(folder / "floats.nii", np.float32)


def head(folder: Path) -> Path:
    return _nifti(folder / "head.nii.gz", np.int16, (160, 256, 256))


SCANS: dict[str, Callable[[Path], Path]] = {scan.__name__: scan for scan in (image, colour, volume, floats, head)}


def _tiff(path: Path, shape: tuple[int, ...], dtype: type) -> Path:
    if not path.exists():
        values = np.random.default_rng(0).integers(0, 200, shape, dtype=dtype)
        tifffile.imwrite(path, values, compression="zlib", photometric="rgb" if len(shape) == 3 else "minisblack")
    return path


def _nifti(path: Path, dtype: type, size: tuple[int, int, int] = (400, 512, 512)) -> Path:
    """Voxels of 0.8 × 0.8 × 2 mm; size: z, y, x."""
    if not path.exists():
        values = np.random.default_rng(0).integers(-500, 500, size, dtype=np.int16).astype(dtype)
        scan = sitk.GetImageFromArray(values)
        scan.SetSpacing((0.8, 0.8, 2.0))
        sitk.WriteImage(scan, str(path))
    return path


def model(folder: Path, width: int, channels: int, spatial_dims: int) -> Path:
    """A Res-UNet of five levels with random weights, as a model directory."""
    path = folder / f"model-{width}-{channels}-{spatial_dims}d"
    if not path.exists():
        network = ResUNet(channels, 2, [width * 2**level for level in range(5)], spatial_dims=spatial_dims)
        network.config = ModelConfig(
            architecture=network.config.architecture,
            input_channels="rgb" if channels == 3 else "grey",
            classes={0: "background", 1: "target"},
        )
        network.save_pretrained(path)
    return path


def measure(arguments: list[str]) -> tuple[float, float, int]:
    """Peak GiB, seconds and exit code of one `resunet predict`."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-P", "-m", "resunet", "predict", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    return usage.ru_maxrss * 1024 / GIB, time.perf_counter() - started, os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widths", default="8")
    parser.add_argument("--memory", default="4")
    parser.add_argument("--scans", default="image,volume")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--spatial-dims", type=int, default=2, choices=(2, 3), help="3: of volumes only")
    parser.add_argument("--tta", action="store_true")
    parser.add_argument("--probabilities", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    switches = [f"--{name}" for name in ("tta", "probabilities") if getattr(given, name)]
    print("| scan | width | --memory | peak GiB | seconds | exit |\n|---|---|---|---|---|---|")
    for width in map(int, given.widths.split(",")):
        for name in given.scans.split(","):
            scan = SCANS[name](given.folder)
            network = model(given.folder, width, 3 if name == "colour" else 1, given.spatial_dims)
            out = given.folder / f"out-{name}-{width}-{given.memory}-{os.getpid()}"
            settings = ["--memory", given.memory, "--precision", given.precision, *switches]
            peak, seconds, code = measure([str(network), str(scan), "--out", str(out), *settings])
            print(f"| {name} | {width} | {given.memory} | {peak:.2f} | {seconds:.0f} | {code} |", flush=True)


if __name__ == "__main__":
    main()
