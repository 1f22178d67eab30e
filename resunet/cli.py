"""The command line: `resunet VERB ARGS [key=value …]`. The only file that knows both applications; imports them lazily."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from resunet.exits import exit_code_of

app = typer.Typer(
    name="resunet",
    help="From an archive of unlabelled scans and a handful of labelled ones to a segmentation model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="recipe keys to set")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="a new folder")] = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(help="about how long it may take")] = 480,
) -> None:
    """The whole chain on simulated patients; prints where the report is."""
    from finetune.compare import compare
    from resunet.demo import Stages, run_demo

    print(run_demo(out, seconds, Stages(_pretrain, _finetune, compare)))


@app.command()
def doctor() -> None:
    """Versions, devices, precision, threads, writable paths, W&B state."""
    from resunet.doctor import examine

    rows = examine()
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        print(f"{what:<{width}}  {finding}")


@app.command()
def pretrain(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Unlabelled scans → encoder."""
    print(_pretrain(recipe, overrides or ()))


@app.command()
def finetune(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Labelled scans and an encoder (or none) → segmenter."""
    print(_finetune(recipe, overrides or ()))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="a fine-tuning run or a model directory")],
    data: Annotated[Path, typer.Option(help="a folder with images/ and masks/")],
    split: Annotated[str, typer.Option(help="pool, val or test")] = "test",
    out: Annotated[Path | None, typer.Option(help="a new folder; default: evaluation-SPLIT beside the model")] = None,
    names: Annotated[str, typer.Option(help="hash, or keep for public data")] = "hash",
    salt_file: Annotated[Path | None, typer.Option(help="the salt of the ids")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    allow_leak: Annotated[bool, typer.Option("--allow-leak", help="evaluate cases that were trained on")] = False,
) -> None:
    """A segmenter on labelled scans → summary.json, cases.csv, overlays/."""
    from finetune.evaluate import EvaluateRequest, evaluate
    from resunet.config import validate

    request = dict(source=data, split=split, names=names, salt_file=salt_file, precision=precision)
    print(evaluate(model, validate(EvaluateRequest, request, "resunet evaluate"), out, allow_leak))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="finished fine-tuning runs; the first is measured against the others")],
    out: Annotated[Path, typer.Option(help="a new folder")] = Path("runs/compare"),
) -> None:
    """Runs side by side: figures, paired differences, curves, overlays."""
    from finetune.compare import compare

    print(compare(runs, out))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code."""
    return exit_code_of(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        app(args=list(arguments), prog_name="resunet")
    except SystemExit as stop:  # how click ends every command; its 2, a fault in the command line, is ours too
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _pretrain(recipe: str, overrides: Sequence[str]) -> Path:
    from pretrain.loop import pretrain
    from pretrain.recipe import PretrainRecipe
    from resunet.config import load_recipe

    return pretrain(load_recipe(PretrainRecipe, "pretrain", recipe, overrides))


def _finetune(recipe: str, overrides: Sequence[str]) -> Path:
    from finetune.loop import finetune
    from finetune.recipe import FinetuneRecipe
    from resunet.config import load_recipe

    return finetune(load_recipe(FinetuneRecipe, "finetune", recipe, overrides))
