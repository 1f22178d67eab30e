"""A loss or gradient that is not finite: which scans were in the step, and whether to stop or to go on without it.

Files are named on the terminal; in the run directory scans have their ids as a run may show them (HMACs, unless the recipe keeps
names).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from resunet.data.cases import Case
from resunet.errors import CheckFailed
from resunet.files import write_text
from resunet.progress import say

FILE = "skipped.jsonl"
_LISTED = 8
_MOST_IN_A_ROW = 10
_ADVICE = "Start anew with a lower optimizer.lr, a longer warmup, or precision=bf16 or fp32"
_SKIP = "or take those scans out; or let on_non_finite=skip leave such steps out, with resume=true from the last checkpoint"


def suspects(scan: Tensor, views: Tensor, outputs: Tensor) -> Tensor:
    """(N, 3) int64: of every scan of a rank's share, which it is, whether its views and whether what they gave are at fault.

    Args:
        scan: (N,). views, outputs: (2N, …), the first views and then the second.
    """

    seen, found = ((~one.flatten(1).isfinite().all(dim=1)).reshape(2, -1).any(dim=0) for one in (views, outputs))
    return torch.stack([scan.to(seen.device), seen.long(), found.long()], dim=1)


def to_blame(rows: Tensor) -> tuple[str, list[int]]:
    """What the `suspects` of a step say: in words, and the scans. Where all are at fault, or none, it is no scan's."""
    for column, words in ((1, "scans whose views are not finite"), (2, "scans whose outputs are not finite")):
        chosen = rows[rows[:, column] > 0]
        if 0 < len(chosen) < len(rows):
            return words, sorted(set(chosen[:, 0].tolist()))
    return "the scans of the step", sorted(set(rows[:, 0].tolist()))


class NonFinite:
    """What is done about such steps; skipped.jsonl of the run directory holds those that were left out."""

    def __init__(self, folder: Path, skip: bool, cases: Sequence[Case], writes: bool) -> None:
        self._path, self._skip, self._cases, self._writes = folder / FILE, skip, cases, writes
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.in_a_row = 0  # of the latest steps, so many were left out

    def rewind(self, first: int) -> None:
        """Go on after `first` steps; later ones are done again."""
        if self._writes and self._path.exists():
            lines = [line for line in self._path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            write_text(self._path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first))

    def before(self, *modules: nn.Module) -> None:
        """Remember what a forward pass changes, running statistics and memory bank, in case the step is left out."""
        if self._skip:
            self._buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]

    def passed(self) -> None:
        """The step was finite."""
        self.in_a_row = 0

    def leave_out(self, step: int, what: str, rows: Tensor, accelerator: Accelerator) -> None:
        """On every rank: undo what the forward passes changed, and say which scans were in the step.

        Args:
            what: such as 'the loss is not finite (nan)'.
            rows: the `suspects` of this rank.

        Raises:
            CheckFailed: the recipe says stop, or too many steps in a row were like this.
        """
        words, scans = to_blame(accelerator.gather(rows) if accelerator.num_processes > 1 else rows)
        cases = [self._cases[scan] for scan in scans]
        listed = ", ".join(case.where() for case in cases[:_LISTED])
        more = f" and {len(cases) - _LISTED} more" if len(cases) > _LISTED else ""
        message = f"step {step}: {what}; {words}: {listed}{more}."
        if not self._skip:
            raise CheckFailed(f"{message} {_ADVICE}; {_SKIP}.")
        self.in_a_row += 1
        if self.in_a_row >= _MOST_IN_A_ROW:
            raise CheckFailed(f"{message} {self.in_a_row} steps in a row were like this. {_ADVICE}.")
        for buffer, earlier in self._buffers:
            buffer.copy_(earlier)
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # it has unscaled these gradients, and without a step expects no others
        if self._writes:
            say(f"{message} It is left out.")
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "what": what, "evidence": words, "scans": [case.id for case in cases]}) + "\n"
                )


def skipped_steps(folder: Path) -> int:
    """How many steps a run left out."""
    path = folder / FILE
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
