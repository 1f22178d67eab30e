"""README.md of a bundle: a model card in the form of the Hugging Face Hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from resunet.bundle.contract import Contract
from resunet.bundle.engines import name_of
from resunet.bundle.verify import Row
from resunet.errors import InputError

_FIGURES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "hd95": "HD95",
    "surface_dice": "surface Dice",
}
_LESIONS = {"precision": "precision of lesions", "recall": "recall of lesions", "f1": "F1 of lesions"}


def read_figures(path: Path) -> dict[str, Any] | None:
    """An evaluation's summary.json; None without one.

    Raises:
        InputError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}. Evaluate the run again.") from error
    if not isinstance(figures, dict):
        raise InputError(f"{path}: holds no figures. Evaluate the run again.")
    return figures


def read_int8_figures(path: Path) -> dict[str, Any] | None:
    """What a compression's test.json says of its network in INT8; None without one.

    Raises:
        InputError: it is no JSON object.
    """
    found = read_figures(path)
    return None if found is None else (found.get("networks") or {}).get("int8")


def card(contract: Contract, rows: Sequence[Row], figures: dict[str, Any] | None, int8: dict[str, Any] | None = None) -> str:
    """The card's text.

    Args:
        rows: of the golden cases when it was exported.
        figures: of the float network on test. int8: of graphs in INT8, if anybody measured that.
    """
    rounded = int8 if contract.quantisation is not None else None
    parts = [f"---\n{_metadata(contract, figures, rounded)}\n---", f"# {_title(contract)}", _about(contract), _use(contract)]
    parts += [_measured(figures), *_measured_int8(contract, rounded), _limits(contract), _proof(contract, rows)]
    return "\n\n".join(parts) + "\n"


def _title(contract: Contract) -> str:
    what = "volumes" if contract.spatial_dims == 3 else "images and, slice by slice, volumes"
    return f"Segmentation of {', '.join(list(contract.classes.values())[1:])} in {what}"


def _metadata(contract: Contract, figures: dict[str, Any] | None, int8: dict[str, Any] | None) -> str:
    only_int8 = all(graph.precision == "int8" for graph in contract.graphs)
    dice = (((int8 if only_int8 else figures) or {}).get("dice") or {}).get("mean")
    split = str((figures or {}).get("split", "test"))
    results = None
    if dice is not None:
        results = [
            EvalResult(
                task_type="image-segmentation",
                dataset_type="private",
                dataset_name=f"the {split} part of the labelled data",
                metric_type="dice",
                metric_value=round(float(dice), 4),
            )
        ]
    runtimes = dict.fromkeys({"onnxruntime": "onnx"}.get(graph.runtime, graph.runtime) for graph in contract.graphs)
    data = ModelCardData(
        library_name="resunet",
        pipeline_tag="image-segmentation",
        tags=["medical", "segmentation", *runtimes],
        metrics=["dice"],
        model_name="resunet-segmenter" if results else None,
        eval_results=results,
    )
    return str(data.to_yaml())


def _about(contract: Contract) -> str:
    taken = contract.input
    normalising = contract.normalisation
    how = (
        f"clipped to its percentiles {normalising.low:g} and {normalising.high:g}, then z-scored"
        if normalising.kind == "percentile_zscore"
        else f"clipped to {normalising.low:g}…{normalising.high:g}, less {normalising.mean:g}, over {normalising.std:g}"
    )
    rows = [
        ("network", f"{contract.architecture}, {contract.parameters:,} parameters"),
        ("takes", f"{taken.channels} scans ({taken.count} channels), any size; each whole scan is {how}"),
        ("trained at", "any spacing" if taken.spacing is None else f"{' × '.join(f'{s:g}' for s in taken.spacing)} mm"),
        ("classes", ", ".join(f"{value}: {name}" for value, name in contract.classes.items())),
        (
            "gives",
            f"logits; {contract.output.activation}, then " + ("above 0.5" if len(contract.classes) == 2 else "the largest"),
        ),
        ("post-processing", contract.postprocessing.described if contract.postprocessing else "none"),
    ]
    if (rounding := contract.quantisation) is not None:
        trained = (
            f"{rounding.steps} steps of training with rounded values" if rounding.steps else "not trained with rounded values"
        )
        patches = f"ranges from {rounding.calibration} training patches"
        rows.append(("int8", f"{rounding.method}: {patches}, {trained}"))
    if contract.regions is not None:
        rows.append(("regions", "; ".join(f"{name}: {', '.join(its)}" for name, its in contract.regions.items())))
    if (point := contract.operating_point) is not None:
        rows.append(
            (
                "operating point",
                f"above {point.threshold:.4g}, for {point.budget:g} false alarms per 1,000 cases without target",
            )
        )
    return _table(("", ""), rows)


