"""The command line: `resunet VERB ARGS [key=value …]`. The only file that knows both applications; imports them lazily."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from resunet.errors import InputError
from resunet.exits import exit_code_of
from resunet.plain import number_of

app = typer.Typer(
    name="resunet",
    help="From an archive of unlabelled scans and a handful of labelled ones to a segmentation model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")]
_SECONDS, _MEMORY = 120, 4  # that reading one scan may take: resunet.data.pool.Limits
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="recipe keys to set")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="a new folder")] = Path("runs/demo"),
    seconds: Annotated[float, typer.Option(help="about how long it may take")] = 480,
) -> None:
    """The whole chain on simulated patients; prints where the report is."""
    from finetune.comparison.compare import compare
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
def index(
    sources: Annotated[list[Path] | None, typer.Argument(metavar="SOURCE…", help="folders of scans")] = None,
    out: Annotated[Path | None, typer.Option(help="the manifest, M.parquet; with --check a new file for the pairs")] = None,
    masks: Annotated[Path | None, typer.Option(help="masks with the images' relative names")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes; 0 is one a core")] = 0,
    salt_file: Annotated[Path | None, typer.Option(help="the salt of the ids")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="that reading one scan may take")] = _SECONDS,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB that reading one scan may take")] = _MEMORY,
    check: Annotated[Path | None, typer.Option(help="an archive's manifest: look for images of --against in it")] = None,
    against: Annotated[Path | None, typer.Option(help="with --check: the manifest of what must not be in it")] = None,
    wandb_project: Annotated[str | None, typer.Option(help="tell W&B of the manifest: what it counts, and its hash")] = None,
    wandb_mode: Annotated[
        str | None, typer.Option(help="with --wandb-project: offline, for a later wandb sync, or online; default: offline")
    ] = None,
) -> None:
    """An archive → a manifest; or, with --check A --against B, which images of B are in A."""
    from resunet.data.check import check as check_archive
    from resunet.data.index import IndexRequest
    from resunet.data.index import index as index_archive
    from resunet.data.pool import Limits

    if check is not None or against is not None:
        of_reading = [sources, masks, workers, salt_file, seconds != _SECONDS, memory != _MEMORY, wandb_project, wandb_mode]
        if check is None or against is None or any(of_reading):
            raise InputError(
                "resunet index --check A.parquet --against B.parquet takes both manifests and --out, and no SOURCE: the other "
                "options are of reading scans, or of W&B. Leave them out."
            )
        if check_archive(check, against, out):
            raise typer.Exit(1)
        return
    if not sources or out is None:
        raise InputError("resunet index SOURCE… --out M.parquet: give a folder of scans, and the name of the manifest.")
    if wandb_mode is not None and wandb_project is None:
        raise InputError(
            f"--wandb-mode {wandb_mode}: W&B is told of a manifest with --wandb-project. Add it, or leave this out."
        )
    wandb_mode = wandb_mode or "offline"
    if wandb_mode not in ("offline", "online"):
        raise InputError(f"--wandb-mode {wandb_mode}: is neither offline nor online.")
    manifest = index_archive(IndexRequest(tuple(sources), out, masks, workers, salt_file, Limits(seconds, memory)))
    if wandb_project is not None:
        from resunet.config import WandbSettings
        from resunet.data.manifest import open_manifest
        from resunet.data.mirrored import mirror_manifest

        mirror_manifest(open_manifest(manifest), WandbSettings.model_validate({"mode": wandb_mode, "project": wandb_project}))
    print(manifest)


@app.command()
def split(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a folder with images/, or an nnU-Net raw data set")],
    out: Annotated[Path, typer.Option(help="a new file, to edit and to use as splits.json or data.splits")],
    seed: Annotated[int, typer.Option(help="of the split, where the source has none")] = 0,
    labelled: Annotated[float | None, typer.Option(help="only so many of the pool's groups, or a share below 1")] = None,
    draw: Annotated[int, typer.Option(help="which of the nested draws")] = 0,
    stratify: Annotated[bool, typer.Option("--stratify", help="balanced over what the masks hold")] = False,
) -> None:
    """A split by group, or a labelled subset of one, as a file."""
    from resunet.data.source import write_split

    print(write_split(source, out, seed, labelled, draw, stratify))


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="do not train: say what the data are, and what it takes")] = False,
    show_views: Annotated[Path | None, typer.Option(help="do not train: scans beside their views, as a new PNG")] = None,
) -> None:
    """Unlabelled scans → encoder; or, before that, a plan, and a look at the views."""
    if plan and show_views is not None:
        raise InputError("resunet pretrain RECIPE takes one of --plan and --show-views.")
    if not plan and show_views is None:
        print(_pretrain(recipe, overrides or ()))
        return
    from pretrain.recipe import PretrainRecipe
    from resunet.config import load_recipe

    loaded = load_recipe(PretrainRecipe, "pretrain", recipe, overrides or ())
    if show_views is not None:
        from pretrain.planning.show import show_views as show

        print(show(loaded, show_views))
        return
    from pretrain.planning.page import page
    from pretrain.planning.plan import make_plan

    print(page(make_plan(loaded)))


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="do not train: say what the data are, and what it takes")] = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="do not train: sweep over learning rates")] = False,
    overfit: Annotated[bool, typer.Option("--overfit", help="do not train: can one batch be learned by heart?")] = False,
    write: Annotated[Path | None, typer.Option(help="--plan: a new recipe.yaml; --find-lr: a new page.html")] = None,
) -> None:
    """Labelled scans and an encoder (or none) → segmenter; or, before that, a plan and checks."""
    asked: dict[Literal["plan", "find-lr", "overfit"], bool] = {"plan": plan, "find-lr": find_lr, "overfit": overfit}
    modes = [mode for mode, wanted in asked.items() if wanted]
    if len(modes) > 1 or (write is not None and not modes):
        raise InputError(
            "resunet finetune RECIPE takes one of --plan, --find-lr and --overfit, and --write with the first two."
        )
    if not modes:
        print(_finetune(recipe, overrides or ()))
        return
    from finetune.planning.command import before_training
    from finetune.recipe import FinetuneRecipe
    from resunet.config import load_recipe

    print(before_training(load_recipe(FinetuneRecipe, "finetune", recipe, overrides or ()), modes[0], write))


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(help="a pretraining or fine-tuning run, or a model directory")],
    data: Annotated[Path, typer.Option(help="a manifest, a folder of scans, or an nnU-Net raw data set")],
    out: Annotated[Path, typer.Option(help="a new file, E.parquet")],
    per_slice: Annotated[bool, typer.Option("--per-slice", help="a row a slice with content, not a scan")] = False,
    names: Annotated[str, typer.Option(help="hash, or keep for public data")] = "hash",
    salt_file: Annotated[Path | None, typer.Option(help="the salt of the ids")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    batch: Annotated[int, typer.Option(help="slices at once")] = 16,
    longest: Annotated[
        int | None, typer.Option(help="pixels a side: longer slices are shrunk, longer volumes cut; default: 512, 128 in 3D")
    ] = None,
) -> None:
    """An encoder on an archive → features, a row a scan: the mean of the last level over each slice, and over slices."""
    from resunet.config import validate
    from resunet.embedding.embed import EmbedRequest, embed

    request = dict(source=data, per_slice=per_slice, names=names, salt_file=salt_file)
    request |= dict(precision=precision, batch=batch, longest=longest)
    embedded = embed(model, out, validate(EmbedRequest, request, "resunet embed"))
    print(embedded.out)
    if embedded.faults:
        raise InputError(f"{len(embedded.faults)} scans are not in {out}, as said above; {embedded.scans} are.")


@app.command()
def suggest(
    model: Annotated[Path, typer.Argument(help="a pretraining or fine-tuning run, or a model directory")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a manifest, M.parquet, or another source")],
    budget: Annotated[int, typer.Option(help="groups to suggest")],
    out: Annotated[Path, typer.Option(help="a new folder")] = Path("runs/suggest"),
    method: Annotated[str, typer.Option(help="typicality: what is common; kcenter: what is far from all else")] = "typicality",
    labelled: Annotated[
        Path | None,
        typer.Option(help="who is labelled: splits.json, a CSV with a column group, or a group a line; default: masks"),
    ] = None,
    embeddings: Annotated[Path | None, typer.Option(help="E.parquet of this model and source, by resunet embed")] = None,
    salt_file: Annotated[Path | None, typer.Option(help="the salt of the ids")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    batch: Annotated[int, typer.Option(help="slices at once")] = 16,
) -> None:
    """Which unlabelled groups to label next, by coverage of an encoder's features; paths on the terminal only."""
    from resunet.config import validate
    from resunet.embedding.suggest import SuggestRequest, suggest

    request = dict(source=source, budget=budget, method=method, labelled=labelled, embeddings=embeddings)
    request |= dict(salt_file=salt_file, precision=precision, batch=batch)
    suggested = suggest(model, out, validate(SuggestRequest, request, "resunet suggest"))
    for line in suggested.lines:
        print(line)
    print(out)
    if suggested.faults:
        raise InputError(f"{len(suggested.faults)} scans could not be embedded, as said above; {out} is of all others.")


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="a fine-tuning run, a model directory, a bundle, or a folder of predicted masks")
    ],
    data: Annotated[Path, typer.Option(help="a folder with images/ and masks/")],
    split: Annotated[str, typer.Option(help="pool, val or test")] = "test",
    splits: Annotated[Path | None, typer.Option(help="a splits.json instead of the folder's own, as data.splits")] = None,
    out: Annotated[Path | None, typer.Option(help="a new folder; default: evaluation-SPLIT beside the model")] = None,
    names: Annotated[str, typer.Option(help="hash, or keep for public data")] = "hash",
    salt_file: Annotated[Path | None, typer.Option(help="the salt of the ids")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; of a bundle int8, too; default: fp32, or what the bundle has")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="of a bundle: openvino, onnxruntime or pytorch; default: its first that is installed")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="mm, of surface Dice")] = 1,
    memory: Annotated[float | None, typer.Option(help="GiB that a process may take; default: 4, of a bundle its own")] = None,
    ignore: Annotated[
        list[int] | None, typer.Option(help="mask values that nobody labelled; of predicted masks and bundles")
    ] = None,
    false_alarms_per_1000: Annotated[
        float | None, typer.Option(help="a budget: choose a threshold on val that keeps it")
    ] = None,
    allow_leak: Annotated[bool, typer.Option("--allow-leak", help="evaluate cases that were trained on")] = False,
) -> None:
    """A segmenter, a bundle, or another program's masks, on labelled scans → report.html, summary.json, cases.csv, overlays/."""
    from finetune.evaluation.evaluate import EvaluateRequest, evaluate
    from resunet.config import validate

    request = dict(source=data, split=split, splits=splits, names=names, salt_file=salt_file, precision=precision)
    request |= dict(tolerance=tolerance, runtime=runtime, memory=memory, ignore=ignore or ())
    request |= dict(false_alarms_per_1000=false_alarms_per_1000)
    print(evaluate(model, validate(EvaluateRequest, request, "resunet evaluate"), out, allow_leak))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="a fine-tuning run, a model directory, or a bundle, which needs no PyTorch")],
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT…", help="scans, folders, DICOM series, nnU-Net data, a manifest; or a video")
    ],
    out: Annotated[Path, typer.Option(help="a new folder")],
    masks: Annotated[bool, typer.Option("--masks", help="of a video: a PNG a frame, beside the overlay")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="float32 probabilities, not labels")] = False,
    threshold: Annotated[float | None, typer.Option(help="of the probability, for models of one class; default: 0.5")] = None,
    operating_point: Annotated[
        bool, typer.Option("--operating-point", help="the model's threshold for its budget of false alarms")
    ] = False,
    tta: Annotated[bool, typer.Option("--tta", help="the mean over mirror images: 4 times the work")] = False,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; of a bundle int8, too; default: fp32, or what the bundle has")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GiB that a process may take; default: 4, of a bundle its own")] = None,
    window: Annotated[
        int | None, typer.Option(help="pixels a side of the window, for what does not fit whole; default: 512, or the bundle's")
    ] = None,
    overlap: Annotated[float | None, typer.Option(help="of windows, 0 to 0.75; default: 0.25, or the bundle's")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="of a bundle: openvino, onnxruntime or pytorch; default: its first that is installed")
    ] = None,
) -> None:
    """A segmenter on scans → masks in their own format and geometry; on a video → an overlay, and how long a frame takes."""
    from resunet.bundle import is_bundle
    from resunet.exits import is_main_rank
    from resunet.inference.video import only_video

    request: dict[str, Any] = dict(memory=memory, window=window, overlap=overlap, precision=precision)
    request |= dict(flips=tta, probabilities=probabilities, threshold=threshold, operating_point=operating_point)
    video = only_video(inputs)
    if masks and video is None:
        raise InputError("--masks: is of videos; of scans masks are what is written. Leave it out.")
    if is_bundle(model):
        from resunet.bundle.predict import BundleRequest, predict_bundle, predict_bundle_video

        asked = BundleRequest(**request, runtime=runtime)
        if video is not None:
            print(predict_bundle_video(model, video, out, asked, masks))
            return
        predicted = predict_bundle(model, inputs, out, asked)
    else:
        from finetune.inference.predict import PredictRequest, predict
        from resunet.config import validate

        if runtime is not None:
            raise InputError(f"--runtime {runtime}: is of bundles; {model} is none. Leave it out, or export it first.")
        given = {key: value for key, value in request.items() if value is not None}
        wanted = validate(PredictRequest, given, "resunet predict")
        if video is not None:
            from finetune.inference.video import predict_model_video

            print(predict_model_video(model, video, out, wanted, masks))
            return
        predicted = predict(model, inputs, out, wanted)
    if is_main_rank():
        print(predicted.out)
    if predicted.faults:
        failed = number_of(len(predicted.faults), "input")
        raise InputError(f"{failed} could not be predicted, as said above; {predicted.written} are in {out}.")


