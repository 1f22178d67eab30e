"""Which format the store uses: one file a scan of blosc2, or zarr v3 with sharding, by figures.

    python -m benchmarks.store --out DIR [--hippocampus hippocampus3d] [--seconds 1.0] [--cold-disk]

Scans: a CT (240×512×512 int16: a body with smooth organs and noise in air and in the padding around the field of view), an
MRI (155×240×240 int16, black outside the head), and real small volumes in one. Reads are at random places, on one thread:
an axial slice region of 256², a sagittal one, and a crop of 96³ (less where the scan is smaller), with the scan opened for
every read (a training worker may go to another scan each time) and with the handle kept. `--cold-disk` drops the file from the
page cache before each read.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from resunet.data.store import Store, StoredScan

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Format:
    """A way to keep (C, z, y, x): write it to a path, and open that for cropping."""

    name: str
    write: Callable[[Path, NDArray], None]
    open: Callable[[Path], Callable[[Slices], NDArray]]


def blosc(chunk: int, block: tuple[int, int, int], codec: str, level: int, filter: str, mmap: bool = False) -> Format:
    """One .b2nd file; `chunk` is the edge of a chunk in voxels."""
    parameters = blosc2.CParams(
        codec=blosc2.Codec[codec],
        clevel=level,
        filters=[blosc2.Filter[filter]],
        nthreads=1,
        splitmode=blosc2.SplitMode.NEVER_SPLIT,
    )
    reading = blosc2.DParams(nthreads=1)

    def write(path: Path, values: NDArray) -> None:
        chunks = (1, *(min(n, chunk) for n in values.shape[1:]))
        blocks = (1, *(min(n, m) for n, m in zip(chunks[1:], block, strict=True)))
        blosc2.asarray(values, chunks=chunks, blocks=blocks, cparams=parameters, urlpath=str(path), mode="w")

    def open_(path: Path) -> Callable[[Slices], NDArray]:
        opened = blosc2.open(str(path), mode="r", dparams=reading, **({"mmap_mode": "r"} if mmap else {}))
        return lambda slices: opened[slices]

    name = f"blosc2 {chunk}³ / {'×'.join(map(str, block))} {codec.lower()}{level} {filter.lower()}{' mmap' if mmap else ''}"
    return Format(name, write, open_)


def zarr_sharded(chunk: tuple[int, int, int], codec: str, level: int, shuffle: str) -> Format:
    """zarr v3, the scan one shard; without shuffle zarr's own zstd, with it blosc1 inside."""
    import zarr
    from zarr.codecs import BloscCodec, ZstdCodec

    compressor = BloscCodec(cname=codec, clevel=level, shuffle=shuffle) if shuffle else ZstdCodec(level=level)  # type: ignore[arg-type]

    def write(path: Path, values: NDArray) -> None:
        chunks = (1, *(min(n, m) for n, m in zip(values.shape[1:], chunk, strict=True)))
        shards = tuple(-(-n // m) * m for n, m in zip(values.shape, chunks, strict=True))
        array: Any = zarr.create_array(
            path, shape=values.shape, dtype=values.dtype, chunks=chunks, shards=shards, compressors=[compressor], overwrite=True
        )
        array[:] = values

    def open_(path: Path) -> Callable[[Slices], NDArray]:
        opened: Any = zarr.open_array(path, mode="r", zarr_format=3)
        return lambda slices: opened[slices]

    return Format(f"zarr {'×'.join(map(str, chunk))} {codec}{level} {shuffle or 'no shuffle'}", write, open_)


def this_store(slice_axis: int | None) -> Format:
    """What `resunet.data.store` does, checksums and all."""

    def write(path: Path, values: NDArray) -> None:
        Store(path).put("0" * 64, values, {}, slice_axis)

    def open_(path: Path) -> Callable[[Slices], NDArray]:
        return StoredScan(path / "00" / ("0" * 64)).crop

    return Format(
        f"resunet.data.store, {'any crops' if slice_axis is None else f'slices along axis {slice_axis}'}", write, open_
    )


def formats() -> list[Format]:
    """What is compared: block shapes at one codec, then codecs at one shape."""
    cube, flat = (32, 32, 32), (8, 64, 64)
    shapes = [
        blosc(chunk, block, "ZSTD", 1, "BITSHUFFLE")
        for chunk, block in [
            (32, cube),
            (64, cube),
            (128, cube),
            (256, cube),
            (128, (16, 16, 16)),
            (64, (64, 64, 64)),
            (128, flat),
            (128, (1, 128, 128)),
        ]
    ]
    codecs = [
        blosc(128, cube, codec, level, filter)
        for codec, level in [("LZ4", 1), ("LZ4", 5), ("ZSTD", 1), ("ZSTD", 3), ("ZSTD", 5)]
        for filter in ("SHUFFLE", "BITSHUFFLE")
    ]
    codecs.append(blosc(128, (2, 64, 64), "LZ4", 5, "BITSHUFFLE"))
    zarrs = [
        zarr_sharded(cube, "zstd", 1, "bitshuffle"),
        zarr_sharded(cube, "zstd", 5, "bitshuffle"),
        zarr_sharded(cube, "zstd", 1, "shuffle"),
        zarr_sharded(cube, "lz4", 5, "bitshuffle"),
        zarr_sharded((2, 64, 64), "lz4", 5, "bitshuffle"),
        zarr_sharded(cube, "zstd", 1, ""),
        zarr_sharded((64, 64, 64), "zstd", 1, "bitshuffle"),
        zarr_sharded(flat, "zstd", 1, "bitshuffle"),
    ]
    mapped = [blosc(128, cube, "ZSTD", 1, "BITSHUFFLE", mmap=True), blosc(128, cube, "LZ4", 5, "BITSHUFFLE", mmap=True)]
    chosen = {format.name: format for format in [*shapes, *codecs, *mapped, *zarrs, this_store(None), this_store(0)]}
    return list(chosen.values())


def make_ct(size: tuple[int, int, int] = (240, 512, 512)) -> NDArray[np.int16]:
    """A CT-like volume in Hounsfield units, (1, z, y, x): padding −2000 outside the circle, noisy air, body, bones."""
    rng = np.random.default_rng(0)
    coarse = gaussian_filter(rng.normal(size=tuple(n // 8 for n in size)).astype(np.float32), 3)
    organs = zoom(coarse, [n / m for n, m in zip(size, coarse.shape, strict=True)], order=1) / coarse.std()
    z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in size)]
    body = (y / 0.55) ** 2 + (x / 0.8) ** 2 + 0 * z < 1
    values = np.where(body, 40 + 60 * organs, -1000)
    values = np.where(body & (organs > 1.5), 500 + 100 * organs, values)
    values += rng.normal(0, 12, size).astype(np.float32)
    return np.where(y**2 + x**2 + 0 * z < 1, values, -2000).round().astype(np.int16)[None]


def make_mri(size: tuple[int, int, int] = (155, 240, 240)) -> NDArray[np.int16]:
    """A skull-stripped, MRI-like volume, (1, z, y, x)."""
    rng = np.random.default_rng(1)
    smooth = gaussian_filter(rng.normal(size=size).astype(np.float32), 4)
    z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in size)]
    head = (z / 0.9) ** 2 + (y / 0.7) ** 2 + (x / 0.6) ** 2 < 1
    values = 400 + 120 * smooth / smooth.std() + rng.normal(0, 15, size)
    return np.where(head, values.clip(1), 0).round().astype(np.int16)[None]


def read_hippocampus(folder: Path) -> NDArray:
    """One real small volume, (1, z, y, x)."""
    from resunet.data.images import read_scan

    return read_scan(sorted((folder / "images").glob("*.nii.gz"))[0], "grey").values


def places(size: tuple[int, ...], crop: tuple[int, ...], rng: np.random.Generator) -> Slices:
    """A crop of at most `crop` at a random place; all channels."""
    edges = [min(n, m) for n, m in zip(size, crop, strict=True)]
    starts = [int(rng.integers(0, n - m + 1)) for n, m in zip(size, edges, strict=True)]
    return (slice(None), *(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True)))


