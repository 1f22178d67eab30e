"""A bundle on a machine that has its requirements and nothing else."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from resunet.data.images import read_mask

ROOT = Path(__file__).parents[3]
OURS = ("resunet", "finetune", "pretrain")  # as the wheel has them, without what they depend on


def with_their_own(lines: Iterable[str]) -> set[str]:
    """The packages that requirements name, and all that these need in turn."""
    found: set[str] = set()
    left = [Requirement(line) for line in lines if line and not line.startswith("#")]
    while left:
        one = left.pop()
        if one.name.lower() not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(one.name.lower())
            left += [Requirement(line) for line in importlib.metadata.requires(one.name) or ()]
    return found


@pytest.fixture
def bare(tmp_path: Path, exported: tuple[Path, Path]) -> Path:
    """The Python of a virtual environment with nothing but the packages of a bundle's requirements.txt, as they are here."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    here = Path(sysconfig.get_paths()["purelib"])
    for package in with_their_own((exported[1] / "requirements.txt").read_text(encoding="utf-8").splitlines()):
        files = importlib.metadata.files(package)
        assert files is not None
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(here / top)
    for name in OURS:
        (site / name).symlink_to(ROOT / name)
    (its,) = here.glob("resunet-*.dist-info")
    (site / its.name).symlink_to(its)
    return tmp_path / "venv" / "bin" / "python"


def test_a_bundle_needs_what_its_requirements_say_and_no_more(bare, exported, tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(bare), "-P", *words], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)

    for module in ("torch", "onnx", "monai"):
        assert f"No module named '{module}'" in run("-c", f"import {module}").stderr
    bundle = str(exported[1])
    verified = run("-m", "resunet", "verify", bundle)
    assert verified.returncode == 0, verified.stderr
    verdicts = {line.split()[0]: line.split("  ")[-1] for line in verified.stdout.splitlines()[2:]}
    assert verdicts == {"OpenVINO": "equal", "ONNX": "not installed", "PyTorch": "not installed"}
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 56), dtype=np.uint8)).save(tmp_path / "scan.png")
    predicted = run("-m", "resunet", "predict", bundle, "scan.png", "--out", "bare")
    assert predicted.returncode == 0, predicted.stderr
    here = [sys.executable, "-P", "-m", "resunet", "predict", bundle, "scan.png", "--out", "here", "--runtime", "openvino"]
    subprocess.run(here, cwd=tmp_path, check=True, capture_output=True)
    masks = [read_mask(tmp_path / folder / "scan.png").values for folder in ("bare", "here")]
    assert masks[0].any() and (masks[0] == masks[1]).all()
