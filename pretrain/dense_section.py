"""The report's section on dense contrast: did its loss fall below chance, and on how many places?"""

import math
from collections.abc import Mapping

from pretrain.recipe import DenseSettings
from resunet.report import Section, curves


def dense_section(dense: DenseSettings, stride: int, metrics: Mapping[str, tuple[list[float], list[float]]]) -> Section:
    """Loss by step beside chance, ln(2P − 1) of the P places that a set had on average. stride: of the level."""
    loss, places = metrics["dense_loss"], metrics["dense_points"]
    chance = [math.log(max(2 * count - 1, 1)) for count in places[1]]
    resolution = "full" if stride == 1 else f"1/{stride}"
    told = (
        f"Last loss {loss[1][-1]:.3f} on {places[1][-1]:,.0f} pairs of places at {resolution} resolution; a network that tells no "
        f"places apart has ln(2P − 1) = {chance[-1]:.3f}. Spread of the projections {metrics['dense_projection_std'][1][-1]:.4f}; "
        f"healthy is about 1/√d = {1 / math.sqrt(dense.output):.4f}, collapsed is 0."
    )
    empty = sum(count == 0 for count in places[1])
    notes = [f"In {empty} of {len(places[1])} logged steps no two views of a scan overlapped."] if empty else []
    drawn = curves({"dense": loss, "chance": (places[0], chance)}, "Dense loss by step", "step", "NT-Xent")
    return Section("Dense contrast", text=[told, *notes], pictures=[drawn])
