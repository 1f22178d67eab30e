"""From scans to embeddings: the global average pool of an encoder's last level, over the pieces of a scan, in a stream.

Pieces of one size go through the encoder together, and nothing is padded, so that an embedding does not depend on what is beside
it in a batch. In memory are a few scans and a few batches, however large the archive.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from resunet.arithmetic import autocast, refuse_without_gpu
from resunet.checkpoint import ModelConfig
from resunet.config import Frozen, Precision
from resunet.data.cases import Case
from resunet.embedding.pieces import LONGEST, Piece, ReadScan, longest_side, pieces_of, read_for_embedding
from resunet.encoder import Encoder
from resunet.errors import InputError
from resunet.layout import channels_last, place

_READERS = 4  # threads, each with a decoded scan
_BATCHES = 4  # that wait for others of their size


class EmbeddingSettings(Frozen):
    """How scans are shown to an encoder, and how it computes."""

    precision: Precision = "fp32"
    batch: int = Field(16, ge=1, description="slices or windows at once; changes no embedding")
    longest: int | None = Field(
        None, ge=16, description="pixels a side: longer slices are shrunk to it, longer volumes cut; null: 512, 128 in 3D"
    )


@dataclass(frozen=True)
class ScanFeatures:
    """What an encoder says of one scan.

    vectors: (pieces, D); none where the scan has no content.
    indices, positions: of the pieces, see `Piece`.
    """

    vectors: NDArray[np.float32]
    weights: NDArray[np.float64]
    indices: list[int | None]
    positions: list[float]

    @property
    def mean(self) -> NDArray[np.float32] | None:
        """The scan's embedding: the mean over its pieces, of windows by their size."""
        if not len(self.vectors):
            return None
        return np.average(self.vectors.astype(np.float64), axis=0, weights=self.weights).astype(np.float32)


class Embedder:
    """An encoder on the device that there is, with how scans are to be shown to it.

    Args:
        config: of its model directory: channels and normalisation.

    Raises:
        EnvironmentFault: fp16 without a GPU.
    """

    def __init__(self, encoder: Encoder, config: ModelConfig, settings: EmbeddingSettings) -> None:
        refuse_without_gpu("--precision ", settings.precision)
        assert isinstance(encoder, nn.Module) and encoder.spatial_dims in (2, 3)
        self.device = _device()
        self._encoder = place(encoder, self.device).eval()
        self.config, self.settings = config, settings
        self.spatial_dims, self.strides = encoder.spatial_dims, encoder.strides
        self.dims = encoder.channels[-1]
        self.longest = settings.longest or LONGEST[self.spatial_dims]

    def read(self, case: Case) -> ReadScan:
        """A case, to be embedded.

        Raises:
            InputError: it cannot be read; an image, for an encoder of volumes; or too small for one with instance norm.
        """
        scan = read_for_embedding(case, self.config.input_channels, self.config.normalisation)
        if scan.values.ndim - 1 < self.spatial_dims:
            raise InputError(
                f"{case.where()}: is an image of two dimensions, and the model is one of volumes (spatial_dims=3)."
            )
        instance = getattr(self.config.architecture, "norm", None) == "instance"
        if instance and longest_side(scan, self.spatial_dims, self.longest) <= self.strides[-1]:
            raise InputError(
                f"{case.where()}: is one position at the encoder's last level, of which instance norm has no statistics: one side "
                f"at least must be above {self.strides[-1]} pixels."
            )
        return scan

    def pieces(self, scan: ReadScan) -> Iterator[Piece]:
        """What of a scan goes through the encoder."""
        return pieces_of(scan, self.spatial_dims, self.longest)

    def embed(self, scans: Iterable[Iterable[Piece]]) -> Iterator[ScanFeatures]:
        """The features of scans, in their order."""
        open_scans: deque[_Open] = deque()
        waiting: list[tuple[_Open, Piece]] = []
        for scan in scans:
            entry = _Open()
            open_scans.append(entry)
            for piece in scan:
                waiting.append((entry, piece))
                if len(waiting) == _BATCHES * self.settings.batch:
                    self._flush(waiting)
                    while len(open_scans) > 1:
                        yield open_scans.popleft().features(self.dims)
        self._flush(waiting)
        for entry in open_scans:
            yield entry.features(self.dims)

    def vectors(self, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """(C, *size) each, of any sizes → (n, D), in their order."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, values in enumerate(images):
            by_size.setdefault(values.shape, []).append(number)
        out = np.empty((len(images), self.dims), np.float32)
        for numbers in by_size.values():
            for start in range(0, len(numbers), self.settings.batch):
                chosen = numbers[start : start + self.settings.batch]
                out[chosen] = self._pooled(np.stack([images[number] for number in chosen]))
        return out

    @torch.inference_mode()
    def _pooled(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        x = channels_last(torch.from_numpy(batch).to(self.device))
        with autocast(self.settings.precision, self.device):
            last = self._encoder(x)[-1]
        pooled: NDArray[np.float32] = last.float().mean(dim=tuple(range(2, last.ndim))).cpu().numpy()
        return pooled

    def _flush(self, waiting: "list[tuple[_Open, Piece]]") -> None:
        """Embed what waits, and give it to its scans."""
        vectors = self.vectors([piece.values for _, piece in waiting])
        for (entry, piece), vector in zip(waiting, vectors, strict=True):
            entry.vectors.append(vector)
            entry.weights.append(piece.weight)
            entry.indices.append(piece.index)
            entry.positions.append(piece.position)
        waiting.clear()


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@dataclass
class _Open:
    """A scan of which pieces may be to come."""

    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    indices: list[int | None] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)

    def features(self, dims: int) -> ScanFeatures:
        vectors = np.stack(self.vectors) if self.vectors else np.empty((0, dims), np.float32)
        return ScanFeatures(vectors, np.array(self.weights, np.float64), self.indices, self.positions)


def embed_cases(
    embedder: Embedder, cases: Sequence[Case], fault: Callable[[str], None] | None = None
) -> Iterator[ScanFeatures | None]:
    """The features of cases, in their order; None where a case is at fault and `fault` was told why.

    Raises:
        InputError: without `fault`: the first case that cannot be read, or is not what the encoder takes.
    """
    at_fault: deque[bool] = deque()

    def pieces() -> Iterator[Iterable[Piece]]:
        for scan in _read_ahead(embedder.read, cases):
            at_fault.append(isinstance(scan, InputError))
            if not isinstance(scan, InputError):
                yield embedder.pieces(scan)
                continue
            if fault is None:
                raise scan
            fault(str(scan))
            yield ()

    for case, features in zip(cases, embedder.embed(pieces()), strict=True):
        if at_fault.popleft():
            yield None
        elif np.isfinite(features.vectors).all():
            yield features
        else:
            message = f"{case.where()}: its embedding is not finite: intensities far beyond those of the encoder's training."
            if fault is None:
                raise InputError(message)
            fault(message)
            yield None


def _read_ahead(read: Callable[[Case], ReadScan], cases: Sequence[Case]) -> Iterator[ReadScan | InputError]:
    """Cases as they are read in threads, which the readers release the GIL for, in order; few are decoded ahead."""

    def attempt(case: Case) -> ReadScan | InputError:
        try:
            return read(case)
        except InputError as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[ReadScan | InputError]] = deque()
        try:
            for case in cases:
                waiting.append(pool.submit(attempt, case))
                if len(waiting) > _READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody wants the others
