"""A video, frame by frame, through whatever segments an image: an overlay video, masks if asked for, and how long it took.

Frames come one at a time from PyAV and go as they come, so that memory does not grow with the length. They are turned upright where
the file says that players do. Imports no torch, and PyAV only when there is a video.
"""

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resunet.data.images import with_channels
from resunet.errors import EnvironmentFault, InputError
from resunet.files import folder_aside, write_text
from resunet.inference.masks import Prediction, palette, write_prediction
from resunet.inference.predict import Behaviour, refuse_full
from resunet.progress import progress, say

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".ogv", ".flv")
WARM_UP = 3  # of the first frame, before any is timed
_OPACITY = 0.5
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that PyAV's build has; H.264 plays everywhere
_OPTIONS = {"libx264": {"preset": "veryfast", "crf": "20", "tune": "zerolatency"}}  # which holds no frames back
_PERCENTILES = (50, 95, 99)

Rgb = NDArray[np.uint8]
Segment = Callable[[NDArray], NDArray[np.uint8]]  # (C, y, x) of a frame, not normalised → its class indices (y, x)


@dataclass(frozen=True)
class Frame:
    """rgb: (y, x, 3), upright. time: in seconds from the start of the stream."""

    rgb: Rgb
    time: Fraction


@dataclass(frozen=True)
class Video:
    """A stream of frames. count: how many its file says there are; 0 where it does not."""

    frames: Iterator[Frame]
    rate: Fraction
    count: int


def is_video(path: Path) -> bool:
    """By the ending of its name."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def only_video(inputs: Iterable[Path]) -> Path | None:
    """The video that is to be predicted; None if there is none among the inputs.

    Raises:
        InputError: a video and something else.
    """
    paths = list(inputs)
    videos = [path for path in paths if is_video(path)]
    if not videos:
        return None
    if len(paths) > 1:
        raise InputError(f"INPUT {videos[0]}: a video is predicted alone, here are {len(paths)} inputs. Name it by itself.")
    return videos[0]


def refuse_for_video(video: Path, probabilities: bool, ranks: int) -> None:
    """Raises InputError where what is asked for is not for videos."""
    if probabilities:
        raise InputError(f"--probabilities: {video} is a video, of which overlays and, with --masks, labels are written.")
    if ranks != 1:
        raise InputError(
            f"{video}: a video is predicted by one process, here are {ranks}. Start resunet predict without a launcher."
        )


def predict_video(
    video: Path, out: Path, segment: Segment, behaviour: Behaviour, masks: bool, about: Mapping[str, Any]
) -> Path:
    """Write OUT/NAME.overlay.mp4, OUT/NAME.timing.json and, with `masks`, OUT/NAME.masks/000000.png …; all or nothing. `out`.

    Masks are those of `resunet predict` on the frames as images. Sound is left out.

    Args:
        out: a folder that does not exist, or is empty.
        about: what stands in the timing beside the figures: what computed the scores.

    Raises:
        InputError: `out`; a file that is missing, empty, broken or no video; another number of channels.
        EnvironmentFault: PyAV is not installed.
    """
    refuse_full(out)
    av = _pyav(video)
    latencies: list[float] = []
    started = time.perf_counter()
    with open_video(video, av) as opened, folder_aside(out) as aside:
        target = aside / f"{video.stem}.overlay.mp4"
        first, frames = _peek(opened.frames, video)
        for _ in range(WARM_UP):
            _timed(segment, first.rgb, behaviour, video)
        warm = time.perf_counter() - started
        with _writer(target, av, first, opened.rate) as write:
            for number, frame in enumerate(progress(frames, opened.count, "predict", quiet=not opened.count)):
                labels, seconds = _timed(segment, frame.rgb, behaviour, video)
                latencies.append(seconds)
                write(overlaid(frame.rgb, labels, behaviour.classes), frame.time)
                if masks:
                    made = Prediction(labels, behaviour.classes, (video,), "png", "", behaviour.weights)
                    write_prediction(made, aside / f"{video.stem}.masks", f"{number:06}")
        size = (first.rgb.shape[1], first.rgb.shape[0])
        timing = timing_of(latencies, time.perf_counter() - started - warm, size, about)
        write_text(aside / f"{video.stem}.timing.json", json.dumps(timing, indent=2) + "\n")
    say(_told(timing))
    return out


def _timed(segment: Segment, rgb: Rgb, behaviour: Behaviour, video: Path) -> tuple[NDArray[np.uint8], float]:
    """The labels of a frame, and the seconds from its pixels to its labels."""
    started = time.perf_counter()
    try:
        labels = segment(channels_of(rgb, behaviour.input_channels, video))
    except InputError as error:
        raise error if str(error).startswith(str(video)) else InputError(f"{video}: {error}") from error
    return labels, time.perf_counter() - started


def channels_of(rgb: Rgb, channels: str | int, video: Path) -> NDArray:
    """(y, x, 3) → (C, y, x) as `read_scan` would give it of an image; a frame without colour is a grey one."""
    values = np.ascontiguousarray(np.moveaxis(rgb, -1, 0))
    grey = bool((values[0] == values[1]).all() and (values[0] == values[2]).all())
    return with_channels(values[:1] if grey and channels != 3 else values, channels, video)


def overlaid(rgb: Rgb, labels: NDArray[np.uint8], classes: Mapping[int, str]) -> Rgb:
    """A frame with every class but the first in the colour that it has in masks."""
    colours = palette(dict(enumerate(classes.values()))).astype(np.float32)
    marked = labels != 0
    out = rgb.copy()
    out[marked] = (1 - _OPACITY) * rgb[marked] + _OPACITY * colours[labels[marked]]
    return out


def timing_of(latencies: list[float], seconds: float, size: tuple[int, int], about: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of NAME.timing.json.

    latency_ms, frames_per_second: of one frame at a time, from its pixels to its labels. overall_frames_per_second: with decoding,
    drawing and writing.
    """
    its = np.asarray(latencies) * 1000
    found = {f"p{percent}": round(float(np.percentile(its, percent)), 3) for percent in _PERCENTILES}
    return {
        "frames": len(latencies),
        "width": size[0],
        "height": size[1],
        "batch": 1,
        "warm_up": WARM_UP,
        "latency_ms": found | {"mean": round(float(its.mean()), 3)},
        "frames_per_second": round(1000 / float(its.mean()), 3),
        "overall_frames_per_second": round(len(latencies) / seconds, 3),
        **about,
        "machine": platform.machine(),
    }


