"""A split as a file: drawn by the command, edited by a person, used by a recipe."""

import json

import pytest

from resunet.cli import main
from resunet.config import DataSettings
from resunet.data.source import assign_parts, draw_labelled, open_source
from resunet.errors import InputError


def stems(folder, salt, splits=None) -> dict[str, list[str]]:
    return open_source(DataSettings(source=folder, salt_file=salt, splits=splits), masks=True).stems()


def test_a_written_split_is_the_one_that_training_makes(write_blobs, salt, tmp_path, capsys):
    folder = write_blobs(splits=False)
    out = tmp_path / "split.json"
    assert main(["split", str(folder), "--out", str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    made = assign_parts(open_source(DataSettings(source=folder, salt_file=salt), masks=True), 3)
    assert stems(folder, salt, out) == made.stems() == json.loads(out.read_text(encoding="utf-8"))
    assert all(made.part(part) for part in ("pool", "val", "test"))


@pytest.mark.parametrize("labelled", [2, 0.25])
def test_a_labelled_subset_is_a_file_too(write_blobs, salt, tmp_path, capsys, labelled):
    folder, out = write_blobs(), tmp_path / "few.json"
    assert main(["split", str(folder), "--out", str(out), "--labelled", str(labelled), "--draw", "1"]) == 0
    whole = open_source(DataSettings(source=folder, salt_file=salt), masks=True)
    assert stems(folder, salt, out) == draw_labelled(whole, labelled, 1).stems()
    assert "pool: 4 images of 2 groups, val: 4 images of 2 groups, test: 10 images of 5 groups" in capsys.readouterr().err


def test_an_edited_split_counts(write_blobs, salt, tmp_path):
    folder, out = write_blobs(), tmp_path / "split.json"
    assert main(["split", str(folder), "--out", str(out)]) == 0
    edited = json.loads(out.read_text(encoding="utf-8"))
    group = sorted(edited["test"])[:2]  # both slices of one patient
    edited["test"] = [stem for stem in edited["test"] if stem not in group]
    edited["val"] += group
    out.write_text(json.dumps(edited))
    assert sorted(stems(folder, salt, out)["val"]) == sorted(edited["val"])
    assert sorted(stems(folder, salt)["val"]) != sorted(edited["val"])


def test_what_somebody_may_have_edited_is_not_overwritten(write_blobs, tmp_path, capsys):
    out = tmp_path / "split.json"
    out.write_text("{}")
    assert main(["split", str(write_blobs()), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err and out.read_text(encoding="utf-8") == "{}"


def test_a_split_that_is_not_there_is_no_split_of_ones_own(write_blobs, salt, tmp_path):
    with pytest.raises(InputError, match=r"data\.splits=.*none\.json: no such file\. resunet split"):
        stems(write_blobs(), salt, tmp_path / "none.json")
