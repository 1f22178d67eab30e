import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from accelerate import Accelerator
from PIL import Image

from pretrain.archive import Archive, read_archive
from pretrain.loop import pretrain
from pretrain.recipe import PretrainRecipe
from resunet.checkpoint import read_config
from resunet.data.index import IndexRequest, index
from resunet.data.leakage import read_archive as read_record
from resunet.errors import CheckFailed, InputError
from resunet.exits import exit_code_of

Make = Callable[..., PretrainRecipe]


def smooth(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 255, (8, 8)).astype(np.uint8)
    return Image.fromarray(coarse).resize((72, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Images that look as different as scans of different bodies."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(9):
        smooth(i).save(folder / f"scan{i:02}.png")
    (tmp_path / "salt").write_text("ab" * 32)
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """A rotated JPEG of an image of the archive, and an image of nobody's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    smooth(3).transpose(Image.Transpose.ROTATE_90).save(folder / "renamed.jpg", quality=75)
    smooth(100).save(folder / "innocent.png")
    return folder


def indexed(folder: Path, salt: str = "salt") -> Path:
    out = folder.parent / f"{folder.name}.parquet"
    return index(IndexRequest((folder,), out, workers=1, salt_file=folder.parent / salt))


def read(recipe: PretrainRecipe) -> Archive:
    return read_archive(recipe, Accelerator(cpu=True))


@pytest.mark.parametrize("archive_kind", ["folder", "manifest"])
@pytest.mark.parametrize("held_out_kind", ["folder", "manifest"])
def test_a_copy_that_only_looks_alike_stops_the_run(recipe: Make, archive, held_out, archive_kind, held_out_kind, capsys):
    source = indexed(archive) if archive_kind == "manifest" else archive
    other = indexed(held_out) if held_out_kind == "manifest" else held_out
    ours = recipe(data={"source": str(source), "held_out": str(other)})

    def run(arguments: object) -> None:
        pretrain(ours)

    assert exit_code_of(run, []) == 1
    message = capsys.readouterr().err.partition("resunet: ")[2]
    assert message.startswith("1 held-out cases are among the pretraining archive:") and "innocent" not in message
    assert "renamed.jpg (perceptual, correlation 0.99" in message or "renamed.jpg (perceptual, correlation 1.00" in message
    assert not ours.out.exists()
    allowed = read(ours.model_copy(update={"allow": ("leak",)})).allowed
    assert allowed == ["leak: 1 held-out cases are among the pretraining archive"]


def test_what_was_allowed_is_on_record(recipe: Make, held_out):
    out = pretrain(recipe(steps=1, allow=["leak"], data={"held_out": str(held_out)}))
    (allowed,) = read_config(out / "model").allowed
    assert "leak: 1 held-out" in allowed and allowed in (out / "report.html").read_text(encoding="utf-8")
    inputs = json.loads((out / "run.json").read_text(encoding="utf-8"))["inputs"]
    assert set(inputs) == {"data", "data.held_out"} and inputs["data.held_out"] != inputs["data"]


def test_a_manifest_and_its_folder_give_one_record(recipe: Make, archive, tmp_path):
    runs = {}
    for name, source in (("folder", archive), ("manifest", indexed(archive))):
        out = pretrain(recipe(steps=1, out=str(tmp_path / name), data={"source": str(source)}))
        runs[name] = (
            (out / "model" / "archive.parquet").read_bytes(),
            json.loads((out / "run.json").read_text(encoding="utf-8"))["inputs"],
        )
    assert runs["folder"] == runs["manifest"]


def test_another_salt_leaves_the_hashes(recipe: Make, archive, held_out, tmp_path):
    (tmp_path / "another").write_text("cd" * 32)
    other = indexed(held_out, salt="another")
    with pytest.raises(CheckFailed, match=r"renamed\.jpg \(perceptual"):
        read(recipe(data={"held_out": str(other)}))
    (held_out / "renamed.jpg").unlink()
    (note,) = read(recipe(data={"held_out": str(indexed(held_out, salt="another"))})).allowed
    assert "group evidence unavailable" in note


def test_of_a_held_out_source_with_a_split_the_pool_may_be_there(recipe: Make, archive, tmp_path):
    other = tmp_path / "split"
    (other / "images").mkdir(parents=True)
    for name, number in (("a", 3), ("b", 100), ("c", 101)):
        smooth(number).save(other / "images" / f"{name}.png")
    for pool, test, fine in ((["a"], ["c"], True), (["c"], ["a"], False)):
        (other / "splits.json").write_text(json.dumps({"pool": pool, "val": ["b"], "test": test}))
        if fine:
            assert read(recipe(data={"held_out": str(other)})).allowed == []
        else:
            with pytest.raises(CheckFailed, match=r"a\.png"):
                read(recipe(data={"held_out": str(other)}))


def test_the_split_that_is_named_is_that_of_the_archive(recipe: Make, archive, held_out, tmp_path):
    """And not of what is held out, whose stems are others."""
    (held_out / "renamed.jpg").unlink()
    stems = [f"scan{i:02}" for i in range(9)]
    splits = tmp_path / "mine.json"
    splits.write_text(json.dumps({"pool": stems[:6], "val": stems[6:7], "test": stems[7:]}))
    ours = read(recipe(data={"held_out": str(held_out), "splits": str(splits)}))
    assert len(ours.scans.cases) == 6 and ours.allowed == []


def test_a_manifest_whose_files_moved_is_told_before_training(recipe: Make, archive):
    manifest = indexed(archive)
    shutil.move(archive / "scan04.png", archive / "moved.png")
    with pytest.raises(InputError, match=r"scan04\.png: cannot be read: .*run resunet index again"):
        pretrain(recipe(data={"source": str(manifest)}))
    shutil.copy(archive / "scan05.png", archive / "scan04.png")
    with pytest.raises(InputError, match=r"scan04\.png: has changed since it was indexed"):
        pretrain(recipe(data={"source": str(manifest)}))
    assert not recipe().out.exists()


def test_no_thumbnail_is_kept(recipe: Make):
    ours = read(recipe())
    assert ours.evidence.thumbnail is None and ours.num_groups == 9 and ours.scans.num_items == 9
    out = pretrain(recipe(steps=1))
    assert read_record(out / "model").table.num_rows == 9


def write_places(archive: Path) -> None:
    rows = [f"scan{i:02},patient{i // 3},{20 + i % 3}" for i in range(9)]
    (archive / "groups.csv").write_text("\n".join(["stem,group,position", *rows]))


def test_positives_by_place_need_places(recipe: Make, archive):
    """Of files that are slices, groups.csv has them; of a volume it is known."""
    near = {"same_group": "ignore", "position_threshold": 0.1}
    for source in (archive, indexed(archive)):
        with pytest.raises(
            InputError, match=r"objective\.position_threshold=0\.1: no scan .* column position to .* groups\.csv"
        ):
            read(recipe(objective=near, data={"source": str(source)}))
    write_places(archive)
    assert [case.position for case in read(recipe(objective=near)).scans.cases] == [0, 0.5, 1] * 3
    (archive / "groups.csv").unlink()
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(4000, dtype=np.int16).reshape(4, 25, 40)), str(archive / "volume.nii.gz"))
    assert read(recipe(objective=near)).scans.num_items == 13


def test_slices_at_one_place_of_other_patients_attract(recipe: Make, archive):
    """Nine of three patients at three places, in one set: beside its other view each has those of two others, both views."""
    write_places(archive)
    near = {"same_group": "ignore", "position_threshold": 0.3}
    for source in (archive, indexed(archive)):
        out = recipe().out.with_name(f"run-{source.suffix[1:]}")
        pretrain(recipe(steps=1, batch=9, objective=near, out=str(out), data={"source": str(source)}))
        (line,) = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["positives"] == 1 + 2 * 2
