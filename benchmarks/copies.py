"""The copy attack: are copies of test images found in an archive, and are look-alikes left in peace?

    python -m benchmarks.copies DATA_DIR [--rows 1000000] [--held-out 10000]

DATA_DIR holds the 2D sets (images/, splits.json). Copies of all test images of brain_tumor_128 and neu_seg are planted
among the pool and val images of every set, and searched as `resunet index --check` does it: hashes, then thumbnails.
"By hash" is what is left where no thumbnails are at hand. The thresholds are those in resunet, which were set with all
of these images in view. The calibration shows what thresholds the test images with even numbers alone would have set,
and how they do on the odd ones, with neighbouring slices among the look-alikes. Beyond the target are attacks that
nothing was tuned for. At the end the search is timed, in a process of its own, on mixtures of real hashes.
"""

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resunet.data.perceptual import HASH_BYTES, LIMIT, RADIUS, Look, correlations, find_candidates, is_copy, look

SETS = ("brain_tumor_128", "neu_seg", "dsb2018", "cxr_montgomery", "em_membrane")
TARGET = SETS[:2]
Attack = Callable[[Image.Image, int], Image.Image]
ROTATIONS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
FLIPS = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)


def jpeg(image: Image.Image, number: int, quality: int = 75) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert(image.mode)


def resize(image: Image.Image, number: int, factor: float = 0.8) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def crop(image: Image.Image, number: int, share: float) -> Image.Image:
    """A corner or the middle."""
    width, height = round(image.width * share), round(image.height * share)
    left, top = ((image.width - width) * (number % 3) // 2, (image.height - height) * (number // 3 % 3) // 2)
    return image.crop((left, top, left + width, top + height))


def levels(change: Callable[[NDArray], NDArray]) -> Attack:
    def attack(image: Image.Image, number: int) -> Image.Image:
        changed = change(np.asarray(image, np.float64) / 255)
        return Image.fromarray(np.rint(changed.clip(0, 1) * 255).astype(np.uint8))

    return attack


def clip(values: NDArray) -> NDArray:
    low, high = np.quantile(values, [0.01, 0.99])
    return np.asarray((values - low) / max(high - low, 1 / 255))


ATTACKS: dict[str, Attack] = {
    "JPEG 75": jpeg,
    "resized 80 %": resize,
    "rotated": lambda image, number: image.transpose(ROTATIONS[number % 3]),
    "flipped": lambda image, number: image.transpose(FLIPS[number % 2]),
}
BEYOND: dict[str, Attack] = {
    "JPEG 40": functools.partial(jpeg, quality=40),
    "resized 50 %": functools.partial(resize, factor=0.5),
    "resized 200 %": functools.partial(resize, factor=2),
    "brightness 1.3": levels(lambda values: values * 1.3),
    "contrast 1.3": levels(lambda values: (values - values.mean()) * 1.3 + values.mean()),
    "gamma 1.3": levels(lambda values: values**1.3),
    "clipped 1–99 %": levels(clip),
    "negative": levels(lambda values: 1 - values),
    "cropped to 95 %": functools.partial(crop, share=0.95),
    "cropped to 90 %": functools.partial(crop, share=0.9),
}


def combined(first: Attack, second: Attack) -> Attack:
    return lambda image, number: second(first(image, number), number)


def attacks() -> dict[str, Attack]:
    pairs = {f"{a}, {b}": combined(ATTACKS[a], ATTACKS[b]) for a, b in itertools.permutations(ATTACKS, 2)}
    return ATTACKS | pairs


def seen(image: Image.Image) -> Look:
    values = np.asarray(image)
    return look(values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0))


class Part:
    """Looks of some images, and what they are called."""

    def __init__(self, names: list[str], looks: Iterable[Look]) -> None:
        self.names, self.looks = names, list(looks)
        self.hashes = np.frombuffer(b"".join(one.hash for one in self.looks), np.uint8).reshape(-1, HASH_BYTES)

    def __add__(self, other: "Part") -> "Part":
        return Part(self.names + other.names, self.looks + other.looks)


