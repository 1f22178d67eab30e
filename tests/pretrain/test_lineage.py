"""In W&B an encoder names the manifest that an index told of, though only its pool was trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.loop import pretrain
from pretrain.recipe import PretrainRecipe
from resunet.cli import main
from resunet.mirror import artifact_name

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own

PLANTED = ("scan0", "secret_archive", "patient")


def test_an_encoder_names_its_manifest_and_nothing_names_anybody(
    recipe: Callable[..., PretrainRecipe], archive: Path, offline, read_mirror, tmp_path, capsys
):
    stems = [f"scan{i:02}" for i in range(9)]
    (archive / "groups.csv").write_text("stem,group\n" + "".join(f"{stem},patient{stem}\n" for stem in stems))
    (archive / "splits.json").write_text(json.dumps({"pool": stems[:6], "val": stems[6:7], "test": stems[7:]}))
    (archive / "broken.png").write_text("no image")
    out = tmp_path / "secret_archive" / "m.parquet"
    out.parent.mkdir()
    given = [str(archive), "--out", str(out), "--workers", "1", "--salt-file", str(tmp_path / "salt")]
    assert main(["index", *given, "--wandb-project", "some_project"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    indexed = read_mirror(out.parent)
    assert (indexed.run().job_type, indexed.run().project) == ("index", "some_project")
    (manifest,) = indexed.artifacts()
    facts = json.loads(manifest.metadata)
    assert manifest.type == "manifest" and manifest.name == artifact_name("manifest", facts["sha256"])
    told = {"scans": 9, "groups": 9, "labelled": 0, "rejected": 1}
    assert {key: facts[key] for key in told} == told == {key: indexed.summary()[key] for key in told}
    assert [entry.path for entry in manifest.manifest.contents] == []

    run = pretrain(recipe(steps=1, wandb=offline, data={"source": str(out)}))
    trained = read_mirror(run)
    (encoder,) = (one for one in trained.artifacts() if one.type == "encoder")
    its = json.loads(encoder.metadata)
    assert its["scans"] == 6 and its["inputs"] == {"manifest": facts["sha256"]}
    for planted in (*PLANTED, str(tmp_path)):
        assert planted.encode() not in indexed.content + trained.content, planted


@pytest.mark.parametrize(
    "given, message",
    [
        (["SOURCE", "--out", "m.parquet", "--wandb-project", "p", "--wandb-mode", "on"], "--wandb-mode on: is neither offline"),
        (["--check", "a.parquet", "--against", "b.parquet", "--wandb-project", "p"], "and no SOURCE: the other options"),
    ],
)
def test_what_is_not_told(given, message, capsys):
    assert main(["index", *given]) == 2
    assert message in capsys.readouterr().err
