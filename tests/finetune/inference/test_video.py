"""A video is predicted as its frames are; whatever its size, turn, rate or fault. Videos are written here, by PyAV."""

import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resunet.checkpoint import ModelConfig
from resunet.cli import main
from resunet.errors import InputError
from resunet.inference.masks import palette
from resunet.inference.video import is_video, only_video, overlaid, timing_of
from resunet.model import ResUNet

CLASSES = {0: "background", 7: "lesion", 200: "tumour"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str | int, Path]:
    """Networks of random weights whose heads are large, so that all classes are predicted somewhere."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for channels, count, classes in (("grey", 1, 3), ("rgb", 3, 2), (2, 2, 2)):
        torch.manual_seed(0)
        network = ResUNet(count, classes, (4, 4, 8), units=1)
        nn.init.normal_(network.head.weight)
        its = dict(list(CLASSES.items())[:classes])
        network.config = ModelConfig(architecture=network.config.architecture, input_channels=channels, classes=its)
        network.save_pretrained(root / str(channels))
        made[channels] = root / str(channels)
    return made


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Smooth random colours (y, x, 3), so that little is lost in a codec."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8)) for _ in sizes]
    return [np.asarray(one.resize(size[::-1], Image.Resampling.BICUBIC)) for one, size in zip(small, sizes, strict=True)]


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: Fraction = Fraction(10),
    codec: str = "ffv1",
    layout: str = "bgr0",
    rotation: int = 0,
    times: Sequence[int] | None = None,
) -> Path:
    """ffv1 with bgr0 keeps every pixel. times: in frames, where they are uneven."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], layout
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.ndim == 3 else "gray")
            frame.pts, frame.time_base = (times or range(len(frames)))[number], 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames]


def predict(model: Path, video: Path, out: Path, *options: str) -> tuple[list[np.ndarray], dict]:
    """The masks of every frame, and the timing."""
    assert main(["predict", str(model), str(video), "--out", str(out), "--masks", *options]) == 0
    masks = [np.asarray(Image.open(one)) for one in sorted((out / f"{video.stem}.masks").iterdir())]
    return masks, json.loads((out / f"{video.stem}.timing.json").read_text(encoding="utf-8"))


def predicted_images(model: Path, frames: Sequence[np.ndarray], folder: Path, *options: str) -> list[np.ndarray]:
    """What `resunet predict` makes of the frames as images."""
    (folder / "in").mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "in" / f"{number:06}.png")
    assert main(["predict", str(model), str(folder / "in"), "--out", str(folder / "out"), *options]) == 0
    return [np.asarray(Image.open(one)) for one in sorted((folder / "out").iterdir())]


@pytest.mark.parametrize("channels, options", [("grey", []), ("rgb", ["--threshold", "0.4", "--tta"])])
def test_a_video_is_its_frames_as_images(models, tmp_path, capsys, channels, options):
    frames = pictures(*[(37, 51)] * 3)
    video = write_video(tmp_path / "clip.mkv", frames)
    masks, timing = predict(models[channels], video, tmp_path / "out", *options)
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out") and "3 frames of 51 × 37, one at a time: p50 " in said.err
    expected = predicted_images(models[channels], frames, tmp_path / "images", *options)
    assert len(masks) == 3 and len(np.unique(expected)) > 1
    for mask, one in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask, one)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"clip.masks", "clip.overlay.mp4", "clip.timing.json"}
    overlay, times = read_video(tmp_path / "out" / "clip.overlay.mp4")
    assert times == pytest.approx([0, 0.1, 0.2], abs=1e-3)
    names = list(CLASSES)
    labels = np.vectorize(names.index)(masks[1]).astype(np.uint8)
    drawn = overlaid(frames[1], labels, dict(list(CLASSES.items())[: 3 if channels == "grey" else 2]))
    assert overlay[1].shape == (38, 52, 3)  # even, as H.264 wants it
    luma = [one.astype(float) @ [0.299, 0.587, 0.114] for one in (overlay[1][:37, :51], drawn, frames[1])]
    # of 255; chroma has half the resolution, and labels of random weights are noise
    assert np.abs(luma[0] - luma[1]).mean() < 4 < np.abs(luma[1] - luma[2]).mean()
    assert timing["frames"] == 3 and timing["width"] == 51 and timing["batch"] == 1 and timing["precision"] == "fp32"


