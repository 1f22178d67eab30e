"""A bundle, opened: its contract, and the segmenter that it holds. README.md shows how it is used."""

import math
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from resunet.bundle.contract import CONTRACT, SEAL, Contract, Graph
from resunet.bundle.engines import Engine, name_of, open_engine, version_of
from resunet.bundle.scorer import scorer_of
from resunet.bundle.seal import read_sealed
from resunet.bundle.unzip import unzip
from resunet.data.images import read_scan
from resunet.errors import EnvironmentFault, InputError
from resunet.inference.predict import segment
from resunet.inference.window import Scorer


@dataclass(frozen=True)
class Seeing:
    """How a scan is predicted, as `finetune.inference.window.Inference`; and whether probabilities are wanted."""

    memory: float
    window: int
    overlap: float
    flips: bool = False
    probabilities: bool = False


@dataclass(frozen=True)
class Bundle:
    """A bundle of which every byte is as it was written. sha256: of its contract, which lists that of every other file."""

    folder: Path
    contract: Contract
    sha256: str

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """A bundle's folder, or its zip, which is unpacked into a temporary folder for as long as the bundle is in use.

        Raises:
            InputError: there is no bundle.
            CheckFailed: something in it was changed, is missing or is too much, or a zip that would write elsewhere.
        """
        path = Path(path)
        if not is_bundle(path):
            raise InputError(
                f"{path}: no bundle, which is a folder with a {CONTRACT}, or a zip of one. resunet export makes it."
            )
        if path.is_dir():
            return cls(path, *read_sealed(path))
        folder = Path(tempfile.mkdtemp(prefix="resunet-bundle-"))
        try:
            unzip(path, folder)
            opened = cls(folder, *read_sealed(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(opened, shutil.rmtree, folder, ignore_errors=True)
        return opened

    def graph(self, precision: str | None = None, runtime: str | None = None) -> Graph:
        """The preferred graph whose runtime is installed: of a precision, or of fp32, or where that is not, of another.

        Raises:
            InputError: the bundle has none such. EnvironmentFault: it has, but not its runtime.
        """
        graphs = sorted(self.contract.graphs, key=lambda one: one.precision != "fp32")
        wanted = [one for one in graphs if precision in (None, one.precision) and runtime in (None, one.runtime)]
        if not wanted:
            has = ", ".join(f"{one.runtime} {one.precision}" for one in self.contract.graphs)
            asked = ", ".join([runtime or "any runtime", *([precision] if precision else [])])
            raise InputError(f"{asked}: the bundle has no such graph. It has {has}.")
        here = [one for one in graphs if version_of(one.runtime) is not None]
        for one in wanted:
            if one in here:
                return one
        names = " or ".join(dict.fromkeys(name_of(one.runtime) for one in wanted))
        how = (
            "resunet, with all that it needs"
            if {one.runtime for one in wanted} == {"pytorch"}
            else "-r requirements.txt, of the bundle"
        )
        others = (
            f" Installed are the runtimes of {', '.join(f'{one.runtime} {one.precision}' for one in here)}." if here else ""
        )
        raise EnvironmentFault(f"{names} is needed, and not installed: pip install {how}.{others}")

    def segmenter(self, precision: str | None = None, runtime: str | None = None) -> "BundleSegmenter":
        """The network, ready to predict; raises as `graph`, or CheckFailed where the runtime does not take it."""
        graph = self.graph(precision, runtime)
        return BundleSegmenter(self, graph, open_engine(self.folder, self.contract, graph))

    def seeing(self) -> Seeing:
        """How scans are predicted if nobody says otherwise."""
        window = self.contract.window
        return Seeing(window.memory, window.size, window.overlap)


@dataclass(frozen=True)
class BundleSegmenter:
    """A bundle's network on a runtime."""

    bundle: Bundle
    graph: Graph
    engine: Engine

    def scorer(self, flips: bool) -> Scorer:
        return scorer_of(self.bundle.contract, self.engine, flips)

    def predict(self, values: NDArray, spacing: Sequence[float], flips: bool = False, probabilities: bool = False) -> NDArray:
        """Class indices, uint8 (*size), post-processed; or probabilities, float32 (M, *size), M = 1 or one a class.

        Args:
            values: (C, y, x) or (C, z, y, x) in LPS, as the scan has them: normalised here. spacing: mm in array order.
            flips: the mean over mirror images.

        Raises:
            InputError: other channels than the contract's, values that are no finite numbers, a spacing that is not above 0, or a
                scan that does not fit.
        """
        wanted = self.bundle.contract.input
        if values.dtype.kind not in "buif" or not values.size:
            raise InputError(f"values of {values.dtype}, {values.shape}: must be real numbers, and at least one.")
        if not all(math.isfinite(step) and step > 0 for step in spacing):
            raise InputError(f"spacing={tuple(spacing)}: must be millimetres above 0.")
        if values.ndim not in (3, 4) or values.shape[0] != wanted.count or len(spacing) != values.ndim - 1:
            raise InputError(
                f"values of {values.shape} with {len(spacing)} spacings: must be ({wanted.count}, y, x) or "
                f"({wanted.count}, z, y, x), with a spacing for each but the first."
            )
        if not np.isfinite(values).all():
            raise InputError("values: NaN or infinite values in it. Replace them.")
        values = values.astype(np.uint8) if values.dtype.kind == "b" else values
        how = replace(self.bundle.seeing(), flips=flips, probabilities=probabilities)
        behaviour = self.bundle.contract.behaviour()
        return segment(values, tuple(spacing), self.scorer(flips), behaviour, how, None)

    def predict_scan(self, files: str | Path | Sequence[Path], flips: bool = False, probabilities: bool = False) -> NDArray:
        """`predict` of an image, a volume, or the files of one DICOM series in order; a volume is in LPS."""
        scan = read_scan(Path(files) if isinstance(files, str) else files, self.bundle.contract.input.channels)
        return self.predict(scan.values, scan.spacing, flips, probabilities)


def is_bundle(path: Path) -> bool:
    """A folder with a contract or its seal, or a zip: a damaged one too, which `Bundle.open` refuses."""
    return any((path / name).is_file() for name in (CONTRACT, SEAL)) or (
        path.is_file() and (path.suffix == ".zip" or zipfile.is_zipfile(path))
    )
