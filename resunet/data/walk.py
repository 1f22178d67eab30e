"""Every file below some folders: links to files followed, loops not, hidden files and label folders left out."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from resunet.errors import InputError

# Folders of labels beside the images they belong to: masks are not scans.
_LABEL_FOLDERS = {"masks": "images", "labelsTr": "imagesTr", "labelsTs": "imagesTs"}
_OF_SETS = frozenset({"groups.csv", "splits.json"})
# What describes a source and is none of its scans.
_SIDE_FILES = frozenset({"groups.csv", "splits.json", "dataset.json", "DICOMDIR", "Thumbs.db"})


class FoundFile(NamedTuple):
    """A file by its absolute path, and what tells whether it has changed since."""

    path: str
    size: int
    mtime_ns: int


@dataclass
class Tree:
    """What is below some roots, sorted by path.

    links: those of the files that are links.
    sets: folders with groups, splits or labels of their own.
    unreachable: what is there and cannot be reached, with the reason: folders that may not be listed, links to nowhere.
    """

    files: list[FoundFile] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    sets: list[Path] = field(default_factory=list)
    unreachable: list[tuple[FoundFile, str]] = field(default_factory=list)


def walk(roots: Sequence[Path], leave_out: Callable[[str], bool] = lambda path: False) -> Tree:
    """The files below `roots` (folders, or single files), each path and each folder once.

    Args:
        leave_out: files and folders that are not looked at, by their absolute paths.

    Raises:
        InputError: a root that does not exist or may not be looked at.
    """
    found: dict[str, FoundFile] = {}
    tree = Tree()
    visited: set[tuple[int, int]] = set()
    for root in roots:
        path = os.path.abspath(root)  # noqa: PTH100 (links keep their names)
        try:
            status = Path(path).stat()
            folder = stat.S_ISDIR(status.st_mode)
            files = list(_below(path, visited, leave_out, tree)) if folder else [_stamped(path, status)]
            if not folder and Path(path).is_symlink():
                tree.links.add(path)
        except FileNotFoundError as error:
            raise InputError(f"SOURCE {root}: no such file or folder.") from error
        except OSError as error:
            raise InputError(f"SOURCE {root}: cannot be read: {error.strerror}. Correct its permissions.") from error
        found |= {file.path: file for file in files}
    tree.files = [found[path] for path in sorted(found)]
    tree.unreachable.sort(key=lambda one: one[0].path)
    return tree


def _below(folder: str, visited: set[tuple[int, int]], leave_out: Callable[[str], bool], tree: Tree) -> Iterator[FoundFile]:
    try:
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:  # a link back, or a second way to the same folder
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        tree.unreachable.append((FoundFile(folder, 0, 0), f"the folder cannot be listed: {error.strerror}"))
        return
    names = {entry.name for entry in entries}
    if names & _OF_SETS or any(labels in names and images in names for labels, images in _LABEL_FOLDERS.items()):
        tree.sets.append(Path(folder))
    for entry in entries:
        if entry.name.startswith(".") or entry.name in _SIDE_FILES or leave_out(entry.path):
            continue
        try:
            if entry.is_dir():
                if _LABEL_FOLDERS.get(entry.name) not in names:
                    yield from _below(entry.path, visited, leave_out, tree)
            elif entry.is_file():
                if entry.is_symlink():
                    tree.links.add(entry.path)
                yield _stamped(entry.path, entry.stat())
            elif entry.is_symlink() and not Path(entry.path).exists():
                tree.unreachable.append((FoundFile(entry.path, 0, 0), "a link to nowhere"))
        except FileNotFoundError:  # it went while we looked
            continue
        except OSError as error:  # a link to itself, a folder on the way that may not be entered
            tree.unreachable.append((FoundFile(entry.path, 0, 0), f"cannot be reached: {error.strerror}"))


def _stamped(path: str, status: os.stat_result) -> FoundFile:
    return FoundFile(path, status.st_size, status.st_mtime_ns)
