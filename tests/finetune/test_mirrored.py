import json

import pytest

from finetune.comparison.arms import read_arm
from finetune.loop import finetune
from resunet.checkpoint import WEIGHTS, read_config
from resunet.files import sha256
from resunet.mirror import artifact_name

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own

PLANTED = ("c08a", "c13a", "patient8", "patient13", "secret_run")  # ids, groups and the folder


@pytest.mark.parametrize("upload", [(), ("overlays", "weights")])
def test_a_run_is_mirrored_whole_and_names_nobody(recipe, source, encoder, offline, read_mirror, upload):
    changes = dict(encoder=str(encoder), model={"norm": "instance"}, normalisation=None)
    run = finetune(recipe(name="secret_run", wandb=offline | {"upload": upload, "group": "some_group"}, **changes))
    mirrored = read_mirror(run)
    assert (mirrored.run().job_type, mirrored.run().run_group) == ("finetune", "some_group")
    local = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in mirrored.history() if "loss" in line]
    assert [(line["_step"], line["loss"]) for line in logged] == [(line["step"], line["loss"]) for line in local]
    summary = mirrored.summary()
    told = json.loads((run / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    assert summary["test/dice"] == told["dice"]["mean"]
    arm = read_arm(run, "run")
    cases = sorted(arm.groups)
    assert summary["test_cases"]["dice"] == pytest.approx(
        [arm.scores[cases[i], "lesion"] for i in summary["test_cases"]["case"]]
    )
    (segmenter,) = (one for one in mirrored.artifacts() if one.type == "segmenter")
    assert segmenter.name == artifact_name("segmenter", sha256(run / "model" / WEIGHTS))
    parent = read_config(run / "model").provenance.parent_sha256
    assert json.loads(segmenter.metadata)["inputs"] == {"encoder": parent} and parent == sha256(encoder / WEIGHTS)
    assert any(key.startswith("test_overlays") for key in summary) == ("overlays" in upload)
    for planted in (*PLANTED, source.name + "/", str(source)):
        assert planted.encode() not in mirrored.content, planted