def load(folder: Path, parts: tuple[str, ...]) -> tuple[list[str], list[Image.Image]]:
    splits = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    stems = [stem for part in parts for stem in splits[part]]
    return [f"{folder.name}/{stem}" for stem in stems], [Image.open(folder / "images" / f"{stem}.png") for stem in stems]


def pairs_of(
    archive: Part, held_out: Part, radius: float = RADIUS, limit: int = LIMIT
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    one, other, distance = find_candidates(archive.hashes, held_out.hashes, radius, limit)
    agreement = correlations([archive.looks[i].thumbnail for i in one], [held_out.looks[i].thumbnail for i in other])
    return one, other, distance, agreement


def nearest(part: Part, others: Part, skip_same: bool = False) -> tuple[NDArray, NDArray]:
    """Smallest distance and highest correlation of each image of a part among others, if wished but itself."""
    one, other, distance, agreement = pairs_of(part, others, radius=200.0, limit=32)
    names, among = np.array(part.names), np.array(others.names)
    kept = (names[one] != among[other]) | (not skip_same)
    closest, best = np.full(len(names), np.inf), np.zeros(len(names))
    np.minimum.at(closest, one[kept], distance[kept])
    np.maximum.at(best, one[kept], agreement[kept])
    return closest, best


def show_found(held_out: Part, copies: dict[str, Part], honest: Part) -> None:
    """The target: one archive of honest images and copies, searched once."""
    planted = functools.reduce(Part.__add__, copies.values())
    archive = honest + planted
    one, other, distance, agreement = pairs_of(archive, held_out)
    verified, alone = is_copy(distance, agreement), is_copy(distance, None)
    owner = np.array([held_out.names.index(name) for name in planted.names])
    is_planted = one >= len(honest.names)
    right = is_planted & (owner[np.where(is_planted, one - len(honest.names), 0)] == other)
    hits = {}
    for kind, flagged in (("verified", verified), ("by hash", alone)):
        hits[kind] = np.zeros(len(planted.names), bool)
        hits[kind][one[right & flagged] - len(honest.names)] = True
    print(f"{'found: set, attack':55} {'copies':>7} {'verified':>9} {'by hash':>9}")
    sets = np.array([name.split("/")[0] for name in planted.names])
    label = np.concatenate([[attack] * len(part.names) for attack, part in copies.items()])
    rows = [(f"{name}: {attack}", (sets == name) & (label == attack)) for name in TARGET for attack in copies]
    for title, chosen in [*rows, ("all", np.ones(len(sets), bool))]:
        shares = " ".join(f"{100 * hits[kind][chosen].mean():8.2f}%" for kind in hits)
        print(f"{title:55} {chosen.sum():7d} {shares}")
    print(f"\n{'accused: honest images of':55} {'images':>7} {'verified':>9} {'by hash':>9}")
    origin = np.array([name.split("/")[0] for name in honest.names])
    for title, chosen in [(name, origin == name) for name in SETS] + [("all", np.ones(len(origin), bool))]:
        counts = [
            len(np.unique(one[flagged & ~is_planted & chosen[np.where(is_planted, 0, one)]])) for flagged in (verified, alone)
        ]
        print(f"{title:55} {chosen.sum():7d} {counts[0]:9d} {counts[1]:9d}")
    for i in np.flatnonzero((verified | alone) & ~is_planted):
        print(
            f"  {honest.names[one[i]]} – {held_out.names[other[i]]}: distance {distance[i]:.1f}, correlation {agreement[i]:.4f}"
        )
    print(f"{(~is_planted).sum()} honest candidates for {len(honest.names)} images")


def show_margins(tests: dict[str, Part], copies: dict[str, dict[str, Part]], rest: dict[str, Part], honest: Part) -> None:
    """How far true copies are from the nearest image that is none."""
    print(f"\n{'margins':16} {'':26} {'distance':>32}   {'correlation':>32}")
    for name, test in tests.items():
        length = np.concatenate([distances(part, test) for part in copies[name].values()])
        value = np.concatenate([agreements(part, test) for part in copies[name].values()])
        print(
            f"{name:16} {'copies (50, 99, 100 %)':26} {quantiles(length, (0.5, 0.99, 1))}   {quantiles(value, (0.5, 0.01, 0))}"
        )
        for title, (close, alike) in (
            ("test to all pool and val", nearest(test, honest)),
            ("any to any of its set", nearest(rest[name] + test, rest[name] + test, skip_same=True)),
        ):
            print(
                f"{'':16} {title + ' (50, 1, 0 %)':26} {quantiles(close, (0.5, 0.01, 0))}   {quantiles(alike, (0.5, 0.99, 1))}"
            )


def show_calibration(tests: dict[str, Part], copies: dict[str, dict[str, Part]], rest: dict[str, Part]) -> None:
    """Thresholds midway between copies and look-alikes (but the nearest 0.1 %) of the even half, tried on the odd half."""
    far: dict[int, list[NDArray]] = {0: [], 1: []}
    low: dict[int, list[NDArray]] = {0: [], 1: []}
    near: dict[int, list[NDArray]] = {0: [], 1: []}
    alike: dict[int, list[NDArray]] = {0: [], 1: []}
    for name in TARGET:
        close, best = nearest(tests[name], rest[name] + tests[name], skip_same=True)
        for half in (0, 1):
            near[half].append(close[half::2])
            alike[half].append(best[half::2])
            for part in copies[name].values():
                far[half].append(distances(part, tests[name])[half::2])
                low[half].append(agreements(part, tests[name])[half::2])
    distance = (max(map(np.max, far[0])) + np.quantile(np.concatenate(near[0]), 0.001, method="higher")) / 2
    agreement = (min(map(np.min, low[0])) + np.quantile(np.concatenate(alike[0]), 0.999, method="lower")) / 2
    found = np.concatenate(far[1]) <= distance, np.concatenate(low[1]) >= agreement
    accused = np.concatenate(near[1]) <= distance, np.concatenate(alike[1]) >= agreement
    print(
        f"\n{'calibrated on even':20} {'threshold':>10} {'odd: copies found':>18} {'odd: test images with accused look-alike':>42}"
    )
    for title, value, right, wrong in zip(("distance", "correlation"), (distance, agreement), found, accused, strict=True):
        print(f"{title:20} {value:10.4f} {100 * right.mean():17.2f}% {wrong.sum():35d} of {len(wrong)}")


def agreements(part: Part, other: Part) -> NDArray:
    return correlations([one.thumbnail for one in part.looks], [one.thumbnail for one in other.looks])


def distances(part: Part, other: Part) -> NDArray:
    return np.asarray(np.linalg.norm(part.hashes.astype(np.float64) - other.hashes, axis=1))


def quantiles(values: NDArray, levels: tuple[float, ...]) -> str:
    return " ".join(f"{np.quantile(values, level, method='nearest'):10.4f}" for level in levels)


def show_beyond(tests: dict[str, Part], images: dict[str, list[Image.Image]]) -> None:
    print(f"\n{'beyond the target':40} {'verified':>9} {'by hash':>9}")
    for name, (title, attack) in itertools.product(TARGET, BEYOND.items()):
        part = Part(tests[name].names, [seen(attack(image, i)) for i, image in enumerate(images[name])])
        length = distances(part, tests[name])
        value = agreements(part, tests[name])
        shares = [100 * is_copy(length, value).mean(), 100 * is_copy(length, None).mean()]
        print(f"{name + ': ' + title:40} {shares[0]:8.1f}% {shares[1]:8.1f}%")


def show_cost(image: Image.Image) -> None:
    print(f"\n{'cost':10} {'PNG decoding':>14} {'look':>10}  ms")
    for side in (128, 256, 512, 1024):
        file = io.BytesIO()
        image.resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
        values = np.asarray(Image.open(file))[None]
        figures = []
        for run in (lambda file=file: np.asarray(Image.open(io.BytesIO(file.getvalue()))), lambda values=values: look(values)):
            times = []
            for _ in range(50):
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
            figures.append(1000 * float(np.median(times)))
        print(f"{side}²{'':6} {figures[0]:14.3f} {figures[1]:10.3f}")


def mixtures(hashes: NDArray[np.uint8], count: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Hashes like real ones: on the way from one to another, with noise."""
    made = np.empty((count, hashes.shape[1]), np.uint8)
    for start in range(0, count, 10000):
        part = made[start : start + 10000]
        one, other = hashes[random.integers(len(hashes), size=(2, len(part)))]
        weight = random.random((len(part), 1), np.float32)
        part[:] = noisy(weight * one + (1 - weight) * other, 2, random)
    return made


def noisy(hashes: NDArray, spread: float, random: np.random.Generator) -> NDArray[np.uint8]:
    noise = random.standard_normal(hashes.shape, np.float32) * spread
    return np.asarray(np.rint(hashes + noise).clip(0, 255), np.uint8)


def time_search(hashes: NDArray[np.uint8], rows: int, held_out: int) -> None:
    random = np.random.default_rng(0)
    tests = mixtures(hashes, held_out, random)
    archive = mixtures(hashes, rows, random)
    places = random.choice(rows, min(rows, held_out), replace=False)
    archive[places] = noisy(tests[: len(places)], 1.5, random)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    one, other, _ = find_candidates(archive, tests)
    seconds = time.perf_counter() - started
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    recovered = np.mean([(int(place), i) in pairs for i, place in enumerate(places)])
    checked = archive[:2000].astype(np.float32)
    squared = (checked**2).sum(1)[:, None] + (tests.astype(np.float32) ** 2).sum(1) - 2 * checked @ tests.astype(np.float32).T
    brute = sum(min(int(count), LIMIT) for count in (squared <= RADIUS**2).sum(1))
    print(
        f"\nsearch {rows} × {held_out}: {seconds:.1f} s, {extra:.2f} GiB beside the hashes, {len(one)} candidates; "
        f"planted and found {100 * recovered:.2f} %; of the first {len(checked)} rows {(one < len(checked)).sum()} candidates, "
        f"brute force {brute}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--held-out", type=int, default=10_000)
    options = parser.parse_args()
    images, tests, rest, copies = {}, {}, {}, {}
    for name in SETS:
        names, opened = load(options.data / name, ("pool", "val"))
        rest[name] = Part(names, map(seen, opened))
        names, images[name] = load(options.data / name, ("test",))
        tests[name] = Part(names, map(seen, images[name]))
        copies[name] = {
            title: Part(names, [seen(attack(image, i)) for i, image in enumerate(images[name])])
            for title, attack in attacks().items()
        }
    honest = functools.reduce(Part.__add__, rest.values())
    held_out = functools.reduce(Part.__add__, (tests[name] for name in TARGET))
    planted = {title: functools.reduce(Part.__add__, (copies[name][title] for name in TARGET)) for title in attacks()}
    show_found(held_out, planted, honest)
    show_margins(tests, copies, rest, honest)
    show_calibration(tests, copies, rest)
    show_beyond(tests, images)
    show_cost(images["cxr_montgomery"][0])
    searching = multiprocessing.get_context("spawn").Process(
        target=time_search, args=(honest.hashes, options.rows, options.held_out)
    )
    searching.start()
    searching.join()
    raise SystemExit(searching.exitcode)


if __name__ == "__main__":
    main()
