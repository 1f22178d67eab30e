"""Which points to choose so that they cover all points: k-centre and typicality; and how well chosen points cover.

Points are unit vectors; distances are Euclidean, from 0 to 2. Everything is deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors

Method = Literal["kcenter", "typicality"]
Points = NDArray[np.float64]

_BLOCK = 256  # chosen points whose distances to all are held at once
# TypiClust's own figures (Hacohen et al. 2022, section 3.2 and appendix): neighbours, clusters at most, a cluster worth a label.
_NEIGHBOURS = 20
_CLUSTERS = 500
_WORTH = 5
_EXACT_KMEANS = 50  # clusters; above that mini-batches


@dataclass(frozen=True)
class Chosen:
    """Points in the order in which they were chosen.

    scores: kcenter: the distance to the nearest covered point when it was chosen, NaN of the first of all; typicality: the inverse
        mean distance to its neighbours.
    """

    order: list[int]
    scores: list[float]


def choose(method: Method, points: Points, covered: NDArray[np.bool_], budget: int, seed: int = 0) -> Chosen:
    """`budget` of the points that are not covered yet.

    Args:
        points: (n, D) unit vectors.
        covered: (n,) which are labelled already.
    """
    assert 0 < budget <= int((~covered).sum())
    return k_centre(points, covered, budget) if method == "kcenter" else typical(points, covered, budget, seed)


def k_centre(points: Points, covered: NDArray[np.bool_], budget: int, first: int | None = None) -> Chosen:
    """Again and again the point that is farthest from all that is covered (Sener & Savarese 2018, arXiv 1708.00489, algorithm 1).

    Args:
        first: chosen first where nothing is covered; None: the point nearest to the mean.
    """
    order: list[int] = []
    scores: list[float] = []
    nearest = distances_to(points, np.flatnonzero(covered))
    if not covered.any():
        if first is None:
            first = int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())
        order.append(first)
        scores.append(float("nan"))
        nearest = distances_to(points, order)
    taken = covered.copy()
    taken[order] = True
    while len(order) < budget:
        farthest = int(np.where(taken, -1.0, nearest).argmax())
        order.append(farthest)
        scores.append(float(nearest[farthest]))
        taken[farthest] = True
        nearest = np.minimum(nearest, distances_to(points, [farthest]))
    return Chosen(order, scores)


def typical(points: Points, covered: NDArray[np.bool_], budget: int, seed: int) -> Chosen:
    """TypiClust (Hacohen et al. 2022, arXiv 2202.02794, algorithm 1): of each cluster the point that lies most densely.

    As many clusters as there will be labels. Clusters with the fewest labels come first, of those the largest; clusters of few
    points only where there are no others.
    """
    clusters = _clusters(points, min(int(covered.sum()) + budget, _CLUSTERS), seed)
    taken = covered.copy()
    labels, sizes = np.bincount(clusters[taken], minlength=clusters.max() + 1), np.bincount(clusters)
    density = {int(cluster): _typicality(points, np.flatnonzero(clusters == cluster)) for cluster in np.flatnonzero(sizes)}
    order: list[int] = []
    scores: list[float] = []
    while len(order) < budget:
        free = np.bincount(clusters[~taken], minlength=len(sizes))
        cluster = min(
            np.flatnonzero(free).tolist(),
            key=lambda one: (sizes[one] < _WORTH, labels[one], -sizes[one], one),
        )
        members = np.flatnonzero(clusters == cluster)
        scored = np.where(taken[members], -1.0, density[cluster])
        best = int(scored.argmax())
        order.append(int(members[best]))
        scores.append(float(scored[best]))
        taken[members[best]] = True
        labels[cluster] += 1
    return Chosen(order, scores)


def nested_order(method: Method, points: Points, seed: int) -> list[int]:
    """All points, so that every beginning of the order is a choice of that many.

    kcenter starts at a random point. typicality goes in rounds, each of which doubles the labels, as its authors let it grow.
    """
    if method == "kcenter":
        first = int(np.random.default_rng(seed).integers(len(points)))
        return k_centre(points, np.zeros(len(points), bool), len(points), first).order
    order: list[int] = []
    covered = np.zeros(len(points), bool)
    while len(order) < len(points):
        order += typical(points, covered, min(max(1, len(order)), len(points) - len(order)), seed).order
        covered[order] = True
    return order


def distances_to(points: Points, chosen: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float64]:
    """Of every point the distance to the nearest of the chosen; infinite where none is."""
    nearest = np.full(len(points), np.inf)
    for start in range(0, len(chosen), _BLOCK):
        inner = points @ points[chosen[start : start + _BLOCK]].T
        nearest = np.minimum(nearest, 2 - 2 * inner.max(axis=1))
    distances: NDArray[np.float64] = np.sqrt(np.maximum(nearest, 0))
    return distances


@dataclass(frozen=True)
class Cover:
    """How far points are from the nearest labelled one: the mean, and the farthest."""

    mean: float
    farthest: float


def cover(points: Points, labelled: Sequence[int] | NDArray[np.intp]) -> Cover:
    """Of all points, by those that are labelled; some must be."""
    nearest = distances_to(points, labelled)
    return Cover(float(nearest.mean()), float(nearest.max()))


def random_covers(points: Points, covered: NDArray[np.bool_], budget: int, draws: int, seed: int = 0) -> list[Cover]:
    """What random choices of as many points come to."""
    rng = np.random.default_rng(seed)
    free, labelled = np.flatnonzero(~covered), np.flatnonzero(covered)
    return [cover(points, np.concatenate([labelled, rng.choice(free, budget, replace=False)])) for _ in range(draws)]


def _clusters(points: Points, count: int, seed: int) -> NDArray[np.intp]:
    """The cluster of every point."""
    count = min(count, len(np.unique(points, axis=0)))
    kmeans = KMeans if count <= _EXACT_KMEANS else MiniBatchKMeans
    labels: NDArray[np.intp] = kmeans(n_clusters=count, n_init=3, random_state=seed).fit(points).labels_
    return labels


def _typicality(points: Points, members: NDArray[np.intp]) -> NDArray[np.float64]:
    """Of each member of a cluster the inverse mean distance to its neighbours in it (their section 3.2)."""
    neighbours = min(_NEIGHBOURS, len(members) // 2)
    if neighbours < 1:
        return np.ones(len(members))
    distances, _ = NearestNeighbors(n_neighbors=neighbours).fit(points[members]).kneighbors()
    typicality: NDArray[np.float64] = 1 / (distances.mean(axis=1) + 1e-5)
    return typicality
