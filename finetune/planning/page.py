"""A plan as a page to read and as a recipe to edit."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from finetune.evaluation.targets import targets_of
from finetune.planning.facts import PERCENTILES, PartFacts
from finetune.planning.plan import Plan, reasons
from resunet.errors import InputError
from resunet.files import refuse_taken, write_text
from resunet.measuring import BUSY, GIB
from resunet.plain import WIDTH, bullet, duration, table, times, value_range
from resunet.plain import blocks as joined

# What YAML reads as itself without quotes, and as nothing else.
_PLAIN = re.compile(r"(?!(?i:true|false|yes|no|on|off|null|y|n|inf|nan)$)[A-Za-z_./][\w./-]*$")


def page(plan: Plan) -> str:
    """The plan as text."""
    train = plan.parts[0]
    names = list(plan.given.data.classes.values())[1:]
    blocks = [
        ("Cases", table([["part", "cases", "groups", "slices", "with a class"], *map(_counts, filter(_any, plan.parts))])),
        ("Sizes and spacing", "\n".join(_sizes(plan.parts, plan.given.model.spatial_dims))),
        (
            "Intensities, the median over the cases of each part's percentiles",
            table([["part", *(f"{p:g} %" for p in PERCENTILES)], *map(_intensities, filter(_any, plan.parts))]),
        ),
        ("Classes", table([["class", "part", "cases", "of pixels"], *_shares(plan.parts, names)]) + _regions(plan)),
        (f"Objects of train ({'8' if train.dimensions == 2 else '26'}-connected)", table(_objects(train, names))),
        ("What the recipe should say", "\n".join(_choices(plan))),
        ("Time and memory", "\n".join(_cost(plan))),
        ("Warnings", "\n".join(bullet("!", one) for one in plan.warnings) or "None."),
    ]
    if plan.notes:
        blocks.append(("Notes", "\n".join(bullet("-", one) for one in plan.notes)))
    return joined(blocks)


def write_recipe(plan: Plan, path: Path) -> None:
    """The planned recipe with every key as a plain value, and the reasons as comments.

    Raises:
        InputError: the name of an existing file, or of none that would be found as a recipe.
    """
    refuse_file(path)
    values = plan.recipe.model_dump(exclude={"resume"})
    lines = [
        "# Written by `resunet finetune RECIPE --plan --write`: every key as a plain value, to be edited.",
        *(f"# {line}" for line in _cost(plan)),
        f"#   resunet finetune {path}",
        *_yaml(values, reasons(plan)),
    ]
    write_text(path, "\n".join(lines) + "\n")


def refuse_file(path: Path) -> None:
    """Raises InputError unless a recipe can be written there."""
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--write {path}: a recipe is a .yaml file. Name it so.")
    refuse_taken(path, "--write ", "file", "or delete it, if it holds nobody's edits")


def _yaml(values: Mapping[Any, Any], why: Mapping[str, str], prefix: str = "", indent: int = 0) -> list[str]:
    """Lines of block YAML; a reason stands above its key."""
    lines = []
    pad = "  " * indent
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in why:
            lines += [f"{pad}# {line}" for line in textwrap.wrap(why[full], WIDTH)]
        if isinstance(value, Mapping) and value:
            lines += [f"{pad}{_scalar(key)}:", *_yaml(value, why, f"{full}.", indent + 1)]
        else:
            lines.append(f"{pad}{_scalar(key)}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    """As YAML reads it back: JSON, but for words that need no quotes."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(one) for one in value) + "]"
    if isinstance(value, str | PurePath):
        text = str(value)
        return text if _PLAIN.match(text) else json.dumps(text, ensure_ascii=False)
    return json.dumps(value)


def _any(part: PartFacts) -> bool:
    return bool(part.cases)


def _counts(part: PartFacts) -> list[str]:
    slices = sum(case.slices for case in part.cases)
    with_class = sum(case.slices_with_foreground for case in part.cases)
    return [part.name, str(len(part.cases)), str(len(part.groups)), str(slices), f"{with_class} ({with_class / slices:.0%})"]


