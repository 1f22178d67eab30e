"""What Weights & Biases is told of an export: the bundle, below the segmenter that it was made of."""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

from resunet.bundle.verify import Row
from resunet.checkpoint import WEIGHTS
from resunet.config import WandbSettings
from resunet.files import sha256
from resunet.mirror import start_mirror


def mirror_bundle(model: Path, bundle: Path, digest: str, rows: Sequence[Row]) -> None:
    """The bundle as an artifact in a run of job type `export`, where the recipe of the model's run wants W&B.

    Args:
        model: the model/ folder of a run; nobody said what may go there of another one.
        digest: the bundle's, as export prints it; rows: what its graphs were found to be.
    """
    config = model.parent / "config.json"
    if model.name != "model" or not config.is_file():
        return
    settings = WandbSettings.model_validate(json.loads(config.read_text(encoding="utf-8")).get("wandb", {"mode": "disabled"}))
    weights, files = sha256(model / WEIGHTS), sorted(path for path in bundle.rglob("*") if path.is_file())
    facts = {
        "sha256": digest,
        "graphs": [f"{row.graph.runtime}-{row.graph.precision}" for row in rows],
        "bytes": sum(path.stat().st_size for path in files),
    }
    mirror = start_mirror(settings, "export", uuid.uuid4().hex[:8], model.parent, {"inputs": {"segmenter": weights}})
    if mirror is None:
        return
    mirror.artifact("bundle", bundle, facts, {"segmenter": weights}, [str(path.relative_to(bundle)) for path in files])
    mirror.finish(succeeded=True)
