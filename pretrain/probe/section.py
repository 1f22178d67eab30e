"""What the report of a pretraining run says of its probe."""

from collections.abc import Mapping

from pretrain.probe.picture import draw_predictions
from pretrain.probe.probe import Probe
from pretrain.recipe import PretrainRecipe
from resunet.pictures import SWATCHES
from resunet.report import Section, curves, image

Metrics = Mapping[str, tuple[list[float], list[float]]]

_FIGURES = (
    ("probe_alignment", "Alignment: squared distance of two views of a scan; 0 is best", "alignment"),
    ("probe_uniformity", "Uniformity: 0 is collapse, lower is more even", "uniformity"),
)


def probe_section(recipe: PretrainRecipe, probe: Probe, metrics: Metrics) -> list[Section]:
    """Nothing where there was no probe."""
    if recipe.probe is None or probe.scans is None:
        return []
    steps, dice = metrics["probe_dice"]
    pictures = [
        curves({"Dice": (steps, dice)}, "Dice of the probe by step; step 0 is the untrained encoder", "step", "Dice", True),
        *(curves({label: metrics[name]}, caption, "step", label) for name, caption, label in _FIGURES),
        curves(
            {"RankMe": metrics["probe_rankme"]},
            f"RankMe: effective rank of the embeddings, of {probe.embeddings} views in {recipe.model.widths[-1]} dimensions",
            "step",
            "RankMe",
            True,
        ),
        curves({"std": metrics["probe_std"]}, "Spread of the normalised embeddings; 0 is collapse", "step", "std", True),
        image(
            draw_predictions(recipe.out, probe.scans),
            f"A probe scan and its truth; below, what the probe made of it at step {steps[0]:g} and at step {steps[-1]:g}",
        ),
    ]
    return [
        Section("Probe", text=[_what(recipe, probe), *_chosen(recipe, probe, steps, dice)], legend=SWATCHES, pictures=pictures)
    ]


def _what(recipe: PretrainRecipe, probe: Probe) -> str:
    assert recipe.probe is not None and probe.scans is not None
    settings, names = recipe.probe, list(recipe.probe.classes.values())
    counted = [names[c] for c in probe.scans.told_apart()]
    left = [name for name in names[1:] if name not in counted]
    how = "the nearest class mean" if settings.kind == "prototype" else f"its {settings.neighbours} nearest labelled pixels"
    groups = len(probe.scans.labels.groups)
    others = "other groups" if groups > 1 else "the other slices of the one group, some of them neighbours, which flatters"
    return (
        f"{len(probe.scans.scans)} {'slices' if recipe.model.spatial_dims == 2 else 'volumes'} of {groups} labelled "
        f"{'groups' if groups > 1 else 'group'} of the pool; they count as labels. Each pixel is labelled by {how} in {others}, by "
        f"the features of all levels, frozen. Dice is over all pixels together, the mean over {', '.join(counted)}"
        + (f"; {', '.join(left)} occur in too few of the scans to be counted." if left else ".")
    )


def _chosen(recipe: PretrainRecipe, probe: Probe, steps: list[float], dice: list[float]) -> list[str]:
    best = max(range(len(dice)), key=lambda i: dice[i])
    told = ((steps[i], dice[i]) for i in (0, -1, best))
    said = "Dice {:.3f} at step {:g}, {:.3f} at step {:g}, at best {:.3f} at step {:g}.".format(
        *(number for step, value in told for number in (value, step))
    )
    if probe.chooses:
        chosen = f"The encoder is the checkpoint of step {probe.best_step}: probe.choose=best."
    else:
        chosen = f"The encoder is the last checkpoint, of step {recipe.steps}. The probe is a diagnostic: it chose nothing."
    worse = "No step of training is better here than the untrained encoder." if best == 0 and len(dice) > 1 else ""
    return [said, chosen, *([worse] if worse else [])]
