"""Does reading keep up with learning? Crops a second from the store and from images, beside what the encoder consumes.

    python -m benchmarks.loader FOLDER --hippocampus DATA/hippocampus3d --images DATA/brain_tumor_128

FOLDER is filled with synthetic volumes of 155×240×240 int16 (as large as those of BraTS, in air) and with a store; it may be
kept for the next time. A crop is a window of a slice as pretraining reads it, normalised, of up to 512².
The encoder is Res-UNet's at full width on two views of 96², in bfloat16 and channels_last, with 2 threads. Medians of --repeats.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from PIL import Image

from pretrain.loader import ContrastiveSets, reading
from pretrain.network import PretrainingNetwork
from pretrain.objective import contrast, nt_xent
from pretrain.recipe import PretrainRecipe
from pretrain.views import make_views
from resunet.config import DataSettings, validate
from resunet.data.preparing import prepare_scans
from resunet.data.scans import Scans
from resunet.data.source import open_source
from resunet.data.store import Store
from resunet.encoder import ResidualEncoder

BATCH = 32


def write_volumes(folder: Path, count: int) -> Path:
    """Smooth noise in an ellipsoid of air: it compresses about as scans do."""
    folder.mkdir(parents=True, exist_ok=True)
    z, y, x = np.ogrid[-1:1:155j, -1:1:240j, -1:1:240j]
    inside = (z / 0.9) ** 2 + (y / 0.75) ** 2 + (x / 0.6) ** 2 < 1
    for i in range(count):
        path = folder / f"volume{i:02}.nii.gz"
        if path.exists():
            continue
        rng = np.random.default_rng(i)
        coarse = sitk.GetImageFromArray(rng.normal(600, 250, (20, 30, 30)).astype(np.float32))
        size = (240, 240, 155)
        spacing = [(n - 1) / (m - 1) for n, m in zip(coarse.GetSize(), size, strict=True)]
        smooth = sitk.GetArrayFromImage(sitk.Resample(coarse, size, sitk.Transform(), sitk.sitkLinear, (0, 0, 0), spacing))
        values = np.where(inside, smooth.clip(50) + rng.normal(0, 20, smooth.shape), 0).clip(0).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    return folder


def write_images(folder: Path, side: int, count: int) -> Path:
    """8-bit PNGs of blobs and noise."""
    folder = folder / f"png{side}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        blobs = Image.fromarray(rng.integers(0, 230, (16, 16), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        Image.fromarray(np.asarray(blobs) // 2 + rng.integers(0, 12, (side, side), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def recipe_of(source: Path, store: Path) -> PretrainRecipe:
    data = {"source": str(source), "store": str(store)}
    return validate(PretrainRecipe, {"out": "unused", "steps": 1, "batch": BATCH, "data": data}, "benchmark")


def prepared(recipe: PretrainRecipe) -> Scans:
    """The scans of a source, whatever its split, the store filled."""
    assert recipe.data.store is not None
    cases = open_source(DataSettings(source=recipe.data.source), masks=False).cases
    store = Store(recipe.data.store)
    started = time.perf_counter()
    its = list(prepare_scans(cases, "grey", recipe.normalisation, store))
    seconds = time.perf_counter() - started
    decoded = sum(one.decoded for one in its)
    print(f"{recipe.data.source.name}: {len(cases)} scans prepared in {seconds:.1f} s, {decoded} decoded into the store")
    return Scans(cases, its, "grey", recipe.normalisation, store)


def crops_a_second(scans: Scans, recipe: PretrainRecipe, workers: int, seconds: float) -> float:
    """From the first set on: starting workers is not counted."""
    sets = ContrastiveSets(scans, recipe, 0)
    with reading(sets, range(10**6), workers, pin=False) as reader:
        for _ in range(2 * workers + 1):
            next(reader)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            next(reader)
            count += BATCH
        return count / (time.perf_counter() - started)


def views_a_second(recipe: PretrainRecipe, seconds: float) -> float:
    """Scans of 240² whose two views are made, by the rank itself."""
    scans, sizes = torch.randn(BATCH, 1, 240, 240), torch.full((BATCH, 2), 240)
    anchors = torch.full((BATCH, 2, 2), 120)
    generator = torch.Generator().manual_seed(0)
    return rate(lambda: make_views(scans, sizes, anchors, recipe.views, generator), seconds)


def consumed(recipe: PretrainRecipe, train: bool, seconds: float) -> float:
    """Scans a second through the encoder: a whole optimiser step, or forward only."""
    torch.manual_seed(0)
    network = PretrainingNetwork(ResidualEncoder(in_channels=1), recipe.head).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    criterion = nt_xent(recipe.temperature)
    side = recipe.views.size
    views = torch.randn(2 * BATCH, 1, side, side).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
            embedding, projection = network(views)[:2]
        if train:
            optimizer.zero_grad()
            contrast(embedding, projection, criterion)["loss"].backward()
            optimizer.step()

    return rate(step, seconds)


def rate(step: Callable[[], object], seconds: float) -> float:
    step()
    started = time.perf_counter()
    for done in itertools.count(1):
        step()
        if (passed := time.perf_counter() - started) > seconds:
            return done * BATCH / passed
    raise AssertionError


def median(measure: Callable[[], float], repeats: int) -> float:
    return statistics.median(measure() for _ in range(repeats))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hippocampus", type=Path)
    parser.add_argument("--images", type=Path, nargs="*", default=[])
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024, 1100], help="of synthetic PNGs")
    parser.add_argument("--volumes", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(2)
    sources = [write_volumes(chosen.folder / "volumes", chosen.volumes)]
    sources += [chosen.hippocampus] if chosen.hippocampus else []
    sources += [*chosen.images, *(write_images(chosen.folder, side, BATCH) for side in chosen.sides)]
    print(f"load of the machine before: {', '.join(f'{load:.1f}' for load in os.getloadavg())}; {os.cpu_count()} cores")
    recipe = recipe_of(sources[0], chosen.folder / "store")
    print(f"views made: {median(lambda: views_a_second(recipe, chosen.seconds), chosen.repeats):.0f} scans a second")
    needed = {
        name: median(lambda train=train: consumed(recipe, train, chosen.seconds), chosen.repeats)
        for name, train in (("training", True), ("forward", False))
    }
    print("encoder consumes " + ", ".join(f"{value:.1f} scans a second {name}" for name, value in needed.items()))
    for source in sources:
        its = recipe_of(source, chosen.folder / "store")
        scans = prepared(its)
        for workers in (0, 1, 2):
            found = median(
                lambda its=its, scans=scans, w=workers: crops_a_second(scans, its, w, chosen.seconds), chosen.repeats
            )
            times = ", ".join(f"{found / value:.1f} × {name}" for name, value in needed.items())
            print(f"  {source.name}, {workers} workers: {found:.0f} crops a second ({times})", flush=True)
    print(f"load of the machine after: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
