import json
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from resunet.checkpoint import LabelledGroups, Provenance
from resunet.config import DataSettings, Recipe, WandbSettings
from resunet.mirror import Overlaid, artifact_name, start_mirror, wandb_state, without_paths
from resunet.model import ResUNet
from resunet.runs import Run

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own


class SmallRecipe(Recipe):
    data: DataSettings
    temperature: float = 0.2


@pytest.fixture
def run(offline, monkeypatch, tmp_path) -> Run:
    monkeypatch.setenv("WANDB_HOST", "secret_host")  # in place of this machine's
    monkeypatch.setenv("WANDB_USERNAME", "secret_user")
    settings = WandbSettings(**offline, group="some_group", name="some_name")
    data = DataSettings(source=Path("/somewhere/secret_source"))
    return Run(SmallRecipe(out=tmp_path / "secret_out", steps=10, data=data, wandb=settings), "pretrain", {"data": "ab" * 32})


def test_offline_holds_what_was_logged(run, read_mirror):
    run.log(1, {"loss": 0.5, "val_dice": 0.25})
    run.log(2, {"loss": 0.75, "val_dice": 0.5})
    run.mirror.summarise({"test/dice": 0.625, "test_cases": {"case": [0, 1], "dice": [0.5, 0.75]}})
    run.finish("done")
    mirrored = read_mirror(run.folder)
    its = mirrored.run()
    recorded = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert (its.project, its.run_group, its.job_type, its.display_name) == (
        "some_project",
        "some_group",
        "pretrain",
        "some_name",
    )
    assert its.run_id == recorded["wandb_id"]
    config = mirrored.config()
    assert config["temperature"] == 0.2 and config["inputs"] == {"data": "ab" * 32}
    assert [(line["_step"], line["loss"], line["val_dice"]) for line in mirrored.history()] == [(1, 0.5, 0.25), (2, 0.75, 0.5)]
    summary = mirrored.summary()
    assert summary["loss"] == {"min": 0.5} and summary["val_dice"] == {"max": 0.5}  # the best, not the last
    assert summary["test/dice"] == 0.625 and summary["test_cases"] == {"case": [0, 1], "dice": [0.5, 0.75]}


def test_offline_holds_no_path_no_user_and_no_host(run, read_mirror, tmp_path):
    (run.folder / "model").mkdir()
    run.log(1, {"loss": 0.5})
    run.mirror.model("encoder", run.folder / "model", {"sha256": "cd" * 32}, {"manifest": "ab" * 32})
    run.finish("done")
    mirrored = read_mirror(run.folder)
    assert len(mirrored.records) > 5 and b"some_project" in mirrored.content
    command = [sys.argv[0]] if "/" in sys.argv[0] else []
    for absent in ("secret", "/somewhere", str(tmp_path), f"{Path.home()}/", *command):
        assert absent.encode() not in mirrored.content, absent


def test_a_model_is_an_artifact_that_names_its_inputs(run, read_mirror):
    folder = run.folder / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    run.mirror.model("encoder", folder, {"sha256": "cd" * 32, "groups": 3}, {"manifest": "ab" * 32})
    run.finish("done")
    (artifact,) = read_mirror(run.folder).artifacts()
    assert (
        (artifact.name, artifact.type)
        == (artifact_name("encoder", "cd" * 32), "encoder")
        == ("encoder-cdcdcdcdcdcd", "encoder")
    )
    assert json.loads(artifact.metadata) == {"sha256": "cd" * 32, "groups": 3, "inputs": {"manifest": "ab" * 32}}
    assert not artifact.manifest.contents  # without weights: the recipe does not let them go


