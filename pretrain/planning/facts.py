"""What the scans of an archive are: sizes, spacing, channels, and what could not be read."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pretrain.archive import Archive
from pretrain.recipe import PretrainRecipe
from resunet.data.cases import read_case
from resunet.data.manifest_source import ManifestCases
from resunet.data.summary import rejected
from resunet.runtime import slice_axis

_READ = 200  # scans, where no manifest knows them


@dataclass(frozen=True)
class ScanFacts:
    """One scan. size, spacing: in array order, of a volume (z, y, x); spacing 1 where the file does not say."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int

    @property
    def plane(self) -> tuple[int, ...]:
        """Of the slices that a 2D network sees."""
        if len(self.size) == 2:
            return self.size
        axis = slice_axis(self.spacing)
        return tuple(n for i, n in enumerate(self.size) if i != axis)

    @property
    def slices(self) -> int:
        return 1 if len(self.size) == 2 else self.size[slice_axis(self.spacing)]


@dataclass(frozen=True)
class ArchiveFacts:
    """scans: of all, or of so many drawn at random. rejects: reasons and how often, or None where nobody kept them."""

    scans: tuple[ScanFacts, ...]
    total: int
    rejects: tuple[tuple[str, int], ...] | None

    @property
    def complete(self) -> bool:
        return len(self.scans) == self.total


def archive_facts(recipe: PretrainRecipe, archive: Archive) -> ArchiveFacts:
    """From the manifest; without one, from some of the scans, which are read one at a time."""
    cases = archive.scans.cases
    if isinstance(cases, ManifestCases):
        table = cases.manifest.columns("shape", "spacing", "channels").take(pa.array(cases.rows))
        rows = zip(*(table.column(name).to_pylist() for name in ("shape", "spacing", "channels")), strict=True)
        found = [ScanFacts(tuple(shape), tuple(spacing or [1.0] * len(shape)), channels) for shape, spacing, channels in rows]
        return ArchiveFacts(tuple(found), len(cases), tuple(rejected(cases.manifest.path)))
    chosen = np.sort(np.random.default_rng(recipe.seed).permutation(len(cases))[:_READ])
    read = (read_case(cases[int(i)], recipe.data.channels) for i in chosen)
    found = [ScanFacts(tuple(one.values.shape[1:]), tuple(one.spacing), one.values.shape[0]) for one in read]
    return ArchiveFacts(tuple(found), len(cases), None)
