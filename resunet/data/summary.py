"""What an index found, for people: lines on the terminal, and M.html with a contact sheet and intensity histograms."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from resunet.data.describe import PERCENTILES
from resunet.data.manifest import Manifest, beside
from resunet.plain import number_of
from resunet.report import COLOURS, Picture, Section, image, write_page

_SHOWN = 12  # lines of a table
_SHEET = (6, 10)  # rows and columns of the contact sheet
_TILE = 96  # pixels
_KINDS = 6  # histograms
_POOLED = 2_000  # scans in one of them, at most
_PLOT, _MARGIN = (260, 100), (20, 8)  # pixels of a histogram, and beside and above it


def summary_lines(manifest: Manifest) -> list[str]:
    """What the terminal says: how many, of what, of whom, what was rejected."""
    table = manifest.columns("format", "modality", "shape", "spacing", "group", "pixel_sha256", "mask", "files")
    volumes = pc.sum(pc.equal(pc.list_value_length(table.column("shape")), 3)).as_py() or 0
    groups = pc.count_distinct(table.column("group")).as_py()
    copies = manifest.num_rows - pc.count_distinct(table.column("pixel_sha256")).as_py()
    known = "" if manifest.groups_known else " (not of every scan did anybody say whose it is)"
    lines = [
        f"{number_of(manifest.num_rows, 'scan')} of {number_of(pc.sum(table.column('files')).as_py(), 'file')}: "
        f"{number_of(manifest.num_rows - volumes, 'image')}, {number_of(volumes, 'volume')}",
        f"{number_of(groups, 'group')}{known}, {manifest.num_rows - table.column('mask').null_count:,} with a mask, "
        f"{copies:,} of the same pixels as another",
        _line("kinds", _counted(_kinds(table))),
        _line("sizes", _counted_sizes(table.column("shape"), "×", 0)),
        _line("spacings (mm)", _counted_sizes(table.column("spacing"), " × ", 2)),
    ]
    reasons = rejected(manifest.path)
    lines.append(f"{number_of(sum(count for _, count in reasons), 'file')} rejected" + (":" if reasons else ""))
    return lines + [f"  {count:,} × {reason}" for reason, count in reasons[:_SHOWN]]


def rejected(manifest: Path) -> list[tuple[str, int]]:
    """Reasons of rejection and how often, the most frequent first; reasons that differ in numbers only are one."""
    reasons = pq.read_table(beside(manifest, "rejects.parquet"), columns=["reason"]).column(0).to_pylist()
    alike: dict[str, list[str]] = {}
    for reason in sorted(reasons):
        alike.setdefault(re.sub(r"\d+", "", reason), []).append(reason)
    return sorted(((its[0], len(its)) for its in alike.values()), key=lambda pair: (-pair[1], pair[0]))


def write_summary(manifest: Manifest) -> Path:
    """M.html; its path. Nothing in it names a person, but for what the pictures show."""
    table = manifest.columns("format", "modality", "dtype", "shape", "spacing", "channels")
    kinds = pc.binary_join_element_wise(_kinds(table), table.column("dtype"), ", ")
    described = [
        ("Kind", _counted(kinds)),
        ("Size (pixels)", _counted_sizes(table.column("shape"), "×", 0)),
        ("Spacing (mm)", _counted_sizes(table.column("spacing"), " × ", 2)),
        ("Channels", _counted(table.column("channels").cast(pa.string()))),
    ]
    sections = [Section("What there is", lead=summary_lines(manifest)[:2])]
    sections += [Section(f"By {name[0].lower()}{name[1:]}", table=_table(name, counted)) for name, counted in described]
    sections.append(Section("Intensities", text=[_HISTOGRAM_TEXT], pictures=_histograms(manifest, kinds)))
    sections.append(
        Section("Contact sheet", text=["A spread of the archive; of a volume its middle."], pictures=[_sheet(manifest)])
    )
    reasons = rejected(manifest.path)
    if reasons:
        rows = [("Reason", "Files"), *((reason, f"{count:,}") for reason, count in reasons)]
        sections.append(
            Section(
                "Rejected",
                text=[f"Which files these are stands in {beside(manifest.path, 'rejects.parquet').name}."],
                table=rows,
            )
        )
    path = beside(manifest.path, "html")
    write_page(path, "An archive of scans", sections)
    return path


_HISTOGRAM_TEXT = (
    "Of every scan 13 percentiles are known; the curves are the densities between them, averaged over scans, "
    "within the 0.5th and 99.5th percentile of most."
)


def _counted(values: pa.ChunkedArray) -> list[tuple[str, int]]:
    return _by_count((one["values"], one["counts"]) for one in pc.value_counts(values).to_pylist())


def _counted_sizes(values: pa.ChunkedArray, joint: str, digits: int) -> list[tuple[str, int]]:
    """Of lists of numbers, as they read: (128, 128) → 128×128."""
    lengths = pc.list_value_length(values)
    counts: Counter[str] = Counter()
    for length in pc.unique(lengths).to_pylist():
        rows = pc.list_flatten(values.filter(pc.equal(lengths, length))).to_numpy().reshape(-1, length)
        for row, count in zip(*np.unique(rows.round(digits), axis=0, return_counts=True), strict=True):
            counts[joint.join(f"{value:.{digits}f}" for value in row)] += int(count)
    return _by_count(counts.items())


def _by_count(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))


def _kinds(table: pa.Table) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(
        pc.binary_join_element_wise(pc.utf8_upper(table.column("format")), table.column("modality"), " ")
    )


def _line(what: str, counted: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{count:,} {value}" for value, count in counted[:_SHOWN])
    return f"{what}: {shown}" + (f", {len(counted) - _SHOWN} others" if len(counted) > _SHOWN else "")


def _table(name: str, counted: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    rows = [(name, "Scans"), *((value, f"{count:,}") for value, count in counted[:_SHOWN])]
    rest = sum(count for _, count in counted[_SHOWN:])
    return [*rows, (f"{len(counted) - _SHOWN} others", f"{rest:,}")] if rest else rows


def _histograms(manifest: Manifest, kinds: pa.ChunkedArray) -> list[Picture]:
    percentiles = pc.list_flatten(manifest.column("percentiles")).to_numpy().reshape(-1, len(PERCENTILES))
    pictures = []
    for (kind, count), colour in zip(_counted(kinds)[:_KINDS], COLOURS, strict=False):
        own = percentiles[pc.equal(kinds, kind).to_numpy()]
        spread = np.linspace(0, len(own) - 1, min(len(own), _POOLED)).astype(int)
        edges, density = pooled_histogram(own[spread].astype(np.float64))
        pictures.append(stairs(edges, density, colour, f"{kind}: {count:,} scans"))
    return pictures


def stairs(edges: NDArray[np.float64], density: NDArray[np.float64], colour: str, caption: str) -> Picture:
    """A histogram as an inline SVG. By hand: importing and running what draws figures takes longer than the rest of the page."""
    (width, height), (left, top) = _PLOT, _MARGIN
    across = left + (edges - edges[0]) / (edges[-1] - edges[0]) * width
    down = top + height * (1 - density / max(density.max(), 1e-12))
    corners = " ".join(f"L{x0:.1f} {y:.1f}L{x1:.1f} {y:.1f}" for x0, x1, y in zip(across[:-1], across[1:], down, strict=True))
    base = top + height
    marks = ticks(float(edges[0]), float(edges[-1]))
    places = left + (np.array(marks) - edges[0]) / (edges[-1] - edges[0]) * width
    axis = [f'<path d="M{left} {base}H{left + width}" stroke="currentColor"/>']
    for mark, x in zip(marks, places, strict=True):
        axis.append(f'<path d="M{x:.1f} {base}v4" stroke="currentColor"/><text x="{x:.1f}" y="{base + 16}">{mark:g}</text>')
    axis.append(f'<text x="{left + width / 2}" y="{base + 34}">value in the file</text>')
    whole = width + 2 * left
    markup = (
        f'<svg role="img" aria-label="{escape(caption)}" viewBox="0 0 {whole} {base + 42}" width="{whole}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle" fill="currentColor">'
        f'<path d="M{left} {base}{corners}L{left + width} {base}Z" fill="{colour}" fill-opacity="0.75"/>{"".join(axis)}</svg>'
    )
    return Picture(Markup(markup), caption)


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two others: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / 5
    power = 10 ** np.floor(np.log10(raw))
    step = float(power * next(factor for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9)))
    return [step * count for count in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]


def pooled_histogram(percentiles: NDArray[np.float64], bins: int = 64) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges and the mean share of values in each bin, from every scan's own percentiles (n, len(PERCENTILES))."""
    low, high = np.median(percentiles[:, 1]), np.median(percentiles[:, -2])
    if low >= high:
        low, high = percentiles.min(), max(percentiles.max(), percentiles.min() + 1)
    edges = np.linspace(low, high, bins + 1)
    below = np.mean([np.interp(edges, own, PERCENTILES, left=0, right=100) for own in percentiles], axis=0)
    return edges, np.diff(below) / 100


def _sheet(manifest: Manifest) -> Picture:
    """Scans at even distances in the order of ids, which is random."""
    count = min(_SHEET[0] * _SHEET[1], manifest.num_rows)
    chosen = np.linspace(0, manifest.num_rows - 1, count).round().astype(int)
    columns = min(_SHEET[1], count)
    sheet = np.full((-(-count // columns) * (_TILE + 4), columns * (_TILE + 4)), 255, np.uint8)
    for place, row in enumerate(chosen):
        tile = Image.fromarray(manifest.thumbnail(int(row))[0]).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        top, left = (index * (_TILE + 4) + 2 for index in divmod(place, columns))
        sheet[top : top + _TILE, left : left + _TILE] = np.asarray(tile)
    return image(sheet, f"{count:,} of {manifest.num_rows:,} scans")
