"""The run directory, and the one tracker that fills it and mirrors it to Weights & Biases.

    config.json      the resolved recipe; never edited afterwards
    run.json         status, versions, machine, seed, git commit, W&B id, sha256 of every input artefact
    metrics.jsonl    one line a logged step
    checkpoints/     step-N/ written aside, synced, renamed; `last` and `best` are symlinks swapped by os.replace
    model/  evaluation/  receipt.json  report.html

The local record is complete without W&B.
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from resunet.config import Recipe
from resunet.errors import EnvironmentFault, InputError, ResUNetError
from resunet.files import folder_aside, refuse_taken, write_text
from resunet.machine import git_commit, machine, versions
from resunet.mirror import Mirror, start_mirror, without_paths

# Keys that may differ when a run is resumed.
_FREE_ON_RESUME = frozenset(
    {
        "resume",
        "out",
        "wandb",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "data.workers",
        "data.store",
        "on_non_finite",
    }
)
ANOTHER_NUMBER = "ranks"  # of a recipe's `allow`: to resume with
# Of writing only: what else a system refuses may be a file that is read.
_REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})

Status = Literal["running", "done", "failed", "stopped"]
Stage = Literal["pretrain", "finetune", "label-curve", "compress"]


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """What the disk refuses in the block is the environment's fault.

    Raises:
        EnvironmentFault: with the run directory and the reason.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ResUNetError) or (reason := refusal_of(error)) is None:
            raise
        raise EnvironmentFault(
            f"{folder}: cannot be written: {reason}. Checkpoints stand: free space, and continue with resume=true."
        ) from error


def refusal_of(error: BaseException) -> str | None:
    """Why the disk refused, or None where it was something else.

    torch.save raises a RuntimeError of its own while it handles the disk's OSError; safetensors has the system's words only.
    """
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and one.errno in _REFUSALS:
            return one.strerror
        if isinstance(one, SafetensorError) and (found := re.search(r"\(os error (\d+)\)", str(one))):
            number = int(found[1])
            return os.strerror(number) if number in _REFUSALS else None
        one = one.__cause__ or one.__context__
    return None


def check_out(recipe: Recipe) -> None:
    """Refuse an existing run directory before anything is done.

    Raises:
        InputError: it exists and `resume` is not set, or it is not a run of this recipe.
    """
    out = recipe.out
    if not recipe.resume or not out.exists():
        refuse_taken(out, "out=", otherwise="continue it with resume=true, or delete it")
        return
    if not (out / "config.json").is_file():
        raise InputError(f"out={out}: cannot be resumed, it is not a run directory (no config.json).")
    then = json.loads((out / "config.json").read_text(encoding="utf-8"))
    now = json.loads(recipe.model_dump_json())
    with suppress(ValidationError):  # keys that a later version added have their defaults; one that it dropped is shown
        then = json.loads(type(recipe).model_validate(then).model_dump_json())
    before, now = _compared(then), _compared(now)
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing == ["processes"] and ANOTHER_NUMBER in recipe.allow:
        return
    if differing == ["processes"]:
        raise InputError(
            f"out={out}: was started with processes={before['processes']}, not {now['processes']}. Set allow=[{ANOTHER_NUMBER}] "
            "to go on with another number of ranks: the same batches and steps, but not the same weights bit for bit."
        )
    if differing:
        lines = "\n".join(f"  {key}: {before.get(key)} then, {now.get(key)} now" for key in differing)
        raise InputError(f"out={out}: was started with another recipe:\n{lines}\nResume with the same, or name another out.")


def _start_folder(folder: Path, recipe: Recipe) -> None:
    """The folder with its config.json; a new one appears with it, so that whatever stands can be resumed."""
    text = recipe.model_dump_json(indent=2, exclude={"resume"}) + "\n"
    if folder.exists():
        if not recipe.resume:
            raise FileExistsError(f"{folder} exists already")
        if not (folder / "config.json").exists():
            write_text(folder / "config.json", text)
        for left in (folder / "checkpoints").glob(".step-*"):  # of a process that was killed while it wrote it
            shutil.rmtree(left)
        return
    with folder_aside(folder) as aside:
        write_text(aside / "config.json", text)