def _sizes(parts: Sequence[PartFacts], spatial_dims: int) -> list[str]:
    cases = [case for part in parts for case in part.cases]
    lines = []
    for dimensions, axes in ((2, "y × x"), (3, "z × y × x")):
        its = [case for case in cases if len(case.size) == dimensions]
        if not its:
            continue
        sizes = np.array([case.size for case in its])
        lines.append(f"{len(its)} of {axes}: median {times(np.median(sizes, axis=0))} pixels{value_range(sizes)}")
        known = [case for case in its if case.in_mm]
        if len(known) < len(its):
            lines.append(f"  {len(its) - len(known)} do not say their spacing: their sizes are in pixels only")
        if known:
            spacing = np.array([case.spacing for case in known])
            median = np.median(spacing, axis=0)
            lines.append(
                f"  spacing: median {times(median)} mm{value_range(spacing)}; anisotropy {max(median) / min(median):.2g} "
                "(coarsest over finest axis of the median)"
            )
        if dimensions == 3 and spatial_dims == 2:
            lines.append(
                f"  sliced along the coarsest axis: median slice {times(np.median([c.plane for c in its], axis=0))} pixels"
            )
    return lines


def _intensities(part: PartFacts) -> list[str]:
    medians = np.median([case.percentiles for case in part.cases], axis=0)
    return [part.name, *(f"{value:.4g}" for value in medians)]


def _shares(parts: Sequence[PartFacts], names: Sequence[str]) -> list[list[str]]:
    return [
        [name, part.name, f"{part.cases_with(index)} of {len(part.cases)}", f"{part.share(index):.3%}"]
        for index, name in enumerate(names)
        for part in filter(_any, parts)
    ]


def _regions(plan: Plan) -> str:
    """What the loss and the figures are of, where that is not the classes."""
    data = plan.given.data
    if data.regions is None:
        return ""
    return f"\n\nTrained and judged by regions: {targets_of(data.classes, data.regions).described()}"


def _objects(train: PartFacts, names: Sequence[str]) -> list[list[str]]:
    unit = "mm²" if train.dimensions == 2 else "mm³"
    header = ["class", "objects", "a case: median (range)", "pixels: smallest", "5 %", "median", "largest"]
    rows = [header + ([f"{unit}: smallest", "5 %", "median"] if train.in_mm else [])]
    for index, name in enumerate(names):
        counts, pixels, volumes = train.object_counts(index), train.object_pixels(index), train.object_volumes(index)
        if not len(pixels):
            rows.append([name, "0", *[""] * (len(rows[0]) - 2)])
            continue
        low, middle = np.percentile(pixels, [5, 50], method="nearest")
        row = [name, str(len(pixels)), f"{np.median(counts):g} ({counts.min()}–{counts.max()})"]
        row += [f"{value:g}" for value in (pixels[0], low, middle, pixels[-1])]
        if train.in_mm:
            row += [f"{value:.3g}" for value in (volumes[0], *np.percentile(volumes, [5, 50], method="nearest"))]
        rows.append(row)
    return rows


def _choices(plan: Plan) -> list[str]:
    lines = []
    for choice in plan.choices:
        verdict = (
            f"{_scalar(choice.before)} → {_scalar(choice.value)}" if choice.changed else f"{_scalar(choice.value)} (as it is)"
        )
        lines.append(f"{choice.key}: {verdict}")
        lines += textwrap.wrap(choice.reason, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def _cost(plan: Plan) -> list[str]:
    cost, seconds = plan.cost, plan.seconds()
    ranks = plan.recipe.processes
    each = ", ".join(f"{what} {duration(its)}" for what, its in seconds.items() if its)
    memory = f"{cost.memory / GIB:.2g} GiB " + (
        "on the GPU" if cost.device == "cuda" else "of the process at its peak, data included"
    )
    what = "volume" if plan.recipe.model.spatial_dims == 3 else "slice"
    count = sum(1 if what == "volume" else case.slices for case in plan.parts[0].cases)
    views = plan.recipe.steps * plan.recipe.batch * plan.recipe.accumulate / max(1, count)
    lines = [
        f"{cost.step:.3g} s a step (median of {cost.steps_measured} on this machine's {cost.device}, as planned above)",
        f"{duration(sum(seconds.values()))} for {plan.recipe.steps} steps: {each}",
        f"{memory}",
        f"{plan.recipe.steps} steps show each training {what} {views:.3g} times",
    ]
    if cost.device == "cpu" and cost.busy > BUSY:
        lines.append(f"other work ran beside it (load {cost.busy:.1f} for each core): alone it is faster")
    if ranks > 1:
        lines.append(
            f"measured in one process with a rank's share of the batch; {ranks} ranks add the time to exchange gradients"
        )
    return lines
