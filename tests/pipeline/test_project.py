"""The project itself: what the README promises, the wheel, the order of the house."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
EXAMPLES = [one for one in EXAMPLES if "resunet.bundle" not in one]  # which needs one: tests/resunet/bundle/test_predict.py


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_a_python_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(example, scope)
    if "logits" in scope:
        assert tuple(scope["logits"].shape) == (1, 1, 201, 333)  # type: ignore[attr-defined]
    if "features" in scope:
        assert [tuple(one.shape) for one in scope["features"]] == [(1, 64, 101, 167), (1, 128, 51, 84), (1, 256, 26, 42)]  # type: ignore[attr-defined]


def test_the_table_of_networks_is_what_the_command_prints() -> None:
    from benchmarks.networks import table

    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readme_command() -> None:
    pattern = re.search(r"grep --max-count=1 '(.*?)'", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert pattern
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if re.search(pattern[1], line)]
    assert len(lines) == 1 and "'.[test]'" in lines[0]


def test_every_command_of_the_readme_exists() -> None:
    from resunet.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"^(?:.*/)?resunet ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named and named <= verbs


def test_the_wheel_runs_a_named_recipe_elsewhere(tmp_path: Path, write_blobs: Callable[..., Path], salt: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"resunet", "pretrain", "finetune"}
    assert "resunet/configs/pretrain/brain_tumor.yaml" in names and "resunet/report.html.j2" in names
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pretrain.py").write_text("raise SystemExit('the user’s own file was picked up')", encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pretrain", "brain_tumor", f"data.source={write_blobs()}"),
            *(f"data.salt_file={salt}", "out=run", "steps=1", "batch=4", "model.channels=[4,8]", "precision=fp32"),
            *("views.size=16", "wandb.mode=disabled", "data.workers=0"),
        ],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, encoding="utf-8",
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "run" and (elsewhere / "run" / "model" / "model.safetensors").exists()
