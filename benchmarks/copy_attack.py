"""Copies of test images planted in an archive, found by `resunet index --check` as a user would run it.

    python -m benchmarks.copy_attack DATA_DIR WORK_DIR

DATA_DIR holds the sets brain_tumor_128, neu_seg, dsb2018, cxr_montgomery and em_membrane, each with images/ and splits.json. All
test images of the first two are attacked (JPEG quality 75; resized to 80 %; rotated by 90°; flipped; two of these at random) and
stand under new names among the pool and val images of all five. groups.csv is left out: only pixels can tell.
"""

import io
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from resunet.data.manifest import open_manifest

ATTACKED = ("brain_tumor_128", "neu_seg")
SETS = (*ATTACKED, "dsb2018", "cxr_montgomery", "em_membrane")


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def resize(image: Image.Image) -> Image.Image:
    return image.resize((round(image.width * 0.8), round(image.height * 0.8)), Image.Resampling.BICUBIC)


def rotate(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_90)


def flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


ATTACKS = {"jpeg": jpeg, "resize": resize, "rotate": rotate, "flip": flip}


def build(data: Path, work: Path) -> tuple[dict[str, tuple[str, str, str]], int]:
    """Archive and held-out folders; planted file → (set, attack, original), and how many honest images there are."""
    archive, held_out = work / "archive", work / "held_out"
    archive.mkdir(parents=True)
    held_out.mkdir()
    planted: dict[str, tuple[str, str, str]] = {}
    rng, honest, numbers = random.Random(0), 0, itertools.count()
    for name in SETS:
        splits = json.loads((data / name / "splits.json").read_text(encoding="utf-8"))
        paths = {path.stem: path for path in (data / name / "images").iterdir()}
        for stem in splits["pool"] + splits["val"]:
            (archive / f"{next(numbers):06d}{paths[stem].suffix}").symlink_to(paths[stem].resolve())
            honest += 1
        for stem in splits["test"] if name in ATTACKED else []:
            original = held_out / f"{name}-{paths[stem].name}"
            original.symlink_to(paths[stem].resolve())
            image = Image.open(paths[stem])
            pairs = [(attack,) for attack in ATTACKS] + [tuple(rng.sample(sorted(ATTACKS), 2))]
            for attacks in pairs:
                copy = image
                for attack in attacks:
                    copy = ATTACKS[attack](copy)
                path = archive / f"{next(numbers):06d}.{'jpg' if attacks[-1] == 'jpeg' else 'png'}"
                copy.save(path, **({"quality": 75} if attacks[-1] == "jpeg" else {}))
                planted[path.name] = (name, attacks[0] if len(attacks) == 1 else "two combined", original.name)
    return planted, honest


def resunet(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-P", "-m", "resunet", *arguments], stdout=subprocess.DEVNULL).returncode


def main() -> None:
    data, work = Path(sys.argv[1]), Path(sys.argv[2])
    planted, honest = build(data, work)
    archive, held_out, pairs = (work / name for name in ("archive.parquet", "held_out.parquet", "pairs.parquet"))
    for folder, manifest in ((work / "archive", archive), (work / "held_out", held_out)):
        assert resunet("index", str(folder), "--out", str(manifest)) == 0
    code = resunet("index", "--check", str(archive), "--against", str(held_out), "--out", str(pairs))
    one, other = open_manifest(archive), open_manifest(held_out)
    table = pq.read_table(pairs)
    found = {
        (one.files_of(a)[0].name, other.files_of(b)[0].name)
        for a, b in zip(table.column("archive_id").to_pylist(), table.column("held_out_id").to_pylist(), strict=True)
    }
    wanted = Counter((name, attack) for name, attack, _ in planted.values())
    right = Counter((name, attack) for copy, (name, attack, original) in planted.items() if (copy, original) in found)
    for key in sorted(wanted):
        print(f"{key[0]:16} {key[1]:13} {right[key]:5} of {wanted[key]:5} found ({right[key] / wanted[key]:.2%})")
    accused = {copy for copy, _ in found if copy not in planted}
    print(f"all: {sum(right.values())} of {len(planted)} found ({sum(right.values()) / len(planted):.3%}), exit {code}")
    print(f"honest: {len(accused)} of {honest} accused ({len(accused) / honest:.3%})")


if __name__ == "__main__":
    main()