@pytest.mark.parametrize("upload", [(), ("overlays",), ("weights",)])
def test_weights_and_pictures_go_only_where_the_recipe_lets_them(offline, tmp_path, read_mirror, upload):
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    network = ResUNet(1, 2, (4, 4), units=1)
    used = LabelledGroups(groups=("abcdef012345",), salt_fingerprint="98765fedcb")
    network.config = network.config.model_copy(update={"provenance": Provenance(labels=(used,), probe=used)})
    network.save_pretrained(folder / "model")
    (folder / "model" / "archive.parquet").write_text("archive.parquet")
    mirror = start_mirror(WandbSettings(**offline, upload=upload), "finetune", "abcd1234", folder, {})
    assert mirror.takes_pictures == ("overlays" in upload)
    if mirror.takes_pictures:
        rng = np.random.default_rng(0)
        picture = Overlaid(
            rng.integers(0, 255, (8, 9, 3), np.uint8), {"truth": np.ones((8, 9), np.uint8)}, {0: "background", 1: "lesion"}
        )
        mirror.table("test_overlays", ["case", "overlay"], [[3, picture]])
    mirror.model("segmenter", folder / "model", {"sha256": "ef" * 32}, {})
    mirror.finish(succeeded=True)
    found = read_mirror(folder)
    files = {entry.path for one in found.artifacts() if one.type == "segmenter" for entry in one.manifest.contents}
    assert files == ({"config.json", "model.safetensors"} if "weights" in upload else set())  # what tells of patients: never
    sent = [path.read_bytes() for path in Path(os.environ["WANDB_DATA_DIR"]).rglob("*") if path.is_file()] + [found.content]
    assert any(b"residual" in one or b"resunet" in one for one in sent) or "weights" not in upload
    assert not any(secret in one for one in sent for secret in (b"abcdef012345", b"98765fedcb"))
    pictures = [entry.path for one in found.artifacts() if one.type == "run_table" for entry in one.manifest.contents]
    assert ("test_overlays.table.json" in pictures) == ("overlays" in upload)
    for kind in ("media/images/mask/", "media/images/"):
        assert any(path.startswith(kind) for path in pictures) == ("overlays" in upload)


def test_a_disabled_mirror_is_none(tmp_path):
    assert start_mirror(WandbSettings(mode="disabled"), "finetune", "abcd1234", tmp_path, {}) is None


def test_the_environment_switches_it_off_for_all(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start_mirror(WandbSettings(**offline), "finetune", "abcd1234", tmp_path, {}) is None
    assert not list(tmp_path.iterdir()) and "WANDB_MODE=disabled" in wandb_state()
    assert list(tmp_path.iterdir()) == []


def test_without_paths_drops_paths_at_every_level():
    values = {
        "out": "/a/b",
        "encoder": "/a/c",
        "steps": 3,
        "data": {"source": "/a/d", "salt_file": "/a/e", "held_out": "/a/f", "channels": "grey", "classes": {"0": "background"}},
    }
    assert without_paths(values) == {"steps": 3, "data": {"channels": "grey", "classes": {"0": "background"}}}
    assert values["out"] == "/a/b"


def path_keys(model: type[BaseModel]) -> Iterator[str]:
    """Names of all fields, nested ones too, that may hold a path."""
    for name, field in model.model_fields.items():
        if "Path" in str(field.annotation):
            yield name
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from path_keys(part)


def test_every_field_that_may_hold_a_path_stays_at_home():
    from finetune.compression.recipe import CompressRecipe
    from finetune.recipe import FinetuneRecipe
    from pretrain.recipe import PretrainRecipe

    names = {name for recipe in (FinetuneRecipe, PretrainRecipe, CompressRecipe) for name in path_keys(recipe)} - {"run"}
    assert {"teacher", "start", "encoder", "source", "store", "draw_encoder"} <= names
    names |= {"weights", "held_out"}  # strings that may be paths
    assert without_paths(dict.fromkeys(names, "/secret")) == {}


def test_no_recipe_hides_a_path_from_without_paths():
    from finetune.recipe import FinetuneRecipe
    from pretrain.recipe import PretrainRecipe

    data = {"source": "/secret/1", "salt_file": "/secret/2"}
    pretrain = PretrainRecipe(out="/secret/3", steps=1, data=data | {"held_out": "/secret/4"})
    classes = {0: "background", 1: "lesion"}
    finetune = FinetuneRecipe(out="/secret/3", steps=1, encoder="/secret/5", data=data | {"classes": classes})
    for recipe in (pretrain, finetune):
        assert "/secret" in recipe.model_dump_json()
        assert "/secret" not in json.dumps(without_paths(json.loads(recipe.model_dump_json())))