@app.command()
def explain(
    model: Annotated[Path, typer.Argument(help="a fine-tuning run or a model directory")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT…", help="scans, folders of them, or a manifest")],
    out: Annotated[Path, typer.Option(help="a new folder")],
    layer: Annotated[str | None, typer.Option(help="any module that gives a feature map; '?' lists them")] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="default: every class that is predicted")] = None,
    masks: Annotated[Path | None, typer.Option(help="masks with the inputs' names; default: masks/ beside images/")] = None,
    slices: Annotated[int, typer.Option(min=1, help="of a volume, those with most of the class")] = 3,
    all_slices: Annotated[bool, typer.Option("--all-slices", help="every slice of a volume")] = False,
    lesions: Annotated[int, typer.Option(min=0, help="missed lesions to explain, and false ones, the largest first")] = 12,
    sanity: Annotated[bool, typer.Option("--sanity", help="compare with the maps of randomised weights")] = False,
    names: Annotated[str, typer.Option(help="hash, or keep for public data")] = "hash",
    salt_file: Annotated[Path | None, typer.Option(help="the salt of the ids")] = None,
    memory: Annotated[float, typer.Option(help="GiB: what does not fit is seen through a window")] = 4.0,
    window: Annotated[int, typer.Option(help="pixels a side of that window")] = 512,
    overlap: Annotated[float, typer.Option(help="share of a window that the next one sees again")] = 0.25,
) -> None:
    """Grad-CAM: where a layer holds what a prediction, a missed lesion or a false alarm is decided by."""
    from finetune.explanation.explain import explain
    from finetune.explanation.request import ExplainRequest
    from resunet.config import validate

    inference = dict(memory=memory, window=window, overlap=overlap)
    what = dict(layer=layer, class_name=class_name, masks=masks, slices=None if all_slices else slices, lesions=lesions)
    request = dict(inputs=inputs, **what, sanity=sanity, names=names, salt_file=salt_file, inference=inference)
    print(explain(model, validate(ExplainRequest, request, "resunet explain"), out))


