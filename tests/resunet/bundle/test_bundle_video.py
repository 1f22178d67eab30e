"""A bundle predicts a video as its model does, without PyTorch."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from resunet.cli import main

BLOCKED = ("torch", "torchvision", "monai", "omegaconf", "accelerate", "pyarrow", "highdicom", "lightly", "scipy")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(5))
        stream.width, stream.height, stream.pix_fmt = 31, 24, "bgr0"
        for seed in range(3):
            picture = np.random.default_rng(seed).integers(0, 255, (24, 31, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_masks_are_those_of_the_model(exported, video, tmp_path):
    model, bundle = exported
    options = [str(video), "--masks", "--operating-point", "--out"]
    assert main(["predict", str(model), *options, str(tmp_path / "model")]) == 0
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); from resunet.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "predict", str(bundle), *options, str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "bundle"), done.stderr
    masks = [sorted((tmp_path / name / "clip.masks").iterdir()) for name in ("model", "bundle")]
    assert [one.name for one in masks[0]] == ["000000.png", "000001.png", "000002.png"] == [one.name for one in masks[1]]
    for one, other in zip(*masks, strict=True):
        assert one.read_bytes() == other.read_bytes()
    timing = json.loads((tmp_path / "bundle" / "clip.timing.json").read_text(encoding="utf-8"))
    assert timing["frames"] == 3 and timing["runtime"].startswith("OpenVINO")


def test_what_a_bundle_refuses_of_a_video(exported, video, tmp_path, capsys):
    command = ["predict", str(exported[1]), str(video), "--out", str(tmp_path / "out")]
    assert main([*command, "--probabilities"]) == 2 and "--probabilities: " in capsys.readouterr().err
    assert main([*command, "--precision", "fp16"]) == 2 and "the bundle has no such graph" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