def _told(timing: Mapping[str, Any]) -> str:
    latency = ", ".join(f"p{percent} {timing['latency_ms'][f'p{percent}']:.1f}" for percent in _PERCENTILES)
    return (
        f"{timing['frames']} frames of {timing['width']} × {timing['height']}, one at a time: {latency} ms, "
        f"{timing['frames_per_second']:.1f} frames a second; {timing['overall_frames_per_second']:.1f} with decoding and writing"
    )


@contextmanager
def open_video(path: Path, av: ModuleType) -> Iterator[Video]:
    """The first video stream of a file.

    Raises:
        InputError: it cannot be read, or holds none; also while frames are taken.
    """
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a video: {_reason(error)}.") from error
    with closing(container):
        if not container.streams.video:
            raise InputError(f"{path}: holds no video. Was it cut off, or is it sound only?")
        stream = container.streams.video[0]
        rate = Fraction(stream.guessed_rate or stream.average_rate or 25)
        length = container.duration / av.time_base if container.duration else 0
        yield Video(_frames(path, container, rate, av), rate, stream.frames or int(length * rate))


def _frames(path: Path, container: Any, rate: Fraction, av: ModuleType) -> Iterator[Frame]:
    done, last = 0, Fraction(-1)
    try:
        for frame in container.decode(video=0):
            upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
            # raw streams have no times, and broken ones go back in them
            at = last + 1 / rate if frame.pts is None else Fraction(frame.pts) * frame.time_base
            last = at if at > last else last + 1 / rate
            yield Frame(np.ascontiguousarray(upright), last)
            done += 1
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: cannot be decoded beyond its first {done} frames: {_reason(error)}.") from error


def _peek(frames: Iterator[Frame], video: Path) -> tuple[Frame, Iterator[Frame]]:
    first = next(frames, None)
    if first is None:
        raise InputError(f"{video}: holds no frame. Was it cut off?")
    return first, itertools.chain([first], frames)


@contextmanager
def _writer(path: Path, av: ModuleType, first: Frame, rate: Fraction) -> Iterator[Callable[[Rgb, Fraction], None]]:
    """Takes pictures and their times. All have the first one's size, made even at the right and below, as H.264 wants it."""
    codec = next(name for name in _ENCODERS if name in av.codecs_available)
    height, width = first.rgb.shape[:2]
    base = Fraction(1, 60_000)  # in which usual rates are whole or nearly so; MPEG-4 counts in no finer
    with closing(av.open(str(path), "w")) as container:
        stream = container.add_stream(codec, rate=rate, options=_OPTIONS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.codec_context.time_base = base
        last = -1

        def write(picture: Rgb, at: Fraction) -> None:
            nonlocal last
            if picture.shape[:2] != (height, width):
                picture = np.asarray(Image.fromarray(picture).resize((width, height)))
            frame = av.VideoFrame.from_ndarray(
                np.pad(picture, [(0, height % 2), (0, width % 2), (0, 0)], "edge"), format="rgb24"
            )
            last = max(last + 1, round((at - first.time) / base))
            frame.pts, frame.time_base = last, base
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode())


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _pyav(video: Path) -> ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise EnvironmentFault(
            f"{video}: reading videos needs PyAV: pip install 'resunet[video]' (or pip install av)."
        ) from error
    module: ModuleType = av
    return module
