"""What of a label curve would make its arms no fair comparison, refused before anything is trained."""

from collections.abc import Sequence
from typing import Any

from finetune.label_curve.cells import Point
from finetune.label_curve.recipe import LabelCurveRecipe, merge
from finetune.labelled import resolve
from finetune.recipe import FinetuneRecipe
from resunet.errors import InputError
from resunet.files import sha256


def refuse_other_models(points: Sequence[Point]) -> None:
    """Raise InputError if the cells of an arm rest on different encoders, starts or teachers, or would from here on.

    A file that is no longer there is not missed, unless a cell has to be trained: that will say so itself.
    """
    for arm in dict.fromkeys(point.arm for point in points):
        cells = [cell for point in points if point.arm == arm for cell in point.cells]
        done = [cell for cell in cells if cell.done]
        for cell in done:
            differing = [name for name, digest in cell.models.items() if done[0].models.get(name) != digest]
            if differing:
                raise InputError(
                    f"{cell.folder}: rests on another {differing[0]} than {done[0].folder}, of the same arm. Give the other model "
                    "an arm of its own: name another, and delete the cells that are not of this one."
                )
        if 0 < len(done) < len(cells):
            for name, digest in done[0].models.items():
                if (file := done[0].file_of(name)) is not None and sha256(file) != digest:
                    raise InputError(
                        f"arms.{arm}: {file} is not what the cells that are done rest on. Give the new one an arm of its own, or "
                        "name another out."
                    )


def refuse_unequal_arms(recipe: LabelCurveRecipe, points: Sequence[Point]) -> None:
    """Raise InputError if an arm differs from the baseline in what it takes from its encoder without anybody having said so.

    With model.norm and normalisation left out, an arm with an encoder has the encoder's, and one without the defaults: the
    difference of the two would be taken for that of pretraining.
    """
    resolved = {arm: resolve(next(point for point in points if point.arm == arm).cells[0].recipe) for arm in recipe.arms}
    base = resolved[recipe.baseline]
    for arm, other in resolved.items():
        if other.model.name != base.model.name:  # another network altogether
            continue
        given = merge(recipe.finetune, recipe.arms[arm])
        for key, theirs, ours, said in (
            ("model.norm", other.model.norm, base.model.norm, given.get("model", {}).get("norm")),
            ("normalisation", _shown(other), _shown(base), given.get("normalisation")),
        ):
            if theirs != ours and said is None:
                raise InputError(
                    f"arms.{arm}: has {key}={theirs} by its encoder or teacher, {recipe.baseline} has {ours}, and what pretraining "
                    f"gains could not be told from that. Set finetune.{key}, which is for all arms, or arms.{arm}.{key} if it is "
                    "meant."
                )


def _shown(recipe: FinetuneRecipe) -> dict[str, Any]:
    assert recipe.normalisation is not None
    return recipe.normalisation.model_dump()
