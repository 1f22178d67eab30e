import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import resunet

ROOT = Path(resunet.__file__).parents[1]
PACKAGES = ("resunet", "pretrain", "finetune")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def offenders(package: str, forbidden: set[str], but: tuple[str, ...] = ()) -> list[str]:
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path.name not in but]
    assert files
    return [f"{path.name}: {name}" for path in files for name in imported(path) if name.split(".")[0] in forbidden]


def loaded_by(code: str, *modules: str) -> list[str]:
    code = f"import sys; {code}; print(*[m for m in {modules!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout.split()


def test_the_library_imports_neither_application():
    assert offenders("resunet", {"pretrain", "finetune"}, but=("cli.py",)) == []


def test_the_applications_do_not_import_each_other():
    assert offenders("pretrain", {"finetune"}) == []
    assert offenders("finetune", {"pretrain"}) == []


def test_nothing_imports_the_tests_or_what_is_on_its_way_out():
    for package in PACKAGES:
        assert offenders(package, {"tests", "benchmarks"}) == []
        names = [name for path in (ROOT / package).rglob("*.py") for name in imported(path)]
        assert not [name for name in names if name.startswith(("torch.ao.quantization", "lightly.transforms"))]


def test_the_command_line_imports_the_applications_lazily():
    assert loaded_by("import resunet.cli", "pretrain", "finetune", "torch") == []


def test_importing_the_package_is_cheap():
    assert loaded_by("import resunet; dir(resunet)", "torch", "numpy", "pydantic", "wandb") == []
    assert loaded_by("from resunet import InputError", "torch", "numpy", "pydantic", "wandb") == []


def test_everything_promised_is_there():
    assert resunet.__all__ == sorted(set(resunet.__all__))
    for name in resunet.__all__:
        found = getattr(resunet, name)
        assert found.__name__ == name
        assert found.__module__.startswith("resunet.")
        assert name in dir(resunet)
    assert set(resunet.__all__) == set(resunet._HOME)


def test_type_checkers_see_what_is_promised():
    tree = ast.parse(Path(resunet.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"resunet.{home}" for name, home in resunet._HOME.items()}


def test_what_is_not_promised_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = resunet.nonsense


def test_every_module_has_a_docstring():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not text or ast.get_docstring(ast.parse(text)), path


def test_no_module_is_called_a_misc():
    for package in PACKAGES:
        assert not {path.stem for path in (ROOT / package).rglob("*.py")} & {"utils", "helpers", "common", "manager", "misc"}


def test_submodules_are_found_too():
    assert importlib.import_module("resunet.errors").InputError is resunet.InputError
