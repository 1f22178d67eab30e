"""summary.json and cases.csv: figures over groups of what was measured of cases, and the policy behind them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.evaluation.lesions import LESION_SIZES, LESION_VOLUMES, THIN, THIN_WIDTHS
from finetune.evaluation.metrics import METRICS, Case, CaseMeasures, Value, share, values_by_group
from finetune.evaluation.statistics import FEWEST_GROUPS, figure
from finetune.evaluation.targets import Targets
from resunet.data.cases import IGNORE

NO_POSTPROCESSING = "None: predictions are counted as they are."
_MM3_A_ML = 1000


def policy(tolerance: float, postprocessing: str = NO_POSTPROCESSING) -> dict[str, str]:
    """How the figures were counted. tolerance: mm, of surface Dice. postprocessing: what became of predictions before."""
    return {
        "postprocessing": postprocessing,
        "ignored": f"Voxels that the truth marks {IGNORE} are left out of every count: they are neither truth nor "
        "prediction, a lesion that they cut in two counts as two, and where a class ends beside them is no surface.",
        "empty": "A class absent from truth and prediction is left out of Dice, IoU, precision, recall, HD95, surface Dice and "
        "volume errors. A class absent from the truth but predicted has Dice, IoU, precision and surface Dice 0, the image's "
        "diagonal as HD95, and no recall.",
        "missed": "A class present in the truth and not predicted has Dice, IoU, recall and surface Dice 0, the image's diagonal "
        "as HD95, and no precision.",
        "macro": "Dice, IoU, precision, recall, HD95, surface Dice and volume errors of a case are the mean over its foreground "
        "classes where defined.",
        "averaging": "A figure is the mean over groups of the group's mean over its cases; n counts groups with a value.",
        "interval": "95 % at least, whatever the distribution over groups within the value's bounds, by Gaffke's method; of zeros "
        "and ones it is Clopper-Pearson's. HD95 is bound by the largest diagonal. Few groups leave it wide: that none of "
        f"them failed does not say that none does. Null below {FEWEST_GROUPS} groups, and for volume errors, which have no "
        "useful bound.",
        "millimetres": "By each file's spacing; where a file has none (PNG and the like), a pixel counts as 1 mm.",
        "surface": "HD95 and surface Dice are taken between the voxels of a class that share a face with a voxel not of it, or "
        "with the outside of the image. HD95 is the greater of the 95th percentiles of the distances in the two directions. "
        f"Surface Dice is the share of these voxels, of both sides, within {tolerance:g} mm of the other side's. A truth with "
        "ignored voxels all around is left out of both.",
        "volume_error": "relative is |P - T| / T, left out without truth; absolute |P - T| and bias P - T are in the unit that "
        "stands beside them. Where a source has images and volumes, absolute and bias are of its volumes.",
        "connectivity": "Lesions are connected components of one class: 8-connected in 2D, 26-connected in 3D. No dilation, "
        "and no smallest size.",
        "matching": "A truth lesion is found if at least one of its voxels is predicted as its class. A predicted lesion is "
        "false if it holds no truth voxel of its class. Matching is many-to-many: one predicted lesion may find several "
        "truth lesions, and several predicted lesions on one truth lesion are all true.",
        "lesions": "Of a case, all classes together: recall = found / truth lesions, precision = predicted lesions that are "
        "not false / predicted lesions, f1 = 2PR/(P+R) of these two, 0 if only one side has lesions, left out if neither "
        "has.",
        "by_size": "Recall of the truth lesions of that many voxels, ignored voxels not counted; n beside it counts truth "
        "lesions, n inside the figure counts groups. by_volume: the same by volume, of images by area, from the first number "
        "to below the second. Where a source has images and volumes, by_volume is of its volumes.",
        "by_width": f"The same of thin objects of images: at least {THIN} times as long as wide. The width, in pixels, is the "
        "diameter of the largest disc that fits into the object (distance transform of the mask enlarged twofold), its length "
        "is its area over its width. Null where no case is an image.",
        "false_alarms": "images_without_target counts the cases whose truth has no foreground and is not ignored "
        "altogether, alarmed those of them with any predicted foreground; rate is a figure, averaged over groups as all "
        "figures are, so it need not be their quotient; per_1000 is a thousand times the rate. lesions and false_alarms of a class "
        "count its own objects, and alarms in the cases whose truth lacks it, whatever else they show.",
    }


def summarise(
    cases: Sequence[Case], targets: Targets, tolerance: float, postprocessing: str = NO_POSTPROCESSING
) -> dict[str, Any]:
    """summary.json's figures of voxels, surfaces, targets, lesions and false alarms, and the policy behind them.

    tolerance: mm, with which the cases were measured. `classes` holds the targets: with regions those.
    """
    _check_names(cases, targets)
    assert all(case.tolerance == tolerance for _, _, case in cases), tolerance
    longest = max((case.diagonal for _, _, case in cases), default=0.0)
    volumes = any(case.is_volume for _, _, case in cases)

    def in_unit(of: Sequence[Case]) -> list[Case]:
        """Those that have the summary's unit."""
        return [case for case in of if case[2].is_volume == volumes]

    def all_metrics(value_of: Callable[[str], Value]) -> dict[str, Any]:
        bounds = {"hd95": (0.0, longest)}
        return {m: figure(values_by_group(cases, value_of(m)), bounds.get(m, (0.0, 1.0))) for m in METRICS} | {
            "volume_error": _volume_errors(cases, in_unit(cases), volumes, value_of)
        }

    def objects(of: Sequence[Case]) -> dict[str, Any]:
        return {"lesions": _lesions(of, in_unit(of), volumes), "false_alarms": _false_alarms(of)}

    def macro(name: str) -> Value:
        return lambda case: case.macro(name)

    def of_target(index: int) -> Callable[[str], Value]:
        return lambda name: lambda case: getattr(case.classes[index], name)

    return {
        "surface_tolerance_mm": tolerance,
        **all_metrics(macro),
        "classes": {name: all_metrics(of_target(i)) | objects(_only(cases, i)) for i, name in enumerate(targets.names)},
        **objects(cases),
        "policy": policy(tolerance, postprocessing) | ({} if targets.are_classes else {"regions": _of_regions(targets)}),
    }


