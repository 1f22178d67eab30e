"""The run directory, and the one tracker that fills it and mirrors it to Weights & Biases.

    config.json      the resolved recipe; never edited afterwards
    run.json         status, versions, machine, seed, git commit, W&B id, sha256 of every input artefact
    metrics.jsonl    one line a logged step
    checkpoints/     step-N/ written aside, synced, renamed; `last` and `best` are symlinks swapped by os.replace
    model/  evaluation/  receipt.json  report.html

The local record is complete without W&B.
"""

import json
import netrc
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch

from resunet.config import Recipe
from resunet.errors import EnvironmentFault, InputError
from resunet.files import folder_aside, write_text
from resunet.progress import say

PACKAGES = ("resunet", "torch", "lightly", "accelerate", "numpy", "SimpleITK")
_KEPT_CHECKPOINTS = 2
# Values of these keys are the user's paths: they stay in the local config.json and never reach W&B.
_PATH_KEYS = frozenset({"out", "source", "salt_file", "held_out", "encoder", "store", "splits"})
# Keys that may differ when a run is resumed.
_FREE_ON_RESUME = frozenset(
    {"resume", "out", "wandb", "log_every", "checkpoint_every", "data.workers", "data.store", "on_non_finite"}
)

Status = Literal["running", "done", "failed", "stopped"]


def check_out(recipe: Recipe) -> None:
    """Refuse an existing run directory before anything is done.

    Raises:
        InputError: it exists and `resume` is not set, or it is not a run of this recipe.
    """
    out = recipe.out
    if not out.exists():
        return
    if not recipe.resume:
        raise InputError(f"out={out}: exists already. Name another folder, continue it with resume=true, or delete it.")
    if not (out / "config.json").is_file():
        raise InputError(f"out={out}: cannot be resumed, it is not a run directory (no config.json).")
    before, now = (
        _compared(json.loads(text)) for text in ((out / "config.json").read_text(encoding="utf-8"), recipe.model_dump_json())
    )
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
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
        return
    with folder_aside(folder) as aside:
        write_text(aside / "config.json", text)


def _compared(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the one before; keys of `data` by their own names."""
    data = {f"data.{key}": value for key, value in recipe.pop("data", {}).items()}
    return {key: value for key, value in (recipe | data).items() if key not in _FREE_ON_RESUME}


def is_done(out: Path) -> bool:
    """Whether a run that would be resumed has finished: nothing is left to do, and test is read once."""
    path = out / "run.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "done"


class Run:
    """One run directory and its mirror. On ranks other than the main one `writes` is False and nothing is written."""

    def __init__(self, recipe: Recipe, stage: str, inputs: Mapping[str, str], writes: bool = True) -> None:
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
        self._wandb: Any = None
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
        self._record |= {
            "schema_version": 1,
            "stage": stage,
            "seed": recipe.seed,
            "versions": versions(),
            "machine": machine(),
            "git_commit": git_commit(),
            "inputs": dict(inputs),
            "started": self._record.get("started", _now()),
        }
        self.set_status("running")
        self._start_wandb(recipe, stage)
        self.set_status("running")

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
        write_text(self.folder / "run.json", json.dumps(self._record, indent=2) + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same in W&B."""
        if not self.writes:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | dict(metrics)) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def rewind(self, step: int) -> None:
        """Drop logged lines after `step`: a resumed run writes them again."""
        path = self.folder / "metrics.jsonl"
        if self.writes and path.exists():
            lines = [
                line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")
            ]  # a kill cuts the last one short
            write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def summarise(self, figures: Mapping[str, float]) -> None:
        """Final figures into the W&B summary."""
        if self._wandb is not None:
            self._wandb.summary.update(dict(figures))

    def finish(self, status: Status, **facts: Any) -> None:
        """Write the last status and close the mirror."""
        self.set_status(status, **facts)
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if status == "done" else 1)
            self._wandb = None

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
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise EnvironmentFault(f"{final}: the checkpoint cannot be written: {error}. Those before it stand.") from error
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
        for path in steps[:-_KEPT_CHECKPOINTS]:
            if path.name not in pointed:
                shutil.rmtree(path)

    def _start_wandb(self, recipe: Recipe, stage: str) -> None:
        mode = recipe.wandb.mode
        if mode == "disabled":
            return
        import wandb

        if mode == "online" and not _wandb_key(wandb.Settings().base_url):
            say("W&B: no API key found, so the run is written offline; `wandb sync` uploads it later.")
            mode = "offline"
        settings = wandb.Settings(
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            host="withheld",  # else the machine's name
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
        )
        self._record.setdefault("wandb_id", uuid.uuid4().hex[:8])

        def start(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                project=recipe.wandb.project,
                group=recipe.wandb.group,
                job_type=stage,
                id=self._record["wandb_id"],
                resume="allow",
                mode=mode,
                dir=self.folder,
                config=without_paths(json.loads(recipe.model_dump_json())),
                settings=settings,
            )

        try:
            self._wandb = start(mode)
        except (wandb.errors.Error, OSError) as error:
            if mode != "online":
                raise
            say(f"W&B: cannot be reached ({error}); the run is written offline, `wandb sync` uploads it later.")
            self._wandb = start("offline")


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values as W&B may have them."""
    return {
        key: without_paths(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _PATH_KEYS
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def machine() -> dict[str, Any]:
    """What the run ran on; no host and no user name."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """The commit of the checkout this package runs from; None for an installed copy."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def wandb_state() -> str:
    """What a recipe's wandb.mode=online would do on this machine."""
    import wandb

    host = wandb.Settings().base_url
    if _wandb_key(host):
        return f"{wandb.__version__}, a key for {host} is there: wandb.mode=online uploads"
    return f"{wandb.__version__}, no key for {host}: runs are written offline, `wandb sync` uploads them later"


def _wandb_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlparse(base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _point(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}.{uuid.uuid4().hex}")
    aside.symlink_to(target)
    os.replace(aside, link)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