def _compared(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the one before; keys of `data` by their own names."""
    data = {f"data.{key}": value for key, value in recipe.pop("data", {}).items()}
    allowed = {"allow": [one for one in recipe.pop("allow", []) if one != ANOTHER_NUMBER]}
    return {key: value for key, value in (recipe | data | allowed).items() if key not in _FREE_ON_RESUME}


def is_done(out: Path) -> bool:
    """Whether a run that would be resumed has finished: nothing is left to do, and test is read once."""
    path = out / "run.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "done"


def stage_of(out: Path) -> str:
    """Of a folder with a run.json: see `Stage`."""
    return str(json.loads((out / "run.json").read_text(encoding="utf-8")).get("stage"))


def note_input(out: Path, name: str, digest: str) -> None:
    """Put the sha256 of an input that a finished run was given afterwards into its run.json."""
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    record["inputs"][name] = digest
    write_text(out / "run.json", json.dumps(record, indent=2) + "\n")


def note_work(out: Path, stage: Stage, seed: int, status: Status, inputs: Mapping[str, str]) -> None:
    """Write run.json of what is made of several runs, a label curve or a compression; when it began is kept."""
    path = out / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    its = _facts(stage, seed, inputs) | {"status": status, "started": before.get("started", _now()), "updated": _now()}
    write_text(path, json.dumps(its, indent=2) + "\n")


def _facts(stage: Stage, seed: int, inputs: Mapping[str, str]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "stage": stage,
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        "git_commit": git_commit(),
        "inputs": dict(inputs),
    }


class Run:
    """One run directory and its mirror. On ranks other than the main one `writes` is False and nothing is written."""

    def __init__(self, recipe: Recipe, stage: Stage, inputs: Mapping[str, str], writes: bool = True) -> None:
        """Create the directory, or continue the one that is there.

        Args:
            stage: 'pretrain' or 'finetune'.
            inputs: sha256 of every input artefact, by what it is.

        Raises:
            InputError: a run that is resumed has other inputs now.
            EnvironmentFault: it cannot be written.
        """
        self.folder = recipe.out
        self.writes = writes
        self._kept = recipe.keep_checkpoints
        self._mirror: Mirror | None = None
        self._record: dict[str, Any] = {}
        if not writes:
            return
        try:
            _start_folder(self.folder, recipe)
        except OSError as error:
            raise EnvironmentFault(f"out={self.folder}: cannot be written: {error}") from error
        if (self.folder / "run.json").exists():
            self._record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        self._refuse_other_inputs(inputs)
        self._record |= _facts(stage, recipe.seed, inputs) | {
            "processes": self._ranks(recipe),
            "started": self._record.get("started", _now()),
        }
        self.set_status("running")
        if recipe.wandb.mode != "disabled":
            self._record.setdefault("wandb_id", uuid.uuid4().hex[:8])
            config = without_paths(json.loads(recipe.model_dump_json())) | {"inputs": dict(inputs)}
            self._mirror = start_mirror(recipe.wandb, stage, self._record["wandb_id"], self.folder, config)
            if self._mirror is not None:
                self._record["wandb_id"] = self._mirror.id
        self.set_status("running")

    def _ranks(self, recipe: Recipe) -> list[int]:
        """How many there were, of a run that was resumed with another number one after another."""
        began = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["processes"]
        known: list[int] = self._record.get("processes", [began])
        return known if known[-1] == recipe.processes else [*known, recipe.processes]

    def _refuse_other_inputs(self, inputs: Mapping[str, str]) -> None:
        before = self._record.get("inputs", dict(inputs))
        changed = sorted(name for name in before.keys() | inputs.keys() if before.get(name) != inputs.get(name))
        if changed:
            raise InputError(
                f"out={self.folder}: cannot be resumed, its inputs have changed since it was started: {', '.join(changed)}. "
                "Restore them, or name another out."
            )

    def set_status(self, status: Status, **facts: Any) -> None:
        """Write run.json; `facts` are kept beside the status."""
        if not self.writes:
            return
        self._record |= facts | {"status": status, "updated": _now()}
        with disk_faults(self.folder):
            write_text(self.folder / "run.json", json.dumps(self._record, indent=2) + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same in W&B."""
        if not self.writes:
            return
        with disk_faults(self.folder), open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | dict(metrics)) + "\n")
        if self._mirror is not None:
            self._mirror.log(step, metrics)

    @property
    def mirror(self) -> Mirror | None:
        """Where W&B may be told more; None where there is none, and on ranks that do not write."""
        return self._mirror

    def rewind(self, step: int) -> None:
        """Drop logged lines after `step`: a resumed run writes them again."""
        path = self.folder / "metrics.jsonl"
        if self.writes and path.exists():
            lines = [
                line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")
            ]  # a kill cuts the last one short
            write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def finish(self, status: Status, **facts: Any) -> None:
        """Write the last status and close the mirror."""
        try:
            self.set_status(status, **facts)
        finally:
            if self._mirror is not None:
                self._mirror.finish(status == "done")
                self._mirror = None

    def save_checkpoint(self, step: int, state: Mapping[str, Any], best: bool = False) -> None:
        """checkpoints/step-N/state.pt written aside, synced and renamed; then `last` (and `best`) point at it.

        Raises:
            EnvironmentFault: the disk refuses; the checkpoints before stand.
        """
        if not self.writes:
            return
        folder = self.folder / "checkpoints"
        final = folder / f"step-{step}"
        try:
            with folder_aside(final) as aside, open(aside / "state.pt", "wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            for name in ("best", "last") if best else ("last",):  # a kill in between leaves `last` to be redone
                _point(folder / name, final.name)
        except (OSError, RuntimeError) as error:
            if (reason := refusal_of(error)) is None:
                raise
            raise EnvironmentFault(
                f"{final}: the checkpoint cannot be written: {reason}. Those before it stand: free space, and continue with "
                "resume=true."
            ) from error
        self._drop_old_checkpoints()

    def load_checkpoint(self, name: Literal["last", "best"]) -> dict[str, Any] | None:
        """What `save_checkpoint` saved, on the CPU, or None where there is none. Nothing but tensors is unpickled."""
        path = self.folder / "checkpoints" / name / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def _drop_old_checkpoints(self) -> None:
        folder = self.folder / "checkpoints"
        pointed = {(folder / name).readlink().name for name in ("last", "best") if (folder / name).is_symlink()}
        steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for path in steps[: -self._kept]:
            if path.name not in pointed:
                shutil.rmtree(path)


def _point(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    aside.symlink_to(target)
    os.replace(aside, link)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
