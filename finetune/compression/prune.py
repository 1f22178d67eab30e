"""One bite: a finished segmenter → a smaller one, as a model directory that training can start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finetune.compression.groups import (
    Group,
    LayerCost,
    Size,
    find_groups,
    keep_channels,
    layer_costs,
    size_at,
    widths_after,
)
from finetune.compression.selection import Bounds, Harm, choose_channels, fewest
from resunet.checkpoint import WEIGHTS, load_exactly, model_folder
from resunet.data.leakage import ARCHIVE
from resunet.files import folder_aside, sha256
from resunet.model import Segmenter, build_model
from resunet.widths import different_widths, widths_of


@dataclass(frozen=True)
class Prunable:
    """A network and what is known of its channels."""

    network: Segmenter
    groups: list[Group]
    costs: dict[str, LayerCost]

    @property
    def size(self) -> Size:
        return size_at(self.costs, {})

    def without(self, removed: Sequence[Sequence[int]]) -> Segmenter:
        """A copy, in evaluation mode, without some channels of every group."""
        tensors = keep_channels(self.network, self.groups, removed)
        widths = widths_after(self.groups, [len(gone) for gone in removed], self.costs)
        return _rebuilt(self.network, widths, tensors)


def prunable(network: Segmenter) -> Prunable:
    """Of a network with its weights."""
    return Prunable(network, find_groups(network), layer_costs(network))


def fewest_channels(subject: Prunable, origin: Segmenter, least: float, round_to: int) -> list[int]:
    """Channels that every group keeps, whatever its importance: a share of those in the network that came in."""
    widths = widths_of(origin)
    return fewest(subject.groups, least, round_to, {group.name: widths[group.name][1] for group in subject.groups})


def take_bite(
    subject: Prunable, scores: Sequence[Tensor], harms: Sequence[Harm], bounds: Bounds, round_to: int, least: Sequence[int]
) -> Segmenter:
    """The network within its bounds.

    Raises:
        InputError: the bounds cannot be met.
    """
    return subject.without(choose_channels(subject.groups, scores, harms, subject.costs, bounds, round_to, least))


def lost_channels(before: Segmenter, after: Segmenter, groups: Sequence[Group]) -> dict[str, float]:
    """The share of its channels that every group lost, by its name."""
    had, has = widths_of(before), widths_of(after)
    return {group.name: 1 - has[group.name][1] / had[group.name][1] for group in groups}


def write_pruned(network: Segmenter, parent: Path, out: Path) -> None:
    """A model directory of a network that was pruned from the one in `parent`, whole or not at all.

    What val chose for that one, post-processing and an operating point, is not of this one.
    """
    folder = model_folder(parent)
    config = network.config
    network.config = config.model_copy(
        update={
            "provenance": config.provenance.model_copy(update={"parent_sha256": sha256(folder / WEIGHTS)}),
            "postprocessing": None,
            "operating_point": None,
        }
    )
    with folder_aside(out) as aside:
        network.save_pretrained(aside)
        (aside / ARCHIVE).write_bytes((folder / ARCHIVE).read_bytes())


def _rebuilt(network: Segmenter, widths: dict[str, tuple[int, int]], tensors: dict[str, Tensor]) -> Segmenter:
    """The network of these widths, built as its config.json will say, with these tensors."""
    full = build_model(network.config.architecture.model_copy(update={"widths": {}}))
    theirs = widths_of(full)
    own = {name: width for name, width in widths.items() if theirs[name] != width}
    architecture = network.config.architecture.model_copy(update={"widths": own})
    made = build_model(architecture)
    assert isinstance(made, Segmenter) and different_widths(made, full) == own
    load_exactly(made, tensors, "the pruned network")
    made.config = network.config.model_copy(update={"architecture": architecture})
    return made.eval()
