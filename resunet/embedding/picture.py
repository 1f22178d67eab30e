"""A 2D map of embeddings: their first two principal components, with some of the scans on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from resunet.report import COLOURS, Picture, drawing, svg

if TYPE_CHECKING:  # a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES = (5.4, 5.0)
_AXES = (0.13, 0.115, 0.84, 0.865)  # left, bottom, width, height: shares of the figure
_BAR = 0.16  # of the width, where there is a colour bar
_THUMBNAIL = 32  # points a side, of 72 an inch
_GAP = 3


@dataclass(frozen=True)
class Plane:
    """Points on the two axes of largest variance. places: (n, 2); explained: the share of the variance on each."""

    places: NDArray[np.float64]
    explained: tuple[float, float]


@dataclass(frozen=True)
class Colouring:
    """What the colours of points say. values: (n,); names: of classes, which the values are then indices of; else a scale."""

    label: str
    values: NDArray[np.float64]
    names: Sequence[str] = ()


def principal_plane(vectors: NDArray[np.floating]) -> Plane:
    """Principal component analysis by singular values; of each axis the largest loading is positive, so that it is one map."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    axes = np.vstack([axes, np.zeros((2, centred.shape[1]))])[:2]  # of a single point or dimension there is one axis at most
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])
    variance = np.concatenate([singular**2, [0.0, 0.0]])
    total = variance.sum()
    shares = variance[:2] / total if total > 0 else np.zeros(2)
    return Plane(centred @ (axes * signs[:, None]).T, (float(shares[0]), float(shares[1])))


def thumbnail(values: NDArray[np.float32], side: int = 64) -> NDArray[np.uint8]:
    """(C, y, x) as a grey square picture: the mean of the channels, shrunk by area, centred on black."""
    height, width = values.shape[1:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    grey = torch.from_numpy(np.ascontiguousarray(values.mean(axis=0)))[None, None]
    small = F.interpolate(grey, size, mode="area" if scale < 1 else "nearest")[0, 0].numpy()
    low, high = np.percentile(small, [0.5, 99.5])
    shades = np.clip((small - low) / max(high - low, 1e-6), 0, 1) * 255
    out = np.zeros((side, side), np.uint8)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    out[top : top + size[0], left : left + size[1]] = shades.round().astype(np.uint8)
    return out


def map_picture(
    plane: Plane,
    colouring: Colouring | None,
    pictures: Sequence[tuple[int, NDArray[np.uint8]]],
    caption: str,
    alt: str,
    marked: Sequence[int] = (),
) -> Picture:
    """Points, and pictures where they are points of; a picture that would overlap an earlier one is left out.

    Args:
        pictures: (point, square grey picture), those that matter most first.
        marked: points that get a number, from 1.
        alt: what is to be seen, for those who cannot.
    """
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    with drawing():
        figure = Figure(figsize=_INCHES)
        left, bottom, width, height = _AXES
        with_bar = colouring is not None and not colouring.names
        shape = (width - (_BAR if with_bar else 0), height)
        axes = figure.add_axes((left, bottom, *shape))
        _scatter(figure, axes, plane, colouring)
        low, high = _limits(plane.places)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        extent = np.array(_INCHES) * shape * 72
        at = (plane.places - low) / (high - low) * extent
        for number, centre in place_boxes(at[[point for point, _ in pictures]], extent, _THUMBNAIL + _GAP):
            image = OffsetImage(pictures[number][1], zoom=_THUMBNAIL / pictures[number][1].shape[0], cmap="gray", clim=(0, 255))
            frame = dict(linewidth=0.6, edgecolor="0.2")
            axes.add_artist(AnnotationBbox(image, tuple(low + centre / extent * (high - low)), pad=0.05, bboxprops=frame))
        disc = dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor="0.2", linewidth=0.8)
        for number, point in enumerate(marked, 1):
            axes.text(
                float(plane.places[point, 0]),
                float(plane.places[point, 1]),
                str(number),
                fontsize=10,
                va="center",
                ha="center",
                zorder=10,
                bbox=disc,
            )
        drawn = svg(figure, alt)
    return Picture(drawn.markup, caption)


def place_boxes(places: NDArray[np.float64], extent: NDArray[np.float64], side: float) -> list[tuple[int, NDArray[np.float64]]]:
    """Which squares of a side can stand on their places, moved into the extent, without overlapping, and their centres.

    The earlier ones stand.
    """
    placed: list[tuple[int, NDArray[np.float64]]] = []
    for number, place in enumerate(places):
        centre = np.clip(place, side / 2, extent - side / 2)
        if all(np.abs(centre - other).max() >= side for _, other in placed):
            placed.append((number, centre))
    return placed


def spread_out(places: NDArray[np.float64]) -> list[int]:
    """All places, each as far as can be from those before it; the first is the one nearest to the middle."""
    if not len(places):
        return []
    nearest = np.full(len(places), np.inf)
    order = [int(((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    while len(order) < len(places):
        nearest = np.minimum(nearest, ((places - places[order[-1]]) ** 2).sum(axis=1))
        nearest[order[-1]] = -1
        order.append(int(nearest.argmax()))
    return order


def _scatter(figure: "Figure", axes: "Axes", plane: Plane, colouring: Colouring | None) -> None:
    x, y = plane.places.T
    style: dict[str, Any] = dict(s=14, alpha=0.75, linewidths=0)
    if colouring is None:
        axes.scatter(x, y, color=COLOURS[0], **style)
    elif colouring.names:
        for number, name in enumerate(colouring.names):
            its = colouring.values == number
            axes.scatter(x[its], y[its], color=COLOURS[number % len(COLOURS)], label=name, **style)
        axes.legend(title=colouring.label, loc="best", framealpha=0.85, handletextpad=0.2, markerscale=1.6)
    else:
        points = axes.scatter(x, y, c=colouring.values, cmap="viridis", **style)
        figure.colorbar(points, cax=figure.add_axes((0.86, _AXES[1], 0.03, _AXES[3]))).set_label(colouring.label)
    for axis, name, share in zip((axes.xaxis, axes.yaxis), ("1st", "2nd"), plane.explained, strict=True):
        axis.set_label_text(f"{name} component ({share:.0%} of the variance)")
        axis.set_ticks([])
    axes.spines[["top", "right"]].set_visible(False)


def _limits(places: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = places.min(axis=0), places.max(axis=0)
    margin = np.where(high > low, 0.05 * (high - low), 1.0)
    return low - margin, high + margin
