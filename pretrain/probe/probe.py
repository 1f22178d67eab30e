"""The probe of a pretraining run: when it looks, what it logs, and which checkpoint it would choose.

The main rank looks and the others wait. Nothing of the training is touched: the encoder is in evaluation mode meanwhile, with
its running statistics, and every random number comes from generators of the probe's own, so that a run with a probe gives the
weights of one without, bit for bit.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pretrain.archive import Archive
from pretrain.probe.embeddings import describe_embeddings
from pretrain.probe.features import features_at
from pretrain.probe.picture import save_prediction
from pretrain.probe.sample import sample_views
from pretrain.probe.scans import ProbeScans, read_probe_scans
from pretrain.probe.segmentation import dice_by_class, leave_one_out
from pretrain.probe.settings import ProbeSettings
from pretrain.recipe import PretrainRecipe
from resunet.decoders import AnyEncoder
from resunet.layout import channels_last
from resunet.ranks import on_every_rank
from resunet.runs import Run, disk_faults


@dataclass(frozen=True)
class Segmented:
    """What the probe made of its scans. predicted: of every scan the class indices at its places."""

    dice: float
    predicted: list[NDArray[np.uint8]]


class Probe:
    """None of it where the recipe has no probe: it is never due, and has nothing to tell."""

    def __init__(self, recipe: PretrainRecipe, archive: Archive, accelerator: Accelerator) -> None:
        """Read the labelled scans and the sample, on the main rank.

        Raises:
            ResUNetError: whatever is wrong with either, on every rank.
        """
        self._recipe, self._settings, self._accelerator = recipe, recipe.probe, accelerator
        self.best, self.best_step, self.improved = -1.0, 0, False
        self.scans: ProbeScans | None = None
        self._views: list[Tensor] = []
        if self._settings is not None:
            on_every_rank(lambda: self._read(archive), accelerator)

    def _read(self, archive: Archive) -> None:
        if self._accelerator.is_main_process:
            assert self._settings is not None
            self.scans = read_probe_scans(self._recipe, self._settings, self._recipe.model.spatial_dims)
            self._views = sample_views(self._recipe, archive, self._accelerator)

    @property
    def chooses(self) -> bool:
        """The checkpoint that becomes the encoder is the one with the best Dice here."""
        return self._settings is not None and self._settings.choose == "best"

    @property
    def embeddings(self) -> int:
        """How many views alignment, uniformity and rank are of."""
        return sum(len(chunk) for chunk in self._views)

    def inputs(self) -> dict[str, str]:
        """sha256 of what it looks at, for run.json."""
        return {"probe": self.scans.digest} if self.scans is not None else {}

    def due(self, step: int) -> bool:
        """Whether to look after so many steps."""
        return self._settings is not None and (step % self._settings.every == 0 or step == self._recipe.steps)

    @property
    def looks(self) -> int:
        """How many there are in the whole run."""
        if self._settings is None:
            return 0
        return 1 + math.ceil(self._recipe.steps / self._settings.every)

    def look(self, encoder: AnyEncoder, step: int) -> dict[str, float]:
        """What is logged, on the main rank; on others nothing. All ranks call it.

        Raises:
            ResUNetError: the prediction that the report shows cannot be written, on every rank.
        """
        return on_every_rank(lambda: self._look(encoder, step), self._accelerator)

    def _look(self, encoder: AnyEncoder, step: int) -> dict[str, float]:
        if self.scans is None:
            return {}
        segmented, described = self.judge(encoder)
        self.improved = step > 0 and segmented.dice > self.best
        if self.improved:
            self.best, self.best_step = segmented.dice, step
        with disk_faults(self._recipe.out):
            save_prediction(self._recipe.out, self.scans, segmented.predicted, step)
        return {"probe_dice": segmented.dice} | described

    def judge(self, encoder: AnyEncoder) -> tuple[Segmented, dict[str, float]]:
        """What the encoder makes of the scans, on the main rank; and what its embeddings of the sample are like."""
        assert self._settings is not None and self.scans is not None
        device = self._accelerator.device
        with evaluating(encoder), self._accelerator.autocast():
            segmented = segment(encoder, self.scans, self._settings, device)
            pairs = [encoder.embed(channels_last(chunk.to(device))).float().chunk(2) for chunk in self._views]
        first, second = (torch.cat([pair[view] for pair in pairs]) for view in range(2))
        return segmented, describe_embeddings(first, second)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"probe": {"best": self.best, "best_step": self.best_step}} if self._settings is not None else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self._settings is not None:
            self.best, self.best_step = state["probe"]["best"], state["probe"]["best_step"]

    def record(self, run: Run) -> None:
        """The labels that it uses into run.json: how many groups, and their HMACs."""
        if self.scans is not None:
            groups = self.scans.labels.groups
            run.set_status("running", probe={"groups": len(groups), "group_hmacs": list(groups)})


@contextmanager
def evaluating(encoder: AnyEncoder) -> Iterator[None]:
    """The encoder in evaluation mode without gradients; every layer's own mode comes back."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def segment(encoder: AnyEncoder, scans: ProbeScans, settings: ProbeSettings, device: torch.device) -> Segmented:
    """Every probe scan by the labels of the others; Dice is the mean over foreground classes that others show too."""
    places = scans.places()
    features = torch.cat(
        [
            features_at(
                encoder, torch.from_numpy(scan.values).to(device), torch.from_numpy(its.reshape(-1, its.shape[-1])).to(device)
            )
            for scan, its in zip(scans.scans, places, strict=True)
        ]
    )
    pixels = scans.pixels(places)
    with torch.autocast(device.type, enabled=False):
        predicted = leave_one_out(features, pixels, settings.neighbours if settings.kind == "knn" else None)
    dice = float(np.mean(dice_by_class(pixels.labels, predicted, scans.told_apart())))
    sizes = [its.size // its.shape[-1] for its in places]
    parts = np.split(predicted, np.cumsum(sizes)[:-1])
    return Segmented(dice, [part.reshape(its.shape[:-1]) for part, its in zip(parts, places, strict=True)])
