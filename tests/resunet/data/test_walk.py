import os
from pathlib import Path

import pytest

from resunet.data.walk import FoundFile, walk
from resunet.errors import InputError


def names(tree, root):
    return [os.path.relpath(file.path, root) for file in tree.files]


def plant(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def test_files_sorted_with_size_and_time(tmp_path):
    plant(tmp_path, "b/2", "a", "b/1.png")
    tree = walk([tmp_path])
    assert names(tree, tmp_path) == ["a", "b/1.png", "b/2"]
    status = (tmp_path / "b/2").stat()
    assert tree.files[2] == FoundFile(str(tmp_path / "b/2"), 3, status.st_mtime_ns)
    assert not tree.unreachable


def test_hidden_side_and_label_files_are_left_out(tmp_path):
    plant(
        tmp_path,
        ".git/x",
        "x/.y.png",
        "groups.csv",
        "s/splits.json",
        "DICOMDIR",
        "s/images/a",
        "s/masks/a",
        "masks/b",
        "n/labelsTr/c",
    )
    assert names(walk([tmp_path]), tmp_path) == ["masks/b", "n/labelsTr/c", "s/images/a"]
    assert names(walk([tmp_path], lambda path: path == str(tmp_path / "s")), tmp_path) == ["masks/b", "n/labelsTr/c"]


def test_links_to_files_are_followed_and_loops_are_not(tmp_path):
    plant(tmp_path, "real/a")
    plant(tmp_path, "elsewhere/c")
    (tmp_path / "real/b").symlink_to("a")
    (tmp_path / "real/up").symlink_to(tmp_path)
    (tmp_path / "real/self").symlink_to("self")
    (tmp_path / "real/gone").symlink_to("nowhere")
    (tmp_path / "real/zdir").symlink_to(tmp_path / "elsewhere")
    tree = walk([tmp_path / "real"])
    assert names(tree, tmp_path) == ["real/a", "real/b", "real/up/elsewhere/c"]
    assert tree.files[0].size == tree.files[1].size == len("real/a")
    assert tree.links == {str(tmp_path / "real/b")} and walk([tmp_path / "real/b"]).links == tree.links
    assert [(Path(file.path).name, reason.split(":")[0]) for file, reason in tree.unreachable] == [
        ("gone", "a link to nowhere"),
        ("self", "cannot be reached"),
    ]


def test_roots_that_overlap_give_each_file_once(tmp_path, monkeypatch):
    plant(tmp_path, "a/1", "a/b/2")
    (tmp_path / "again").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    roots = [Path("a/b"), tmp_path / "a", Path("a"), tmp_path / "again", tmp_path / "a" / "1"]
    assert names(walk(roots), tmp_path) == ["a/1", "a/b/2"]


def test_names_that_are_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\n.png"
    Path(os.fsdecode(path)).write_text("x")
    assert [os.fsencode(file.path) for file in walk([tmp_path]).files] == [path]


def test_a_root_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"SOURCE .*nowhere: no such file"):
        walk([tmp_path / "nowhere"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path):
    plant(tmp_path, "a/1", "b/2")
    (tmp_path / "b").chmod(0)
    tree = walk([tmp_path])
    (tmp_path / "b").chmod(0o700)
    assert names(tree, tmp_path) == ["a/1"]
    assert [(file.path, reason) for file, reason in tree.unreachable] == [
        (str(tmp_path / "b"), "the folder cannot be listed: Permission denied")
    ]