def rate(read: Callable[[Slices], object], size: tuple[int, ...], crop: tuple[int, ...], seconds: float) -> float:
    """Reads a second."""
    rng = np.random.default_rng(2)
    read(places(size, crop, rng))
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        read(places(size, crop, rng))
        count += 1
    return count / (time.perf_counter() - start)


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget the files below a path, so that the next read is the disk's."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_of(path: Path) -> int:
    """Bytes on disk of a file or of a tree."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hippocampus", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--cold-disk", action="store_true")
    parser.add_argument("--only", default="", help="formats whose name holds this")
    options = parser.parse_args()
    blosc2.set_nthreads(1)
    scans = {"CT": make_ct(), "MRI": make_mri()}
    if options.hippocampus:
        scans["hippocampus"] = read_hippocampus(options.hippocampus)
    crops = {"axial 256²": (1, 256, 256), "sagittal 256²": (256, 256, 1), "96³": (96, 96, 96)}
    options.out.mkdir(parents=True, exist_ok=True)
    for scan, values in scans.items():
        print(
            f"\n{scan} {values.shape} {values.dtype}, {values.nbytes / 1e6:.1f} MB. Reads a second: opened each time / kept.\n"
        )
        print("| format | write s | size | " + " | ".join(crops) + " |\n|---|---|---|" + "---|" * len(crops))
        for format in formats():
            if options.only not in format.name:
                continue
            path = options.out / "scan.b2nd"
            start = time.perf_counter()
            format.write(path, values)
            written = time.perf_counter() - start
            kept = format.open(path)
            assert (kept((slice(None),) * 4) == values).all()

            def opened(slices: Slices, format: Format = format, path: Path = path) -> NDArray:
                if options.cold_disk:
                    drop_from_cache(path)
                return format.open(path)(slices)

            cells = []
            for crop in crops.values():
                cold = rate(opened, values.shape[1:], crop, options.seconds)
                warm = rate(kept, values.shape[1:], crop, options.seconds)
                cells.append(f"{cold:.0f} / {warm:.0f}")
            size = f"{bytes_of(path) / values.nbytes:.0%}"
            print(f"| {format.name} | {written:.2f} | {size} | {' | '.join(cells)} |", flush=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