def _only(cases: Sequence[Case], target: int) -> list[Case]:
    """The cases with one target: without it they are without target."""
    return [(name, group, replace(case, classes=(case.classes[target],))) for name, group, case in cases]


def _of_regions(targets: Targets) -> str:
    return (
        f"Every figure is of regions, unions of classes that may overlap: {targets.described()}. Where a class is spoken of, a "
        "region is meant. Each is measured by itself, as what it is and what it is not, so that a voxel and an object count in "
        "every region that they belong to. A foreground class that is taken for another of the same regions is right."
    )


def _volume_errors(
    cases: Sequence[Case], spatial: Sequence[Case], volumes: bool, value_of: Callable[[str], Value]
) -> dict[str, Any]:
    def in_unit(value: Value) -> Value:
        return lambda case: None if (one := value(case)) is None else one / (_MM3_A_ML if volumes else 1)

    return {
        "relative": figure(values_by_group(cases, value_of("relative_volume_error"))),
        "absolute": figure(values_by_group(spatial, in_unit(value_of("volume_error")))),
        "bias": figure(values_by_group(spatial, in_unit(value_of("volume_bias")))),
        "unit": "ml" if volumes else "mm²",
    }


def _lesions(cases: Sequence[Case], spatial: Sequence[Case], volumes: bool) -> dict[str, Any]:
    def recall_by(
        of: Sequence[Case],
        found: Callable[[CaseMeasures, float, float], list[bool]],
        ranges: Sequence[tuple[str, float, float]],
        unit: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        rows = []
        for name, start, stop in ranges:
            by_group: dict[str, list[float]] = {}
            count = 0
            for _, group, case in of:
                lesions = found(case, start, stop)
                count += len(lesions)
                if (recall := share(lesions)) is not None:
                    by_group.setdefault(group, []).append(recall)
            rows.append({"range": name, **(unit or {}), "recall": figure(by_group, (0.0, 1.0)), "n": count})
        return rows

    images = [case for case in cases if not case[2].is_volume]
    return {
        "precision": _share_over_groups(cases, lambda case: case.lesion_precision),
        "recall": _share_over_groups(cases, lambda case: case.lesion_recall()),
        "f1": _share_over_groups(cases, lambda case: case.lesion_f1),
        "by_size": recall_by(cases, CaseMeasures.lesions_found, LESION_SIZES),
        "by_volume": recall_by(
            spatial, CaseMeasures.lesions_found_by_volume, LESION_VOLUMES, {"unit": "mm³" if volumes else "mm²"}
        ),
        "by_width": recall_by(images, CaseMeasures.thin_found_by_width, THIN_WIDTHS, {"unit": "pixels"}) if images else None,
    }


def _false_alarms(cases: Sequence[Case]) -> dict[str, Any]:
    clean = [case for case in cases if case[2].without_target]
    rate = _share_over_groups(clean, lambda case: float(case.false_alarm))
    return {
        "images_without_target": len(clean),
        "alarmed": sum(measures.false_alarm for _, _, measures in clean),
        "rate": rate,
        "per_1000": per_1000(rate),
    }


def per_1000(rate: dict[str, Any]) -> dict[str, Any]:
    """A figure of a rate as one per 1,000."""
    mean, interval = rate["mean"], rate["ci95"]
    return {
        "mean": None if mean is None else 1000 * mean,
        "ci95": None if interval is None else [1000 * end for end in interval],
        "n": rate["n"],
    }


def _share_over_groups(cases: Sequence[Case], value: Value) -> dict[str, Any]:
    return figure(values_by_group(cases, value), (0.0, 1.0))


COUNTS = ("truth_voxels", "predicted_voxels", "lesions", "lesions_found", "lesions_false")  # whole numbers, of `case_rows`


def case_rows(cases: Sequence[Case], targets: Targets) -> list[dict[str, str | int | float]]:
    """cases.csv: a row for every case and foreground class, or region; what is undefined is an empty string.

    truth_volume, predicted_volume: mm³, of images mm².
    """
    _check_names(cases, targets)
    rows: list[dict[str, str | int | float]] = []
    for case_id, group, case in cases:
        for name, measures in zip(targets.names, case.classes, strict=True):
            metrics = {metric: getattr(measures, metric) for metric in METRICS}
            rows.append(
                {
                    "id": case_id,
                    "group": group,
                    "class": name,
                    **{metric: "" if value is None else value for metric, value in metrics.items()},
                    "truth_voxels": measures.truth_voxels,
                    "predicted_voxels": measures.predicted_voxels,
                    "truth_volume": measures.truth_voxels * measures.voxel,
                    "predicted_volume": measures.predicted_voxels * measures.voxel,
                    "lesions": len(measures.lesion_sizes),
                    "lesions_found": sum(measures.lesion_found),
                    "lesions_false": measures.lesions_false,
                }
            )
    return rows


def _check_names(cases: Sequence[Case], targets: Targets) -> None:
    assert len(set(targets.names)) == len(targets.names), targets.names
    assert all(len(case.classes) == len(targets.names) for _, _, case in cases), "measured by other targets"
