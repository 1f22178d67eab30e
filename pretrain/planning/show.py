"""`resunet pretrain RECIPE --show-views out.png`: scans beside the views that the run would make of them first."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from pretrain.archive import read_archive
from pretrain.example_views import SHOWN, Example, Picture, examples, resized
from pretrain.loader import ContrastiveSets
from pretrain.planning.alone import before_training
from pretrain.recipe import PretrainRecipe
from pretrain.refusals import refuse_impossible
from resunet.errors import InputError
from resunet.files import file_aside, refuse_taken

_SIDE = 200  # pixels of a square picture on the page, at least
_GAP, _MARGIN, _LINE = 8, 24, 22  # pixels
# the font that comes with Pillow has no multiplication sign
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def show_views(recipe: PretrainRecipe, out: Path) -> Path:
    """Write the page; `out`. Nothing is trained, and no run directory is made.

    Of the first set, only the scans that are shown are read again after the archive was prepared.

    Raises:
        ResUNetError: whatever would stop the run as well, but a leak; a file that exists or is no PNG.
    """
    if out.suffix != ".png":
        raise InputError(f"--show-views {out}: is a PNG with scans and their views. Name a new .png file.")
    refuse_taken(out, "--show-views ", "file")
    recipe, accelerator = before_training(recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": None})}))
    archive = read_archive(recipe, accelerator)
    refuse_impossible(recipe, archive, speaks=True)
    # a rank's share of the set that is as small as it may be and holds all that is shown
    share = next(n for n in range(min(SHOWN, recipe.batch), recipe.batch + 1) if recipe.batch % n == 0)
    sets = ContrastiveSets(archive.scans, recipe.model_copy(update={"processes": recipe.batch // share}), 0)
    shown = list(examples(recipe, sets, accelerator))
    labels = [_label(archive.scans.cases[one.scan].id, one) for one in shown]
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(out) as aside:
        _draw(shown, labels, _heading(recipe), ("scan, as read", "first view", "second view")).save(aside, "PNG")
    return out


def _heading(recipe: PretrainRecipe) -> list[str]:
    sides = " × ".join(map(str, recipe.views.sides(recipe.model.spatial_dims)))
    lines = [
        f"Scans and their views: the first {min(SHOWN, recipe.batch)} of the first set of {recipe.batch}, seed {recipe.seed}",
        f"views of {sides} pixels; each row is shown from the darkest to the brightest of its scan",
    ]
    if recipe.model.spatial_dims == 3:
        lines.append("volumes: the planes across z, y and x in the middle, z upwards")
    return lines


def _label(name: str, example: Example) -> str:
    short = name if len(name) <= 24 else f"{name[:12]}…"
    place = "" if math.isnan(example.position) else f", at {example.position:.0%} of its volume"
    return f"{short}: {' × '.join(map(str, example.size))}{place}"


def _draw(shown: Sequence[Example], labels: Sequence[str], heading: Sequence[str], titles: Sequence[str]) -> Image.Image:
    """Two rows of examples side by side, the columns named above."""
    height, width = shown[0].views[0].shape[:2]
    scale = max(1, math.ceil(_SIDE / math.sqrt(height * width)))
    height, width = height * scale, width * scale
    across = 2 if len(shown) > 1 else 1
    block = len(titles) * width + (len(titles) - 1) * _GAP
    down = -(-len(shown) // across)
    top = _MARGIN + len(heading) * _LINE + _GAP + _LINE
    size = (2 * _MARGIN + across * block + (across - 1) * 3 * _GAP, top + down * (height + _LINE + _GAP) + _MARGIN)
    page = Image.new("RGB", size, _PAPER)
    font = findfont("DejaVu Sans")  # matplotlib brings it; Pillow's own has no × and few letters
    pen, large, small = ImageDraw.Draw(page), ImageFont.truetype(font, 15), ImageFont.truetype(font, 12)
    for line, text in enumerate(heading):
        pen.text((_MARGIN, _MARGIN + line * _LINE), text, _INK, large)
    for column in range(across):
        left = _MARGIN + column * (block + 3 * _GAP)
        for place, name in enumerate(titles):
            pen.text((left + place * (width + _GAP), top - _LINE), name, _INK, large)
    for number, (example, label) in enumerate(zip(shown, labels, strict=True)):
        row, column = divmod(number, across)
        left, upper = _MARGIN + column * (block + 3 * _GAP), top + row * (height + _LINE + _GAP)
        for place, picture in enumerate((example.window, *example.views)):
            page.paste(_pixels(resized(picture, (height, width))), (left + place * (width + _GAP), upper))
        pen.text((left, upper + height + 2), label, _FAINT, small)
    return page


def _pixels(picture: Picture) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8)).convert("RGB")