@app.command()
def ensemble(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="finished fine-tuning runs, or their model directories")],
    out: Annotated[Path, typer.Option(help="a new folder")],
) -> None:
    """Finished runs → one model, whose probabilities are the mean of theirs."""
    from resunet.members import make_ensemble

    print(make_ensemble(runs, out))


@app.command()
def compress(
    run: Annotated[Path, typer.Argument(help="a finished fine-tuning run")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="a YAML file, or a shipped one: prune_int8, prune, int8")] = "prune_int8",
    out: Annotated[Path | None, typer.Option(help="a new folder; the same as out=; default: RUN-compressed")] = None,
) -> None:
    """Prune a segmenter, and quantise it, under a gate: what costs too much on val is taken back."""
    import json

    from finetune.compression.command import compress
    from finetune.compression.recipe import CompressRecipe
    from resunet.config import load_recipe

    beside = run.resolve().with_name(f"{run.resolve().name}-compressed")
    given = [f"run={json.dumps(str(run))}", *(overrides or ())]
    given += [f"out={json.dumps(str(out))}"] if out is not None else []
    print(compress(load_recipe(CompressRecipe, "compress", recipe, given, [f"out={json.dumps(str(beside))}"])))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a fine-tuning run or a model directory")],
    out: Annotated[Path, typer.Option(help="a new folder, the bundle")],
    formats: Annotated[str, typer.Option(help="onnx, openvino, pytorch, tensorrt")] = "onnx,openvino,pytorch",
    precision: Annotated[str, typer.Option(help="fp32, bf16 (OpenVINO), fp16, int8 (if it was quantised)")] = "fp32",
    zipped: Annotated[bool, typer.Option("--zip", help="OUT.zip beside it, too")] = False,
) -> None:
    """A segmenter → a bundle: graphs, contract, golden cases, model card."""
    from finetune.deploy.export import ExportRequest, export

    formats_wanted, precisions = (tuple(part.strip() for part in given.split(",")) for given in (formats, precision))
    print(export(run, out, ExportRequest(formats_wanted, precisions, zipped)))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="a bundle's folder, or its zip")],
    sha256: Annotated[str | None, typer.Option(help="the bundle's own, as resunet export said it")] = None,
) -> None:
    """A bundle's bytes, graphs and golden cases, on every runtime that is here."""
    from resunet.bundle.verify import verify

    verify(bundle, sha256)


