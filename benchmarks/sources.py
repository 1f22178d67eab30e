"""Sources made of a benchmark set's own files: links to its images and masks, and a split without what leaks.

`resunet pretrain` finds a copy of neu_seg's test image tr_003421 in its pool, tr_001681, and goes no further (LOG.md, "Copies of
test images in an archive"). A benchmark takes the copy out of the pool, for all arms, rather than allow it.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from resunet.files import write_text

# set → stems of its pool that are copies of test images
LEAKS = {"neu_seg": {"tr_001681"}}


def linked_source(data: Path, out: Path, without: Collection[str] = ()) -> Path:
    """The images, masks, groups and splits of `data` in `out`, made once, with some stems taken out of every part of the split."""
    if (out / "splits.json").exists():  # written last; other processes may be reading
        return out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("images", "masks"):
        if not (out / name).exists():
            (out / name).symlink_to((data / name).resolve(), target_is_directory=True)
    shutil.copyfile(data / "groups.csv", out / "groups.csv")
    splits = json.loads((data / "splits.json").read_text(encoding="utf-8"))
    kept = {part: [stem for stem in stems if stem not in without] for part, stems in splits.items()}
    write_text(out / "splits.json", json.dumps(kept, indent=0) + "\n")
    return out


def without_leaks(data: Path, out: Path) -> Path:
    """The set `data` itself, or `out` made of it without the copies of test images that its pool holds."""
    leaks = LEAKS.get(data.name)
    return linked_source(data, out, leaks) if leaks else data
