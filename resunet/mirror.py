"""The mirror of a run in Weights & Biases: groups, job types, goals, tables, pictures and artifacts, online or in a file for later.

What may go there is the recipe's choice: figures always, pictures of scans and weights only where `wandb.upload` names them; names,
ids and paths never, nor the machine's and the user's: a case is a number, counted in the order of its id, and artifacts are
called by the sha256 of their weights. The local record is complete without W&B.
"""

import netrc
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
from numpy.typing import NDArray

from resunet.config import WandbSettings
from resunet.files import write_text
from resunet.progress import say

# Values of these keys are the user's paths: they stay in the local config.json and never reach W&B.
_PATH_KEYS = frozenset(
    {"draw_encoder", "encoder", "held_out", "out", "salt_file", "source", "splits", "start", "store", "teacher", "weights"}
)
# What of each figure W&B keeps in a run's summary, and shows in its tables: the best, not the last.
_BEST: Mapping[str, Literal["min", "max"]] = {"loss": "min", "val_dice": "max", "probe_dice": "max"}


@dataclass(frozen=True)
class Overlaid:
    """A slice with masks over it.

    grey: (y, x, 3) uint8. masks: name → (y, x) class indices. classes: class index → name.
    """

    grey: NDArray[np.uint8]
    masks: Mapping[str, NDArray[np.uint8]]
    classes: Mapping[int, str]


class Mirror:
    """An open W&B run."""

    def __init__(self, run: Any, settings: WandbSettings) -> None:
        self._run, self._settings = run, settings
        for name, best in _BEST.items():
            run.define_metric(name, summary=best)

    @property
    def id(self) -> str:
        """Of the W&B run: the one asked for; in a sweep the agent's."""
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's figures."""
        self._run.log(dict(metrics), step=step)

    def summarise(self, figures: Mapping[str, Any]) -> None:
        """Final figures, into the run's summary."""
        self._run.summary.update(dict(figures))

    @property
    def takes_pictures(self) -> bool:
        """Whether the recipe lets pictures of scans go."""
        return "overlays" in self._settings.upload

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows of figures and of `Overlaid`; only where the recipe lets pictures go."""
        import wandb

        assert self.takes_pictures
        table = wandb.Table(columns=list(columns))
        for row in rows:
            table.add_data(*(_picture(cell) if isinstance(cell, Overlaid) else cell for cell in row))
        self._run.log({name: table})

    def model(self, kind: str, folder: Path, facts: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """A model directory as an artifact: what it is, and, where the recipe lets them go, its weights; no HMAC of a group.

        Args:
            kind: 'encoder' or 'segmenter'.
            facts: its metadata; `sha256`, of its weights, names it.
            inputs: kind → sha256 of what it was made from, by which W&B draws the lineage.
        """
        if "weights" not in self._settings.upload:
            self.artifact(kind, folder, facts, inputs, ())
            return
        from resunet.checkpoint import CONFIG, WEIGHTS, read_config, without_patients  # torch, which an index does without

        with tempfile.TemporaryDirectory() as name:
            aside = Path(name)
            write_text(aside / CONFIG, without_patients(read_config(folder)).model_dump_json(indent=2) + "\n")
            (aside / WEIGHTS).symlink_to((folder / WEIGHTS).resolve())
            self.artifact(kind, aside, facts, inputs, (CONFIG, WEIGHTS))

    def artifact(
        self, kind: str, folder: Path, facts: Mapping[str, Any], inputs: Mapping[str, str], files: Sequence[str]
    ) -> None:
        """`model`, of anything: a manifest, a bundle.

        Args:
            files: in the folder, that hold weights: they go where the recipe lets them.
        """
        import wandb

        for its, digest in inputs.items():
            self._use(its, digest)
        artifact = wandb.Artifact(
            artifact_name(kind, facts["sha256"]), type=kind, metadata=dict(facts) | {"inputs": dict(inputs)}
        )
        for name in files if "weights" in self._settings.upload else ():
            artifact.add_file(str(folder / name), name=name, policy="mutable")  # a copy: the file for later names it
        self._run.log_artifact(artifact)

    def _use(self, kind: str, digest: str) -> None:
        import wandb

        if self._run.offline:
            return  # W&B cannot: the artifact's metadata names its inputs, see README
        name = artifact_name(kind, digest)
        try:
            self._run.use_artifact(f"{name}:latest", type=kind)
        except (wandb.errors.CommError, ValueError):  # nobody logged it there: what is known of it begins the lineage
            self._run.use_artifact(wandb.Artifact(name, type=kind, metadata={"sha256": digest}))

    def finish(self, succeeded: bool) -> None:
        """Close it; online, what is left is uploaded."""
        self._run.finish(exit_code=0 if succeeded else 1)


def start_mirror(settings: WandbSettings, job_type: str, run_id: str, folder: Path, config: Mapping[str, Any]) -> Mirror | None:
    """Open the W&B run of a run directory, or continue it; None where the recipe, or WANDB_MODE=disabled, wants none. Without a key
    or network: offline.

    Args:
        job_type: 'index', 'pretrain', 'finetune', 'evaluate', 'compress', 'export'.
        folder: where W&B writes: the run directory.
        config: what W&B may know of the recipe.
    """
    if settings.mode == "disabled" or _switched_off():
        return None
    import wandb

    mode = settings.mode
    if mode == "online" and not _wandb_key(wandb.Settings().base_url):
        say("W&B: no API key found, so the run is written offline; `wandb sync` uploads it later.")
        mode = "offline"
    discreet = wandb.Settings(
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

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=settings.project,
            group=settings.group,
            name=settings.name,
            tags=list(settings.tags),
            job_type=job_type,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=folder.resolve(),  # W&B's service may be that of a process elsewhere
            config=dict(config),
            settings=discreet,
        )

    try:
        return Mirror(start(mode), settings)
    except (wandb.errors.Error, OSError) as error:
        if mode != "online":
            raise
        say(f"W&B: cannot be reached ({error}); the run is written offline, `wandb sync` uploads it later.")
        return Mirror(start("offline"), settings)


def artifact_name(kind: str, digest: str) -> str:
    """What an artifact is called: the same weights are the same artifact, whoever made them."""
    return f"{kind}-{digest[:12]}"


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values as W&B may have them."""
    return {
        key: without_paths(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _PATH_KEYS
    }


def _switched_off() -> bool:
    return os.environ.get("WANDB_MODE", "").lower() == "disabled"


def wandb_state() -> str:
    """What a recipe's wandb.mode=online would do on this machine."""
    import wandb

    if _switched_off():
        return f"{wandb.__version__}, WANDB_MODE=disabled: nothing is mirrored, whatever a recipe says"
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


def _picture(one: Overlaid) -> Any:
    import wandb

    names = dict(one.classes)
    return wandb.Image(one.grey, masks={name: {"mask_data": mask, "class_labels": names} for name, mask in one.masks.items()})
