"""Contrastive sets, read ahead by worker processes: what each holds is a pure function of (seed, index), whoever reads it."""

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain.recipe import PretrainRecipe
from pretrain.views import stack_scans
from resunet.data.order import batch_order
from resunet.data.scans import Scans
from resunet.errors import EnvironmentFault, ResUNetError

_WINDOWS = 4  # names the random stream of the windows
_AHEAD = 2  # sets that each worker has ready
_DIED = (
    "a process that reads the archive died, most often because memory or shared memory (/dev/shm) ran out. Set fewer "
    "data.workers (0: the rank reads for itself), a smaller batch or a smaller views.window."
)


class ContrastiveSet(NamedTuple):
    """A rank's share of a set, or all of it.

    windows: (N, C, Y, X) or (N, C, Z, Y, X), padded at the end.
    sizes: (N, dimensions), of each window without the padding.
    anchors: (N, 2, dimensions), a place with content for each view, in array order.
    scan: (N,) int64, which of the archive's scans each is from.
    axis: (N,) int64, of the volume it is a slice along; -1 for an image and for a volume as it is.
    position: (N,) float32, in [0, 1] along that axis; NaN where it is not known.
    spacing: (N, dimensions) float32, mm in array order, of volumes; of slices and images 1.
    """

    windows: Tensor
    sizes: Tensor
    anchors: Tensor
    scan: Tensor
    axis: Tensor
    position: Tensor
    spacing: Tensor


class ContrastiveSets(Dataset[ContrastiveSet | Exception]):
    """This rank's share of every set; put together, the shares are the set that one rank would read."""

    def __init__(self, scans: Scans, recipe: PretrainRecipe, rank: int) -> None:
        self._scans, self._recipe, self._rank = scans, recipe, rank

    def read(self, index: int) -> ContrastiveSet:
        """The `index`-th set.

        Raises:
            InputError: a file cannot be read any more.
            EnvironmentFault: the store lost a scan.
        """
        recipe, rank = self._recipe, self._rank
        share = recipe.batch // recipe.processes
        window = recipe.views.sides_of_window(recipe.model.spatial_dims)
        items = batch_order(self._scans.num_items, recipe.batch, recipe.seed, index)
        windows = []
        for place in range(rank * share, (rank + 1) * share):
            rng = np.random.default_rng([recipe.seed, _WINDOWS, index, place])
            windows.append(self._scans.window(int(items[place]), window, rng))
        values, sizes = stack_scans([window.values for window in windows])
        return ContrastiveSet(
            windows=values,
            sizes=sizes,
            anchors=torch.from_numpy(np.stack([window.anchors for window in windows])),
            scan=torch.tensor([window.scan for window in windows]),
            axis=torch.tensor([-1 if window.axis is None else window.axis for window in windows]),
            position=torch.tensor([window.position for window in windows]),
            spacing=torch.tensor([window.spacing for window in windows]),
        )

    def __getitem__(self, index: int) -> ContrastiveSet | Exception:
        """The set, or why there is none: raised in a worker, its message would come back as a traceback."""
        try:
            return self.read(index)
        except (ResUNetError, OSError) as error:
            return error


@contextmanager
def reading(sets: ContrastiveSets, indices: range, workers: int, pin: bool) -> Iterator[Iterator[ContrastiveSet]]:
    """Some sets, in order; the workers live as long as the block.

    Raises:
        ResUNetError: what `ContrastiveSets.read` raises.
        EnvironmentFault: a worker died.
    """
    workers = min(workers, len(indices))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the recipe says how many
        loader = DataLoader(
            sets,
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_ignore_signals,
            pin_memory=pin,
        )
    others = set(active_children())
    found = iter(loader)
    try:
        try:
            yield _or_raise(found)
        finally:
            if workers:
                found._shutdown_workers()  # type: ignore[attr-defined]
    except RuntimeError as error:  # torch raises it from wherever the rank is when a worker dies
        if not str(error).startswith("DataLoader worker"):
            raise
        raise EnvironmentFault(_DIED) from error
    finally:
        for left in set(active_children()) - others:  # it hangs in a decoder
            left.kill()


def _or_raise(found: Iterator[ContrastiveSet | Exception]) -> Iterator[ContrastiveSet]:
    while True:
        try:
            one = next(found)
        except StopIteration:
            return
        except (EOFError, OSError) as error:  # it died with a set on its way; those of reading come as values
            raise EnvironmentFault(_DIED) from error
        if isinstance(one, Exception):
            raise one
        yield one


def _ignore_signals(number: int) -> None:
    """SIGTERM and Ctrl-C to a whole group are the rank's affair: to save and leave it needs its workers, and then ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
