"""`resunet verify BUNDLE`: its bytes, its graphs, and its golden cases on every runtime that is here."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resunet.bundle.bundle import Bundle
from resunet.bundle.contract import Contract, Graph
from resunet.bundle.engines import name_of, open_engine, refuse_format, version_of
from resunet.bundle.golden import Replayed, replay
from resunet.errors import CheckFailed, EnvironmentFault, InputError


@dataclass(frozen=True)
class Row:
    """What a graph came to. version: of its runtime, None where it is not here; fault: None where all is as it must be.

    missing: what its runtime lacks on this machine, None where nothing.
    answers: how far they are from the live network's; seconds: for opening it and for all golden cases.
    """

    graph: Graph
    version: str | None
    answers: Replayed | None
    seconds: float
    fault: str | None
    missing: str | None

    @property
    def replayed(self) -> bool:
        """Its golden cases were."""
        return self.version is not None and self.missing is None

    @property
    def verdict(self) -> str:
        if self.fault is not None:
            return "FAILED"
        if self.missing is not None:
            return f"not usable here: {self.missing}"
        return "not installed" if self.version is None else "equal"


@dataclass(frozen=True)
class Verified:
    """The bundle's digest, and a row for each graph."""

    sha256: str
    rows: tuple[Row, ...]


def verify(path: Path, sha256: str | None = None, told: Callable[[str], None] = print) -> Verified:
    """Check everything, and tell a table of it.

    Args:
        sha256: the bundle's own, as it was noted when it was exported.

    Raises:
        InputError: no bundle there.
        CheckFailed: another digest, a changed byte, or a graph whose answers are not the live network's.
        EnvironmentFault: no runtime of it is installed.
    """
    bundle = Bundle.open(path)
    told(f"{len(bundle.contract.files)} files are those of the contract, whose sha256 is {bundle.sha256}")
    if sha256 is not None and sha256.lower() != bundle.sha256:
        raise CheckFailed(f"{path}: is another bundle: --sha256 {sha256}, it has {bundle.sha256}.")
    rows = check_graphs(bundle.folder, bundle.contract)
    for line in table(rows):
        told(line)
    if faults := [f"  {row.graph.runtime} {row.graph.precision}: {row.fault}" for row in rows if row.fault is not None]:
        raise CheckFailed(f"{path}: {len(faults)} of {len(rows)} graphs failed:\n" + "\n".join(faults))
    if not any(row.replayed for row in rows):
        names = " or ".join(dict.fromkeys(name_of(row.graph.runtime) for row in rows))
        raise EnvironmentFault(
            f"{path}: nothing was replayed: {names} is needed. pip install -r requirements.txt, of the bundle."
        )
    return Verified(bundle.sha256, rows)


def check_graphs(folder: Path, contract: Contract) -> tuple[Row, ...]:
    """Every graph of a bundle: its format, and the golden cases where its runtime is here."""
    return tuple(_check(folder, contract, graph) for graph in contract.graphs)


def _check(folder: Path, contract: Contract, graph: Graph) -> Row:
    version, replayed, fault, missing = version_of(graph.runtime), None, None, None
    start = time.perf_counter()
    try:
        refuse_format(folder, graph)
        if version is not None:
            replayed = replay(folder, contract, graph, open_engine(folder, contract, graph))
    except (CheckFailed, InputError) as error:  # InputError: a runtime that cannot run a golden case
        fault = str(error)
    except EnvironmentFault as error:  # a GPU or its driver: the other runtimes are replayed all the same
        missing = str(error)
    return Row(graph, version, replayed, time.perf_counter() - start, fault, missing)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for a terminal."""
    head = ("runtime", "version", "precision", "largest difference", "tolerance", "decided otherwise", "seconds", "verdict")
    cells = [head] + [
        (
            name_of(row.graph.runtime),
            row.version or "–",
            row.graph.precision,
            "–" if row.answers is None else f"{row.answers.difference:.1e}",
            f"{row.graph.tolerance:.0e}",
            "–" if row.answers is None else f"{row.answers.decided:.2%} of pixels",
            "–" if row.version is None else f"{row.seconds:.1f}",
            row.verdict,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
