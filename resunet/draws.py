"""Random numbers of a set that are the same for a scan of it whether one rank makes all views or many do."""

from dataclasses import dataclass

import torch
from torch import Tensor

from resunet.config import Range


@dataclass(frozen=True)
class Draws:
    """Random numbers for the scans at some places of a set, drawn for all `total` of it: nobody's depend on who is asked."""

    generator: torch.Generator
    places: range
    total: int

    def uniform(self, limits: Range, *shape: int) -> Tensor:
        """(N, *shape), N the number of places."""
        low, high = limits
        return self._here(torch.rand(self.total, *shape, generator=self.generator, device=self.device)) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """(N, *shape)."""
        return self._here(torch.randn(self.total, *shape, generator=self.generator, device=self.device))

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def _here(self, drawn: Tensor) -> Tensor:
        return drawn[self.places.start : self.places.stop]
