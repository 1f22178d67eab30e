"""`resunet explain` through the real command."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from resunet.cli import main
from resunet.model import ResUNet


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A segmenter that nobody trained, as fine-tuning would write it."""
    network = ResUNet(1, 2, (4, 8), units=1)
    network.config = network.config.model_copy(update={"classes": {0: "background", 255: "disc"}})
    network.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_explain(
    tmp_path: Path, model: Path, write_blobs: Callable[..., Path], salt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_blobs(), tmp_path / "explained"
    images = sorted((source / "images").iterdir())[:2]
    arguments = ["explain", str(model), *map(str, images), "--masks", str(source / "masks"), "--salt-file", str(salt)]
    assert main([*arguments, "--out", str(out), "--layer", "decoder.blocks.0.unit.conv1", "--sanity", "--lesions", "1"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == str(out)
    assert "Rank correlation" in output.err and "encoder.levels.0" in output.err
    record = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert record["layer"] == "decoder.blocks.0.unit.conv1" and len({one["id"] for one in record["cases"]}) == 2
    assert set(record["lesions_found"]) == {"missed", "false"} and len(record["lesions"]) <= 2
    page = (out / "explain.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)|<script|@import""", page), "opens without a network"
    for path in out.rglob("*"):
        assert "Mueller" not in path.name
        assert not path.is_file() or b"Mueller" not in path.read_bytes(), path

    again = [*arguments, "--out", str(tmp_path / "again")]
    for wrong, message in (
        (["--layer", "?"], "decoder.blocks.0 (1/1 of the size, 4 channels)"),
        (["--class", "square"], "Its classes: background, disc"),
        (["--window", "3"], "inference.window=3"),
    ):
        assert main([*again, *wrong]) == 2
        message_shown = capsys.readouterr().err
        assert message in message_shown and "Traceback" not in message_shown
        assert not (tmp_path / "again").exists(), "nothing half-written"
