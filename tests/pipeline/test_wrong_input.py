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
from resunet.transfer import fingerprint

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


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune"]) == 2
    assert main(["nonsense"]) == 2
    assert main(["demo", "--seconds", "5", "--out", str(tmp_path / "demo")]) == 2
    assert "at least 20" in capsys.readouterr().err


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "brain_tumour"]) == 2
    assert "Did you mean 'brain_tumor'?" in capsys.readouterr().err
