"""report.html: self-contained pages of text, tables, curves and pictures; what a person opens first."""

import base64
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from resunet.files import write_text

if TYPE_CHECKING:  # a second to import, and many pages have no curves
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """Something to look at, as inline markup, with the words under it."""

    markup: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """A block of the page; the first row of `table` is its header. legend: colour and what it stands for."""

    heading: str = ""
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    text: Sequence[str] = ()
    legend: Sequence[tuple[tuple[int, int, int], str]] = ()
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = field(default=())


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Render a page, atomically."""
    environment = Environment(loader=PackageLoader("resunet", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    try:
        installed = version("resunet")
    except PackageNotFoundError:
        installed = "(not installed)"
    page = environment.get_template("report.html.j2").render(title=title, sections=sections, version=installed)
    write_text(path, page)


def image(pixels: NDArray[np.uint8], caption: str, scale: int = 1, alt: str | None = None) -> Picture:
    """Pixels (y, x) or (y, x, 3) as an inline PNG; `scale` repeats pixels, so that small images keep their edges.

    alt: what is to be seen, for those who cannot; the caption without it.
    """
    enlarged = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(enlarged).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(Markup(f'<img alt="{escape(alt or caption)}" src="data:image/png;base64,{data}">'), caption)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    caption: str,
    xlabel: str,
    ylabel: str,
    from_zero: bool = False,
) -> Picture:
    """Lines, name → (x, y), as an inline SVG; `from_zero` where the distance to 0 is what matters."""
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.subplots()
        for (name, (x, y)), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
            axes.plot(x, y, label=name, color=colour, linewidth=1.8, marker="o" if len(x) == 1 else None)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False)
        return svg(figure, caption)


def drawing() -> AbstractContextManager[None]:
    """In which figures are made: with text that can be read when a phone shows them smaller."""
    import matplotlib

    return matplotlib.rc_context({"font.size": 11, "legend.fontsize": 10})


def svg(figure: "Figure", caption: str) -> Picture:
    """A matplotlib figure as an inline SVG with a name for screen readers."""
    import matplotlib

    buffer = io.StringIO()
    # a fixed salt, so that the same figure gives the same ids
    with matplotlib.rc_context({"svg.hashsalt": caption, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return Picture(Markup(text), caption)


def read_metrics(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """metrics.jsonl of a run as name → (steps, values)."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            steps, its = found.setdefault(name, ([], []))
            steps.append(step)
            its.append(value)
    return found


def shown(figure: Figures, digits: int = 3, why: bool = True) -> str:
    """A figure of summary.json as 'mean [low, high], n'; why: there is no interval, where there is none."""
    if figure["mean"] is None:
        return "undefined"
    interval = figure.get("ci95")
    bounds = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    bounds = bounds or (" (too few groups for an interval)" if why else " [–]")
    return f"{figure['mean']:.{digits}f}{bounds}, n = {figure['n']}"