@app.command("label-curve")
def label_curve(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Dice against the number of labelled groups, arm beside arm: how many labels does an encoder save?"""
    from finetune.label_curve.command import label_curve
    from finetune.label_curve.recipe import LabelCurveRecipe
    from resunet.config import load_recipe
    from resunet.exits import is_main_rank

    speaks = is_main_rank()  # asked before ranks become workers of their own
    out = label_curve(load_recipe(LabelCurveRecipe, "label_curve", recipe, overrides or ()))
    if speaks:
        print(out)


@app.command()
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="finished fine-tuning runs; the first is measured against the others")
    ] = None,
    out: Annotated[Path, typer.Option(help="a new folder")] = Path("runs/compare"),
    wandb: Annotated[str | None, typer.Option(help="ENTITY/PROJECT/GROUP: runs of W&B beside them, or alone")] = None,
) -> None:
    """Runs side by side: figures, paired differences, curves, overlays, speed."""
    if wandb is not None:
        from finetune.comparison.online import compare_online

        print(compare_online(wandb, runs or (), out))
        return
    from finetune.comparison.compare import compare

    print(compare(runs or (), out))


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
    from finetune.cross_validation.folds import train
    from finetune.recipe import FinetuneRecipe
    from resunet.config import load_recipe

    return train(load_recipe(FinetuneRecipe, "finetune", recipe, overrides))