def test_an_overlay_is_half_the_colour_of_the_class():
    frame, labels = np.full((1, 3, 3), 100, np.uint8), np.array([[0, 1, 2]], np.uint8)
    drawn = overlaid(frame, labels, CLASSES)
    colours = palette(CLASSES)
    assert drawn[0, 0].tolist() == [100] * 3 and frame.max() == 100
    for place, value in ((1, 7), (2, 200)):
        np.testing.assert_array_equal(drawn[0, place], (100 + colours[value].astype(float)) // 2)


def test_frames_are_turned_upright(models, tmp_path):
    """As players do: by the angle in the file, against the clock."""
    frames = pictures((20, 33), (20, 33))
    video = write_video(tmp_path / "turned.mp4", frames, codec="libx264", layout="yuv444p", rotation=90)
    masks, timing = predict(models["grey"], video, tmp_path / "out")
    assert masks[0].shape == (33, 20) and (timing["width"], timing["height"]) == (20, 33)
    seen, _ = read_video(video)  # as they are stored
    expected = predicted_images(models["grey"], [np.rot90(one) for one in seen], tmp_path / "images")
    np.testing.assert_array_equal(masks[1], expected[1])


def test_times_are_kept(models, tmp_path):
    video = write_video(tmp_path / "uneven.mkv", pictures(*[(16, 16)] * 4), times=[5, 6, 9, 20])
    predict(models["grey"], video, tmp_path / "out")
    assert read_video(tmp_path / "out" / "uneven.overlay.mp4")[1] == pytest.approx([0, 0.1, 0.4, 1.5], abs=2e-3)


def test_a_video_that_changes_its_size(models, tmp_path):
    """Two transport streams one after another are one: every frame is predicted at its own size."""
    both = [pictures(*[size] * 2, seed=seed) for seed, size in enumerate([(32, 48), (64, 32)])]
    for number, frames in enumerate(both):
        write_video(tmp_path / f"{number}.ts", frames, codec="libx264", layout="yuv420p", rate=Fraction(25))
    video = tmp_path / "joined.ts"
    video.write_bytes(b"".join((tmp_path / f"{number}.ts").read_bytes() for number in (0, 1)))
    stored, _ = read_video(video)
    assert {one.shape[:2] for one in stored} == {(32, 48), (64, 32)}  # else this test says nothing
    masks, timing = predict(models["rgb"], video, tmp_path / "out")
    assert [mask.shape for mask in masks] == [one.shape[:2] for one in stored]
    overlay, times = read_video(tmp_path / "out" / "joined.overlay.mp4")
    assert {one.shape for one in overlay} == {(32, 48, 3)} and len(overlay) == len(stored) == timing["frames"]
    assert times == sorted(set(times))


def test_large_frames_are_seen_through_a_window(models, tmp_path):
    frames = pictures((300, 900))
    options = ["--memory", "1.3", "--window", "64"]
    video = write_video(tmp_path / "large.mkv", frames)
    (mask,), _ = predict(models["grey"], video, tmp_path / "out", *options)
    (whole,), _ = predict(models["grey"], video, tmp_path / "whole")
    (expected,) = predicted_images(models["grey"], frames, tmp_path / "images", *options)
    np.testing.assert_array_equal(mask, expected)
    assert (mask != whole).any()


def test_grey_video(models, tmp_path):
    frames = [one[..., 0] for one in pictures((20, 20), (20, 20))]
    video = write_video(tmp_path / "grey.mkv", frames, layout="gray")
    for channels in ("grey", "rgb"):
        masks, _ = predict(models[channels], video, tmp_path / channels)
        expected = predicted_images(models[channels], frames, tmp_path / f"{channels}-images")
        np.testing.assert_array_equal(masks[0], expected[0])


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def faulty(root: Path, kind: str) -> Path:
    frames = pictures((16, 16), (16, 16))
    if kind == "cut":  # an MP4 has its index at the end
        return cut(write_video(root / "a.mp4", frames, codec="libx264", layout="yuv420p"), 0.5)
    if kind == "sound":
        with av.open(str(root / "a.mkv"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
        return root / "a.mkv"
    if kind == "no frame":
        content = write_video(root / "a.avi", frames, codec="mpeg4", layout="yuv420p").read_bytes()
        (root / "a.avi").write_bytes(content[: content.index(b"movi") + 4])
        return root / "a.avi"
    path = root / "a.mp4"
    if kind != "missing":
        path.write_bytes({"empty": b"", "text": b"no video at all " * 50}[kind])
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "cannot be read as a video: No such file"),
        ("empty", "cannot be read as a video"),
        ("text", "cannot be read as a video: Invalid data"),
        ("cut", "a.mp4: "),
        ("sound", "holds no video"),
        ("no frame", "a.avi: "),
    ],
)
def test_a_faulty_video_is_one_message(models, tmp_path, capfd, kind, message):
    path = faulty(tmp_path, kind)
    assert main(["predict", str(models["grey"]), str(path), "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == "" and not (tmp_path / "out").exists()


def test_a_fault_in_the_middle_leaves_nothing(models, tmp_path, capsys):
    """PNG is all or nothing, a frame a packet: the third says that it is another kind of PNG."""
    path = write_video(tmp_path / "a.avi", pictures(*[(16, 16)] * 4), codec="png", layout="rgb24")
    content = bytearray(path.read_bytes())
    places = [i for i in range(len(content)) if content[i : i + 4] == b"IHDR"]
    content[places[2] + 12] = 99  # bits a channel
    path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert main(["predict", str(models["grey"]), str(path), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be decoded beyond its first 2 frames" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("grey", ["--probabilities"], "--probabilities: "),
        (2, [], "has 3 channels, 2 is wanted"),
        ("grey", ["other.png"], "a video is predicted alone, here are 2 inputs"),
        ("grey", ["--threshold", "0.3"], "is for models of one class"),
        ("grey", ["--runtime", "openvino"], "is of bundles"),
        ("grey", ["--memory", "1"], "too little for a scan of"),
    ],
)
def test_what_a_video_refuses(models, tmp_path, capsys, model, options, message):
    video = write_video(tmp_path / "a.mkv", pictures((16, 16)))
    assert main(["predict", str(models[model]), str(video), *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_masks_are_of_videos(models, tmp_path, capsys):
    Image.fromarray(pictures((9, 9))[0]).save(tmp_path / "a.png")
    assert main(["predict", str(models["grey"]), str(tmp_path / "a.png"), "--masks", "--out", str(tmp_path / "out")]) == 2
    assert "--masks: is of videos" in capsys.readouterr().err
    assert not is_video(tmp_path) and is_video(tmp_path / "B.MP4") and only_video([tmp_path / "a.png"] * 2) is None
    with pytest.raises(InputError, match="a video is predicted alone"):
        only_video([tmp_path / "a.mp4", tmp_path / "b.mp4"])


def test_without_pyav_the_extra_is_named(models, tmp_path, capsys, monkeypatch):
    video = write_video(tmp_path / "a.mkv", pictures((16, 16)))
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["predict", str(models["grey"]), str(video), "--out", str(tmp_path / "out")]) == 3
    assert "pip install 'resunet[video]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_overwritten(models, tmp_path, capsys):
    video = write_video(tmp_path / "a.mkv", pictures((16, 16)))
    (tmp_path / "out").mkdir()
    predict(models["grey"], video, tmp_path / "out")
    assert main(["predict", str(models["grey"]), str(video), "--out", str(tmp_path / "out")]) == 2
    assert "exists already, and is not empty" in capsys.readouterr().err


def test_timing_is_of_single_frames():
    latencies = [0.001 * number for number in range(1, 101)]
    timing = timing_of(latencies, 10.0, (4, 3), {"runtime": "any"})
    assert timing["latency_ms"] == {"p50": 50.5, "p95": 95.05, "p99": 99.01, "mean": 50.5}
    assert timing["frames_per_second"] == round(1000 / 50.5, 3) and timing["overall_frames_per_second"] == 10
    assert timing["runtime"] == "any"
