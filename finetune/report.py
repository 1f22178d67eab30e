"""The report of a fine-tuning run: how good, on how many, where it fails, and what came from the encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.evaluate import evaluation_sections
from finetune.evaluation.outputs import Measured
from finetune.evaluation.page import policy_section
from finetune.labelled import LabelledData
from finetune.recipe import FinetuneRecipe
from finetune.start import origin_of
from resunet.checkpoint import ModelConfig
from resunet.gradients import gradients_section
from resunet.model import Segmenter
from resunet.plain import number_of
from resunet.report import Section, curves, read_metrics, shown, write_page
from resunet.transfer import Receipt

_LOSSES = ("loss", "focal", "dice", "distillation", "consistency")


def write_report(
    recipe: FinetuneRecipe,
    data: LabelledData,
    receipt: Receipt | None,
    measured: Sequence[Measured],
    summary: dict[str, Any] | None,
    model: Segmenter,
) -> None:
    """report.html of a finished run; `summary` is evaluation/summary.json, None where there are no test cases."""
    counts = ", ".join(
        f"{number_of(len(cases), f'{name} case')} of {number_of(len({case.case.group for case in cases}), 'group')}"
        for name, cases in (("training", data.train), ("val", data.val), ("test", data.test))
    )
    lead = (
        "Not evaluated: there are no test cases, or the recipe says evaluate_test=false."
        if summary is None
        else f"Test Dice {shown(summary['dice'])} groups."
    )
    metrics = read_metrics(recipe.out)
    text = [
        f"{counts}. {recipe.steps} steps.",
        _checkpoint(recipe, metrics),
        origin_of(recipe, receipt),
        *_taught(recipe, model.config),
        *_chosen_on_val(model.config),
    ]
    sections = [Section(lead=[lead], notes=data.notes(), text=text)]
    if summary is not None:
        sections += evaluation_sections(
            recipe.out / "evaluation", model, measured, summary, recipe.precision_of_test, recipe.inference
        )
    sections.append(
        Section(
            "Learning",
            pictures=[
                curves({n: metrics[n] for n in _LOSSES if n in metrics}, "Training loss by step", "step", "loss"),
                curves({"val": metrics["val_dice"]}, "Dice of the whole val scans by step", "step", "Dice"),
            ],
        )
    )
    gradients = gradients_section(recipe.out)
    sections += [gradients] if gradients is not None else []
    sections += [policy_section(summary)] if summary is not None else []
    write_page(recipe.out / "report.html", "Fine-tuning", sections)


def _checkpoint(recipe: FinetuneRecipe, metrics: Mapping[str, tuple[list[float], list[float]]]) -> str:
    """Which step's network this is."""
    if recipe.checkpoint == "last":
        return "The model is the last checkpoint; val did not choose it."
    steps, dice = metrics["val_dice"]
    best = max(range(len(steps)), key=lambda look: (dice[look], look))
    return f"The model is the checkpoint of step {steps[best]:.0f}, the best on val of {len(steps)} looks."


def _taught(recipe: FinetuneRecipe, config: ModelConfig) -> list[str]:
    """Who else taught it, and how."""
    if (steady := recipe.consistency) is not None:
        boxes = f", {steady.cutmix:.0%} of them with a box of another" if steady.cutmix else ""
        return [
            f"Unlabelled scans were {steady.unlabelled:.0%} of a batch{boxes}, learned from the moving average of the weights "
            f"(decay {recipe.ema:g}), weight {steady.weight:g}."
        ]
    if (digest := config.provenance.teacher_sha256) is None:
        return []
    how = recipe.distillation
    weights = {"soft targets": how.logits_weight, "soft Dice": how.dice_weight, "attention maps": how.attention_weight}
    told = " and ".join(f"{name} of weight {weight:g}" for name, weight in weights.items() if weight)
    temperature = f", temperature {how.temperature:g}" if how.logits_weight else ""
    return [f"Distilled from a teacher, weights {digest[:12]}…: {told}{temperature}."]


def _chosen_on_val(config: ModelConfig) -> list[str]:
    """What val chose beside the checkpoint."""
    said = []
    if config.postprocessing is not None:
        said.append(f"Post-processing: {config.postprocessing.described()}")
    if (point := config.operating_point) is not None:
        said.append(
            f"Operating point: probability {point.threshold:.6g}, for at most {point.budget:g} false alarms in 1,000 cases without "
            f"target; on val {point.alarmed} of {point.clean}."
        )
    return said
