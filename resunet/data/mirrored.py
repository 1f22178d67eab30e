"""What Weights & Biases is told of a manifest: what it counts, and by which hash runs name it. No row of it goes there."""

import uuid

from resunet.config import WandbSettings
from resunet.data.manifest import Manifest
from resunet.data.summary import rejected
from resunet.mirror import start_mirror


def mirror_manifest(manifest: Manifest, settings: WandbSettings) -> None:
    """The manifest as an artifact in a run of job type `index`: the first link of the lineage that encoders name.

    W&B writes beside the manifest.
    """
    facts = {
        "scans": manifest.num_rows,
        "groups": len(manifest.column("group").unique()),
        "labelled": manifest.num_rows - manifest.column("mask").null_count,
        "rejected": sum(count for _, count in rejected(manifest.path)),
    }
    mirror = start_mirror(settings, "index", uuid.uuid4().hex[:8], manifest.path.parent, {})
    if mirror is None:
        return
    mirror.summarise(facts)
    mirror.artifact("manifest", manifest.path.parent, facts | {"sha256": manifest.digest}, {}, [])
    mirror.finish(succeeded=True)
