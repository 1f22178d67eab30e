"""An export in W&B: the bundle as an artifact below its segmenter, where the run's recipe has a mirror."""

import json
import shutil

import pytest

from finetune.deploy.export import ExportRequest, export
from finetune.loop import finetune
from resunet.bundle import Bundle
from resunet.checkpoint import WEIGHTS
from resunet.files import sha256
from resunet.mirror import artifact_name

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own

REQUEST = ExportRequest(formats=("pytorch",))
PLANTED = ("c08a", "patient8", "secret_run", "secret_bundle")


@pytest.mark.parametrize("upload", [(), ("weights",)])
def test_a_bundle_is_an_artifact_below_its_segmenter(recipe, offline, read_mirror, tmp_path, upload, capsys):
    run = finetune(recipe(name="secret_run", wandb=offline | {"upload": upload, "group": "some_group"}))
    bundle = export(run, tmp_path / "secret_bundle", REQUEST)
    digest = capsys.readouterr().err.rpartition("to be noted: ")[2].split()[0]
    mirrored = read_mirror(run, finished=2)
    (artifact,) = (one for one in mirrored.artifacts() if one.type == "bundle")
    (segmenter,) = (one for one in mirrored.artifacts() if one.type == "segmenter")
    facts = json.loads(artifact.metadata)
    assert artifact.name == artifact_name("bundle", digest) and facts["sha256"] == digest
    assert facts["inputs"] == {"segmenter": sha256(run / "model" / WEIGHTS)}
    assert segmenter.name == artifact_name("segmenter", facts["inputs"]["segmenter"])
    assert facts["graphs"] == ["pytorch-fp32"] and facts["bytes"] == sum(
        p.stat().st_size for p in bundle.rglob("*") if p.is_file()
    )
    types = [one.run.job_type for one in mirrored.records if one.WhichOneof("record_type") == "run"]
    assert set(types) == {"finetune", "export"}
    files = {entry.path for entry in artifact.manifest.contents}
    assert files == ({str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()} if upload else set())
    Bundle.open(bundle)  # W&B has written nothing into it
    if not upload:  # else it names the copies of files in W&B's own home
        assert not [planted for planted in (*PLANTED, str(tmp_path)) if planted.encode() in mirrored.content]


def test_a_model_without_a_recipe_and_a_run_without_a_mirror_are_told_nobody(runs, tmp_path):
    shutil.copytree(runs[0] / "model", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "alone", REQUEST)
    run = shutil.copytree(runs[0], tmp_path / "run")
    export(run, tmp_path / "bundle", REQUEST)
    assert not list(tmp_path.rglob("wandb"))
