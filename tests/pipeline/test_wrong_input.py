"""What users get wrong: one clear message, exit code 2, and nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from resunet.cli import main
from resunet.encoder import ResidualEncoder
from resunet.fingerprint import fingerprint

Break = Callable[[Path], list[str]]

BASE = [
    *("precision=fp32", "model.channels=[4,8]", "wandb.mode=disabled", "steps=2", "batch=2", "patch=[32,32]"),
    "data.classes={0: background, 255: disc}",
]


def misspelt_key(root: Path) -> list[str]:
    return ["stpes=3"]


def misspelt_nested_key(root: Path) -> list[str]:
    return ["data.clases={0: a, 255: b}"]


def no_mask(root: Path) -> list[str]:
    (root / "masks" / "PATIENT-Mueller00-0.png").unlink()
    return []


def mask_of_another_size(root: Path) -> list[str]:
    for path in (root / "masks").iterdir():
        Image.open(path).resize((20, 20), Image.Resampling.NEAREST).save(path)
    return []


def unlisted_value(root: Path) -> list[str]:
    return ["data.classes={0: background, 1: disc}"]


def another_width(root: Path) -> list[str]:
    encoder = ResidualEncoder(channels=(6, 12))
    encoder.config = encoder.config.model_copy(update={"feature_check": fingerprint(encoder)})
    encoder.save_pretrained(root.parent / "encoder")
    return [f"encoder={root.parent / 'encoder'}"]


def empty_folder(root: Path) -> list[str]:
    for path in (root / "images").iterdir():
        path.unlink()
    return []


def no_folder(root: Path) -> list[str]:
    return [f"data.source={root / 'nothing'}"]


def nan_image(root: Path) -> list[str]:
    for name in ("images", "masks"):
        for path in sorted((root / name).iterdir()):
            values = np.asarray(Image.open(path)).astype(np.float32 if name == "images" else np.uint8)
            if name == "images":
                values[3, 3] = np.nan
            sitk.WriteImage(sitk.GetImageFromArray(values[None]), str(path.with_suffix(".nii.gz")))
            path.unlink()
    return []


def existing_out(root: Path) -> list[str]:
    (root.parent / "out").mkdir()
    return []


def group_in_two_parts(root: Path) -> list[str]:
    splits = json.loads((root / "splits.json").read_text(encoding="utf-8"))
    splits["test"].append(splits["pool"].pop())
    (root / "splits.json").write_text(json.dumps(splits))
    return []


WRONG: dict[Break, str] = {
    misspelt_key: "stpes=3: there is no such key; did you mean 'steps'?",
    misspelt_nested_key: "did you mean 'data.classes'?",
    no_mask: "1 images without a mask: PATIENT-Mueller00-0",
    mask_of_another_size: "the mask is 20×20, its image 44×39",
    unlisted_value: "the mask holds the value 255, which data.classes does not list",
    another_width: "channels: encoder [6, 12], network [4, 8]",
    empty_folder: "no image in",
    no_folder: "no such folder",
    nan_image: "1 of 1716 values are NaN or infinite",
    existing_out: "exists already",
    group_in_two_parts: "groups are in more than one part of the split",
}


@pytest.mark.parametrize("broken", WRONG, ids=lambda broken: broken.__name__)
def test_wrong_input(
    broken: Break, tmp_path: Path, write_blobs: Callable[..., Path], salt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_blobs()
    out = tmp_path / "out"
    arguments = [*BASE, f"data.source={root}", f"data.salt_file={salt}", f"out={out}", *broken(root)]
    assert main(["finetune", "brain_tumor", *arguments]) == 2
    message = capsys.readouterr().err
    assert WRONG[broken] in message
    assert "Traceback" not in message and message.count("resunet:") == 1
    assert not out.exists() or not list(out.iterdir()), "nothing half-written"


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "MODEL", "--data", "DATA"],
        ["predict", "MODEL", "DATA"],
        ["explain", "MODEL", "DATA"],
        ["embed", "MODEL", "--data", "DATA"],
        ["suggest", "MODEL", "DATA", "--budget", "2"],
        ["compare", "MODEL", "MODEL"],
        ["ensemble", "MODEL", "MODEL"],
        ["export", "MODEL"],
        ["split", "DATA"],
        ["demo"],
    ],
    ids=lambda command: command[0],
)
def test_an_out_below_a_file_is_told_before_anything_is_read(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "scans" / "images"
    root.mkdir(parents=True)
    for number in range(6):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / f"{number}.png")
    encoder = ResidualEncoder(channels=(4, 8))
    encoder.config = encoder.config.model_copy(update={"feature_check": fingerprint(encoder)})
    encoder.save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    places = {"MODEL": str(tmp_path / "model"), "DATA": str(root.parent)}
    out = tmp_path / "file" / "out"
    assert main([places.get(part, part) for part in command] + ["--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"{out}: {tmp_path / 'file'} is a file, not a folder" in said and "Traceback" not in said


def test_flags_are_named_as_flags(tmp_path: Path, write_blobs: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root, nothing = write_blobs(), str(tmp_path / "nothing")
    (tmp_path / "masks").mkdir()
    shown = {
        f"--data {nothing}: no such folder": ["evaluate", str(root / "masks"), "--data", nothing],
        f"--salt-file {nothing}: cannot be read": [
            "index",
            str(root),
            "--out",
            str(tmp_path / "m.parquet"),
            "--salt-file",
            nothing,
        ],
        "takes both manifests and --out, and no SOURCE": ["index", "--check", "a", "--against", "b", "--salt-file", nothing],
        "--wandb-mode online: W&B is told": [
            "index",
            str(root),
            "--out",
            str(tmp_path / "m.parquet"),
            "--wandb-mode",
            "online",
        ],
        f"data.held_out={nothing}: no such folder": ["pretrain", "demo", f"data.source={root}", f"data.held_out={nothing}"],
    }
    for message, command in shown.items():
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune"]) == 2
    assert main(["nonsense"]) == 2
    assert main(["demo", "--seconds", "5", "--out", str(tmp_path / "demo")]) == 2
    assert "at least 20" in capsys.readouterr().err


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "brain_tumour"]) == 2
    assert "Did you mean 'brain_tumor'?" in capsys.readouterr().err
