"""How many awkward DICOM files are read, by whom, and whether the values are the same.

    python -m benchmarks.dicom_files DATA_DIR [--out report.json]

Each file is read in a process of its own by SimpleITK alone, by pydicom with its installed plugins alone (python-gdcm, which
this project does not need, adds lossless JPEG), and by `read_scan`. Prints the counts, our rejects with their reasons, and
every difference in values. References are compared after what the standard prescribes and they leave to the caller: slope,
intercept and palette. MONOCHROME1 is inverted by SimpleITK and by us, not by pydicom.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 60.0  # seconds a file
NO_SCANS = ("SOURCE.txt", "index.csv")


def by_simpleitk(path: Path) -> NDArray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def by_pydicom(path: Path) -> NDArray:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_rescale

    dataset = pydicom.dcmread(path, force=True)
    values = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return apply_color_lut(values, dataset)
    return apply_rescale(values, dataset)


def by_us(path: Path) -> NDArray:
    from resunet.data.images import read_scan

    return np.moveaxis(read_scan(path, None).values, 0, -1)


READERS: dict[str, Callable[[Path], NDArray]] = {"SimpleITK": by_simpleitk, "pydicom": by_pydicom, "ours": by_us}


def read_all(path: Path, queue: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for name, reader in READERS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.perf_counter()
            try:
                found: NDArray | str = np.ascontiguousarray(reader(path))
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
        queue.put((name, found, time.perf_counter() - began))


def read_isolated(path: Path) -> dict[str, Any]:
    """What each reader gave: an array, or why not."""
    found: dict[str, Any] = {}
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=read_all, args=(path, queue))
    process.start()
    try:
        for _ in READERS:
            name, values, _ = queue.get(timeout=LIMIT)
            found[name] = values
    except Exception:
        process.kill()
        process.join()
        for name in READERS:
            found.setdefault(name, f"the process ended or took {LIMIT:.0f} s (exit code {process.exitcode})")
    process.join()
    return found


def differs(ours: NDArray, theirs: NDArray, place: str) -> str | None:
    """How our values differ from a reference's, None if they do not; axes of length 1 and the turn to LPS do not count."""
    theirs = theirs.squeeze()
    ours = ours.squeeze()
    if sorted(ours.shape) != sorted(theirs.shape):
        return f"{place}: shape {ours.shape}, theirs {theirs.shape}"
    a, b = np.sort(ours.astype(np.float64), axis=None), np.sort(theirs.astype(np.float64), axis=None)
    exact = ours.astype(np.float64) if ours.shape == theirs.shape else None
    if exact is not None and np.allclose(exact, theirs.astype(np.float64), rtol=1e-6, atol=0):
        return None
    if exact is not None and ours.ndim == 2:
        share = float((exact != theirs.astype(np.float64)).mean())
        return f"{place}: {share:.1%} of the values, ours {a[0]:g} to {a[-1]:g}, theirs {b[0]:g} to {b[-1]:g}"
    if np.allclose(a, b, rtol=1e-6, atol=0):
        return f"{place}: the same values in another order (turned to LPS, or frames sorted by position)"
    return f"{place}: other values, ours {a[0]:g} to {a[-1]:g}, theirs {b[0]:g} to {b[-1]:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.data.iterdir() if path.name not in NO_SCANS)
    read: dict[str, set[str]] = {name: set() for name in READERS}
    rejects: dict[str, str] = {}
    differences: dict[str, list[str]] = {}
    for path in files:
        found = read_isolated(path)
        for name, values in found.items():
            if not isinstance(values, str):
                read[name].add(path.name)
        ours = found["ours"]
        if isinstance(ours, str):
            rejects[path.name] = ours.removeprefix(f"InputError: {path}: ")
            continue
        said = [differs(ours, found[name], name) for name in ("SimpleITK", "pydicom") if not isinstance(found[name], str)]
        if any(said):
            differences[path.name] = [line or "the other: equal" for line in said]
    either = read["SimpleITK"] | read["pydicom"]
    counts = {name: len(names) for name, names in read.items()} | {"either": len(either), "files": len(files)}
    print(json.dumps(counts))
    print("\nread by a reference and not by us:", sorted(either - read["ours"]) or "none")
    print("read by us alone:", sorted(read["ours"] - either) or "none")
    print(f"\n{len(rejects)} rejects")
    for name, reason in rejects.items():
        print(f"  {name}: {reason}")
    print(f"\n{len(differences)} files whose values differ from a reference's")
    for name, lines in differences.items():
        print(f"  {name}: {'; '.join(lines)}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"counts": counts, "rejects": rejects, "differences": differences}, indent=1))


if __name__ == "__main__":
    main()
