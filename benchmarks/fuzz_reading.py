"""Damaged files: none may crash, hang or end in a traceback; each is read, or rejected with a reason.

    python -m benchmarks.fuzz_reading DATA_DIR [--count 2000] [--seed 0] [--keep DIR]

Real files of all sets, some re-encoded first (TIFF, JPEG, BMP, NRRD, MetaImage), are cut off, have bits flipped or blocks
zeroed, and are renamed. `read_scan` and `read_header` run in a child process with a limit on time and memory. Exits with 1 if
one crashed, hung, ended in a traceback, or was rejected without its path.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image

import resunet.data.images  # noqa: F401 (once, not in every child)
from resunet.data.dicom import read_header
from resunet.data.images import read_scan, sniff
from resunet.errors import InputError

SECONDS = 20
MEMORY = 6 * 2**30
SUFFIXES = ("", ".png", ".jpg", ".tif", ".bmp", ".nii", ".nii.gz", ".nrrd", ".mha", ".dcm", ".txt", ".847")
READ, REJECTED, TRACEBACK, NO_PATH = 0, 10, 11, 12


def originals(data: Path) -> list[list[Path]]:
    """Files by set, so that small sets are damaged as often as large ones."""
    sets = [
        sorted((folder / "images").glob("*")) or sorted(folder.glob("*"))
        for folder in sorted(data.iterdir())
        if folder.is_dir()
    ]
    return [[path for path in files if path.name not in ("SOURCE.txt", "index.csv")] for files in sets]


def encoded(path: Path, folder: Path, chance: random.Random) -> Path:
    """The file, or what it holds in another format."""
    if path.suffix == ".png" and chance.random() < 0.6:
        values = np.asarray(Image.open(path).convert(chance.choice(["L", "RGB"])))
        target = folder / f"encoded{chance.choice(['.tif', '.jpg', '.bmp'])}"
        if target.suffix == ".tif":
            tifffile.imwrite(target, values, compression=chance.choice([None, "lzw", "zlib", "jpeg", "zstd", "packbits"]))
        else:
            Image.fromarray(values).save(target)
        return target
    if ".nii" in path.name and chance.random() < 0.6:
        target = folder / f"encoded{chance.choice(['.nrrd', '.mha', '.nii'])}"
        sitk.WriteImage(sitk.ReadImage(str(path)), str(target), useCompression=chance.random() < 0.5)
        return target
    return path


def damage(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    data = bytearray(content)
    kind = chance.choice(["cut", "flip", "flip the head", "zero", "cut and flip", "rename", "insert"])
    if "cut" in kind:
        del data[chance.randrange(len(data)) :]
    if "flip" in kind and data:
        end = min(len(data), 2048) if "head" in kind else len(data)
        for _ in range(chance.choice([1, 2, 8, 64])):
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    if kind == "zero":
        start = chance.randrange(len(data))
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    if kind == "insert":
        start = chance.randrange(len(data))
        data[start:start] = chance.randbytes(chance.choice([1, 2, 100]))
    return bytes(data), kind


def child(path: Path) -> int:
    try:
        if sniff(path) == "dicom":
            with contextlib.suppress(InputError):
                read_header(path)
        read_scan(path, None)
    except InputError as error:
        sys.stdout.write(str(error).replace(str(path), "FILE") + "\n")
        return REJECTED if str(error).startswith(f"{path}: ") else NO_PATH
    except BaseException as error:
        import traceback

        sys.stdout.write(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return TRACEBACK
    return READ


def read_isolated(path: Path) -> tuple[str, str, str]:
    """What happened, the reason, and what a library printed."""
    inbox, outbox = os.pipe()
    noise = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the loop)
    pid = os.fork()
    if pid == 0:
        os.dup2(noise.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdout = io.StringIO()
        code = child(path)
        os.write(outbox, sys.stdout.getvalue().encode("utf-8", "replace")[:4000])
        os._exit(code)
    os.close(outbox)
    if not select.select([inbox], [], [], SECONDS)[0]:
        os.kill(pid, signal.SIGKILL)
    said = os.read(inbox, 4096).decode()
    os.close(inbox)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    noise.seek(0)
    printed = noise.read().decode("utf-8", "replace").strip()
    names = {READ: "read", REJECTED: "rejected", TRACEBACK: "traceback", NO_PATH: "no path", -signal.SIGKILL: "hung"}
    return names.get(status, f"crashed ({status})"), said.strip(), printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where files that brought a reader down are kept")
    arguments = parser.parse_args()
    sets = originals(arguments.data)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    noises: Counter[str] = Counter()
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(arguments.count):
            chance = random.Random(f"{arguments.seed}/{number}")
            original = chance.choice(chance.choice(sets))
            source = encoded(original, folder, chance)
            content, kind = damage(source.read_bytes(), chance)
            suffix = chance.choice(SUFFIXES) if kind == "rename" or chance.random() < 0.2 else "".join(source.suffixes[-2:])
            path = folder / f"damaged{number}{suffix}"
            path.write_bytes(content)
            began = time.perf_counter()
            outcome, reason, printed = read_isolated(path)
            slowest = max(slowest, (time.perf_counter() - began, f"{number}: {original.name}, {kind}"))
            outcomes[outcome] += 1
            if outcome == "rejected":
                reasons[" ".join("#" if word.isdigit() else word for word in reason.removeprefix("FILE: ").split()[:8])] += 1
            if printed:
                noises[printed.splitlines()[0][:100]] += 1
            if outcome not in ("read", "rejected"):
                print(
                    f"{number}: {outcome}: {original.name}, {kind}, {source.suffix} as {suffix!r}\n{reason}\n{printed[-400:]}",
                    flush=True,
                )
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, arguments.keep)
            path.unlink()
    print(json.dumps(outcomes))
    print(f"slowest: {slowest[0]:.1f} s, {slowest[1]}")
    print("\nreasons of rejection")
    for reason, count in reasons.most_common():
        print(f"  {count:5d}  {reason}")
    print(f"\nprinted by libraries: {sum(noises.values())} files")
    for line, count in noises.most_common():
        print(f"  {count:5d}  {line}")
    return 0 if set(outcomes) <= {"read", "rejected"} else 1


if __name__ == "__main__":
    sys.exit(main())
