"""What --threshold and --operating-point ask of a prediction."""

from collections.abc import Mapping
from typing import Protocol

from resunet.errors import InputError


class _Point(Protocol):
    @property
    def threshold(self) -> float: ...


class Deciding(Protocol):
    """What a model directory's config.json and a bundle's contract both say."""

    @property
    def classes(self) -> Mapping[int, str] | None: ...
    @property
    def operating_point(self) -> _Point | None: ...


def requested_threshold(
    model: Deciding, threshold: float | None, at_point: bool, probabilities: bool, flips: bool
) -> float | None:
    """What --threshold and --operating-point ask of a prediction; None for the usual decision.

    Raises:
        InputError: both, either with --probabilities, a model of several classes, one without an operating point, or an operating
            point with --tta.
    """
    if threshold is None and not at_point:
        return None
    asked = "--operating-point" if threshold is None else f"--threshold {threshold:g}"
    if threshold is not None and at_point:
        raise InputError(f"{asked} and --operating-point: give one of them; both set the threshold.")
    if probabilities:
        raise InputError(f"{asked}: decides masks, and --probabilities writes none. Leave one of them out.")
    assert model.classes is not None
    if len(model.classes) != 2:
        raise InputError(
            f"{asked}: is for models of one class; this one has {', '.join(list(model.classes.values())[1:])}, of which the "
            "likeliest is taken. Leave it out, or write --probabilities and decide on those."
        )
    if threshold is None:
        if model.operating_point is None:
            raise InputError(
                "--operating-point: the model has none. Train with false_alarms_per_1000=B, or find one with resunet evaluate "
                "--false-alarms-per-1000 B and give it as --threshold."
            )
        if flips:
            raise InputError(
                "--operating-point: its threshold was chosen without --tta, whose averages have other probabilities. Leave out "
                "--tta, or choose a --threshold of your own."
            )
        return model.operating_point.threshold
    return None if threshold == 0.5 else threshold