def _use(contract: Contract) -> str:
    return f"""## Use

```sh
pip install --no-deps resunet=={contract.resunet}
pip install -r requirements.txt
resunet verify .
resunet predict . scan.nii.gz --out masks
```"""


def _measured(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "## Figures\n\nNone: the run that this was exported from was not evaluated."
    length = "mm" if figures.get("in_mm", True) else "pixels"
    found = [(f"{label}, {length}" if key == "hd95" else label, figures.get(key)) for key, label in _FIGURES.items()]
    found += [(label, (figures.get("lesions") or {}).get(key)) for key, label in _LESIONS.items()]
    rows = [(label, *_figure(one)) for label, one in found if isinstance(one, dict) and one.get("mean") is not None]
    for name, its in (figures.get("classes") or {}).items():
        if len(figures["classes"]) > 1 and (its.get("dice") or {}).get("mean") is not None:
            rows.append((f"Dice of {name}", *_figure(its["dice"])))
    alarms = figures.get("false_alarms") or {}
    clean = alarms.get("images_without_target")
    said = f"\n\nOf {clean} cases without target {alarms.get('alarmed')} raised an alarm." if clean else ""
    return (
        f"## Figures\n\nOf the live network, on the {figures.get('split', 'test')} part, {figures.get('groups', '?')} groups: "
        f"means over groups, with an interval of 95 % over them.\n\n{_table(('', 'mean', '95 %', 'groups'), rows)}{said}"
    )


def _measured_int8(contract: Contract, int8: dict[str, Any] | None) -> list[str]:
    """Of graphs in INT8, beside the network that they were made of; where nobody measured them, that."""
    if contract.quantisation is None:
        return []
    if int8 is None:
        return [
            "## Figures in INT8\n\nNone: the figures above are of the network before it was rounded. `resunet evaluate . "
            "--precision int8` measures the rounded one."
        ]
    rows = [("Dice", *_figure(int8["dice"])), ("Dice, INT8 − before compression, paired", *_figure(int8["dice_difference"]))]
    if int8.get("recall") is not None:
        rows.append((f"recall of objects of {int8['size']} voxels", *_figure(int8["recall"])))
        rows.append(("that recall, INT8 − before compression, paired", *_figure(int8["recall_difference"])))
    found = [row for row in rows if row[1] != "–"]
    return [f"## Figures in INT8\n\nOf graphs in INT8, on the same cases.\n\n{_table(('', 'mean', '95 %', 'groups'), found)}"]


def _figure(one: dict[str, Any]) -> tuple[str, str, str]:
    interval = one.get("ci95")
    return (
        "–" if one["mean"] is None else f"{one['mean']:.4g}",
        "–" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}",
        str(one.get("n", "–")),
    )


def _limits(contract: Contract) -> str:
    text = """## Limits

Scans of other devices, protocols, patients or materials than it was trained and measured on may be segmented worse, and nothing
in the output says so: measure it on labelled scans of your own (`resunet evaluate`). It is no medical device."""
    if any(graph.precision == "int8" for graph in contract.graphs):
        text += """

The graphs in INT8 are for processors with 8-bit dot products (VNNI on x86, dotprod on ARM). x86 processors with AVX2 or AVX-512 and
no VNNI add pairs of 8-bit products in 16 bits, which can saturate: run `resunet verify .` on the machine that will use it."""
    return text


def _proof(contract: Contract, rows: Sequence[Row]) -> str:
    lines = [
        (
            name_of(row.graph.runtime),
            row.version or "–",
            row.graph.precision,
            _number(None if row.answers is None else row.answers.difference),
            f"{row.graph.tolerance:g}",
            "–" if row.answers is None else f"{row.answers.decided:.2%}",
        )
        for row in rows
    ]
    head = ("runtime", "version", "precision", "largest difference", "tolerance", "pixels decided otherwise")
    return (
        "## Proof\n\n`resunet verify` compares every file with `contract.json` and replays `golden/`: synthetic scans with the "
        "answers of the live PyTorch network in fp32, for graphs in int8 of the rounded one. Differences are of logits, over "
        f"max(1, the largest of them). When this was exported:\n\n{_table(head, lines)}\n\nThe sha256 in `contract.sha256` shows "
        "damage and changes in one place. It is no "
        "signature: compare it with the one that was noted at the export (`resunet verify . --sha256 …`). bf16 of OpenVINO is the "
        "fp32 graph computed in bfloat16 where the CPU has it; fp16 of OpenVINO keeps weights in half precision and computes in "
        "single, fp16 of ONNX computes in half."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
