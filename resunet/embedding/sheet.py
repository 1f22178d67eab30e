"""report.html of `resunet suggest`: a contact sheet of the suggested groups, and how much of the archive they cover."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resunet.embedding.coverage import Chosen, Cover, Method
from resunet.embedding.groups import Groups
from resunet.embedding.picture import Colouring, map_picture, principal_plane
from resunet.plain import number_of
from resunet.report import Picture, Section, image, write_page

_SCORE = {"kcenter": "distance to the nearest labelled or earlier one", "typicality": "typicality"}
_METHOD = {
    "kcenter": (
        "k-centre (Sener & Savarese 2018): each is the group that is farthest from all that is labelled or chosen before it. It "
        "reaches for what is rare, artefacts among it."
    ),
    "typicality": (
        "typicality (TypiClust, Hacohen et al. 2022): the groups are clustered, and of every cluster without a label, the largest "
        "first, the one that lies most densely is taken."
    ),
}
_DISTANCES = (
    "Distances are between the groups' mean directions in the encoder's features: 0 is the same direction, 1.41 nothing in common. "
    "What a smaller distance is worth in Dice is not known before it is measured."
)


@dataclass(frozen=True)
class Suggestions:
    """What there is to show. covers: what the labels of now come to (None: there are none), with the suggestions, and with
    random choices in their place. thumbnails: a picture of every suggestion, in their order."""

    method: Method
    groups: Groups
    chosen: Chosen
    before: Cover | None
    after: Cover
    at_random: Sequence[Cover]
    thumbnails: Sequence[NDArray[np.uint8]]
    notes: Sequence[str]


def write_sheet(path: Path, found: Suggestions) -> None:
    """The page, atomically."""
    groups, count = found.groups, len(found.chosen.order)
    labelled = int(groups.labelled.sum())
    lead = f"{count} of {len(groups.names) - labelled:,} unlabelled groups to label next; {labelled:,} are labelled."
    sections = [
        Section(lead=[lead], notes=found.notes, text=[_METHOD[found.method]]),
        Section("How much of the archive they cover", text=[_compared(found), _DISTANCES], table=cover_table(found)),
        Section(
            "Label these next",
            text=[
                "Of each group the slice that is nearest to the mean of its scan, which is nearest to the mean of the group."
            ],
            pictures=[
                image(picture, _caption(found, place), alt=f"Suggestion {place + 1}: its most typical slice")
                for place, picture in enumerate(found.thumbnails)
            ],
        ),
        *([Section("Where they lie", pictures=[_map(found)])] if len(groups.names) > 2 else []),
    ]
    write_page(path, "Label these next", sections)


def cover_table(found: Suggestions) -> list[list[str]]:
    """Mean and largest distance of a group to its nearest labelled one, under a header."""
    rows = [["Labelled", "Mean distance", "Largest"]]
    if found.before is not None:
        rows.append(["as it is now", f"{found.before.mean:.3f}", f"{found.before.farthest:.3f}"])
    rows.append(["with these", f"{found.after.mean:.3f}", f"{found.after.farthest:.3f}"])
    means, farthest = ([getattr(one, what) for one in found.at_random] for what in ("mean", "farthest"))
    rows.append(
        [f"with as many at random: mean of {len(means)} draws (5th to 95th percentile)", _spread(means), _spread(farthest)]
    )
    return rows


def _compared(found: Suggestions) -> str:
    better = sum(one.mean > found.after.mean for one in found.at_random)
    widest = sum(one.farthest > found.after.farthest for one in found.at_random)
    draws = len(found.at_random)
    return f"Of {draws} random choices of as many groups {better} leave a larger mean distance, {widest} a larger largest one."


def _spread(values: Sequence[float]) -> str:
    low, high = np.percentile(values, [5, 95])
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def _caption(found: Suggestions, place: int) -> str:
    number = found.chosen.order[place]
    score, scans = found.chosen.scores[place], len(found.groups.rows[number])
    told = "the most central" if np.isnan(score) else f"{_SCORE[found.method]} {score:.3f}"
    return f"{place + 1}. Group {found.groups.names[number][:12]}…, {number_of(scans, 'scan')}: {told}."


def _map(found: Suggestions) -> Picture:
    groups = found.groups
    plane = principal_plane(groups.points)
    colouring = (
        Colouring("Groups", groups.labelled.astype(float), ("unlabelled", "labelled")) if groups.labelled.any() else None
    )
    return map_picture(
        plane,
        colouring,
        (),
        "The groups on the first two principal components of their embeddings; numbers are the suggestions in their order.",
        f"Map of {len(groups.names)} groups with the {len(found.chosen.order)} suggestions numbered",
        found.chosen.order,
    )
