"""Pictures of a Grad-CAM map over its scan, with the outlines of prediction and truth and a colour bar."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

LEGEND = (
    "Left the scan, right the map over it, from dark (none) to bright yellow (the most in this picture). White: outline of what "
    "is predicted. Dashed blue: of what is true."
)
_LONGEST = 768  # pixels a side of what is drawn; more is reduced
_PANEL = 4.0  # inches
_DPI = 96
_OPACITY, _FULL_FROM = 0.7, 0.35  # where little was found the scan stays visible
_PREDICTED, _TRUE = "white", "#56B4E9"
_AROUND = 3  # times a lesion's extent is what a close-up shows
_CLOSEST = 48  # pixels a side that a close-up shows at least

Box = tuple[slice, slice]


def heat_picture(
    grey: NDArray[np.uint8],
    heat: NDArray[np.float32],
    predicted: NDArray[np.bool_],
    truth: NDArray[np.bool_] | None,
    title: str,
    close_up: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """(y, x, 3): the scan, the map over it, and with `close_up` (y, x) the map around that region.

    grey: (y, x, 3). heat: (y, x), not negative; its largest value is the end of the colour bar.
    """
    highest = float(heat.max())
    shown = heat / highest if highest > 0 else heat
    whole = (slice(0, heat.shape[0]), slice(0, heat.shape[1]))
    box = _around(close_up) if close_up is not None else whole
    boxes = [whole, whole] + ([box] if _is_closer(box, heat.shape) else [])
    height = _PANEL * min(max(heat.shape[0] / heat.shape[1], 0.4), 2.5)
    figure = Figure(figsize=(_PANEL * len(boxes) + 0.9, height + 0.75), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(boxes), squeeze=False)[0]
    for axes, part, with_heat in zip(panels, boxes, (False, True, True), strict=False):
        _draw(axes, grey[part], shown[part] if with_heat else None)
        _outline(axes, predicted[part], _PREDICTED, "solid")
        if truth is not None:
            _outline(axes, truth[part], _TRUE, "dashed")
    if len(boxes) > 2:
        panels[0].add_patch(_frame(box))
    if highest == 0:
        note = {"transform": panels[1].transAxes, "ha": "center", "color": "white", "fontsize": 10}
        panels[1].text(
            0.5, 0.04, "nothing for the class in this layer", **note, bbox={"facecolor": "black", "edgecolor": "none"}
        )
    _describe(figure, panels, title, truth is not None)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _colours() -> ListedColormap:
    """Inferno, perceptually uniform and readable without red or green, that fades out towards 0."""
    rgba = matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))
    rgba[:, 3] = _OPACITY * np.clip(np.linspace(0, 1, 256) / _FULL_FROM, 0, 1)
    return ListedColormap(rgba)


def _draw(axes: Axes, grey: NDArray[np.uint8], shown: NDArray[np.float32] | None) -> None:
    height, width = grey.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(_reduce(grey, "mean").astype(np.uint8), extent=extent, interpolation="nearest")
    if shown is not None:
        axes.imshow(_reduce(shown, "mean"), extent=extent, cmap=_colours(), vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str, style: str) -> None:
    """Along the edges of the pixels, over a dark line that sets it off."""
    if not mask.any() or mask.all():
        return
    height, width = mask.shape
    small = _reduce(mask, "max")
    fine = max(2, _LONGEST // max(small.shape))
    grown = np.pad(small, 1).repeat(fine, axis=0).repeat(fine, axis=1)
    y, x = (
        (np.arange(count) + 0.5) / fine * (n / pixels) - n / pixels - 0.5
        for count, n, pixels in zip(grown.shape, (height, width), small.shape, strict=True)
    )
    axes.contour(x, y, grown, [0.5], colors="black", linewidths=2.4, alpha=0.6)
    axes.contour(x, y, grown, [0.5], colors=colour, linewidths=1.2, linestyles=style)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _describe(figure: Figure, panels: Sequence[Axes], title: str, with_truth: bool) -> None:
    figure.suptitle(title, fontsize=10)
    lines = [Line2D([], [], color=_PREDICTED, label="predicted")]
    if with_truth:
        lines.append(Line2D([], [], color=_TRUE, linestyle="dashed", label="true"))
    figure.legend(
        handles=lines, loc="outside lower center", ncols=2, fontsize=9, facecolor="0.25", labelcolor="white", borderpad=0.3
    )
    bar = figure.colorbar(ScalarMappable(cmap=_colours()), ax=list(panels), ticks=[0, 0.5, 1], shrink=0.9, pad=0.01)
    bar.ax.set_facecolor("0.35")
    bar.set_label("share of the largest value", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _around(region: NDArray[np.bool_]) -> Box:
    """A square box, cut to the image, around a region."""
    sides = [np.flatnonzero(region.any(axis=1 - axis)) for axis in (0, 1)]
    side = max(_CLOSEST, _AROUND * max(int(where[-1] - where[0]) + 1 for where in sides))
    rows, columns = (
        slice(start, min(start + side, n))
        for where, n in zip(sides, region.shape, strict=True)
        for start in [max(0, min(int(where[0] + where[-1] + 1) // 2 - side // 2, n - side))]
    )
    return rows, columns


def _is_closer(box: Box, size: Sequence[int]) -> bool:
    return any(part.stop - part.start <= n * 2 / 3 for part, n in zip(box, size, strict=True))


def _frame(box: Box) -> Rectangle:
    rows, columns = box
    corner = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=0.8, linestyle="dotted")


def _reduce(values: NDArray, how: str) -> NDArray:
    """(y, x, …) at most `_LONGEST` a side, block by block: 'mean', or 'max', which loses no small object."""
    block = -(-max(values.shape[:2]) // _LONGEST)
    if block == 1:
        return values
    pad = [(0, -n % block) for n in values.shape[:2]] + [(0, 0)] * (values.ndim - 2)
    padded = np.pad(values, pad, mode="edge")
    blocks = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block, *values.shape[2:])
    reduced: NDArray = blocks.mean(axis=(1, 3), dtype=np.float32) if how == "mean" else blocks.max(axis=(1, 3))
    return reduced
