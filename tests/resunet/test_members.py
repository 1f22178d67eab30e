from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

from resunet.checkpoint import ModelConfig, Provenance, read_config, read_weights
from resunet.cli import main
from resunet.config import FixedNormalisation
from resunet.data.evidence import SCHEMA, Evidence
from resunet.data.leakage import ARCHIVE, NO_GROUP_EVIDENCE, read_archive, write_archive
from resunet.data.perceptual import HASH_BYTES
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.files import sha256
from resunet.members import make_ensemble
from resunet.model import ResUNet, load_model

CLASSES = {0: "background", 255: "lesion"}


@pytest.fixture
def write_run(tmp_path):
    """Writes a model directory that saw one case, which has its name; keyword arguments go into its config."""

    def write(name: str, salt: str = "salt", network: nn.Module | None = None, **values) -> Path:
        torch.manual_seed(sum(map(ord, name)))
        network = network or ResUNet(channels=(4, 6), units=1)
        nn.init.normal_(network.head.weight)
        network.config = ModelConfig(architecture=network.config.architecture, **({"classes": CLASSES} | values))
        folder = tmp_path / name
        network.save_pretrained(folder)
        row = {"group": f"group {name}", "file_sha256": name, "pixel_sha256": name, "perceptual": b"\0" * HASH_BYTES}
        table = pa.table({key: pa.array([row[key]], SCHEMA.field(key).type) for key in SCHEMA.names}, schema=SCHEMA)
        write_archive(folder / ARCHIVE, Evidence(table, salt))
        return folder

    return write


def test_the_command_makes_a_model_of_finished_runs(write_run, tmp_path, capsys):
    runs = [
        write_run(name, spacing=(1.0, spacing), allowed=["leak"], provenance=Provenance(data_sha256=name, parent_sha256="same"))
        for name, spacing in (("a", 0.5), ("b", 0.7), ("c", 0.6))
    ]
    out = tmp_path / "all"
    assert main(["ensemble", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    config = read_config(out)
    assert (config.classes, config.spacing, config.allowed) == (CLASSES, (1.0, 0.6), ["leak"])
    known = config.provenance
    assert known.members_sha256 == tuple(sha256(run / "model.safetensors") for run in runs)
    assert known.parent_sha256 == "same" and known.data_sha256 not in (None, "a", "b", "c") and known.recipe_sha256 is None
    whole = read_weights(out / "model.safetensors")
    for number, run in enumerate(runs):
        for name, tensor in read_weights(run / "model.safetensors").items():
            assert torch.equal(whole[f"members.{number}.{name}"], tensor)
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        expected = torch.stack([load_model(run)(x).sigmoid() for run in runs]).mean(0)
        torch.testing.assert_close(load_model(out)(x).sigmoid(), expected)


def test_the_record_holds_what_any_member_saw(write_run, tmp_path):
    runs = [write_run(name) for name in "abc"]
    record = read_archive(make_ensemble(runs, tmp_path / "all"))
    assert record.table.column("group").to_pylist() == ["group a", "group b", "group c"]
    assert record.salt_fingerprint == "salt" and read_config(tmp_path / "all").allowed == []
    other = write_run("d", salt="another")
    record = read_archive(make_ensemble([*runs, other], tmp_path / "more"))
    assert set(record.table.column("file_sha256").to_pylist()) == set("abcd")
    assert set(record.table.column("group").to_pylist()) == {"", "group a", "group b", "group c"}
    assert read_config(tmp_path / "more").allowed == [NO_GROUP_EVIDENCE]


FIXED = FixedNormalisation(kind="fixed", low=0, high=1, mean=0, std=1)
TWO_MORE = {0: "background", 1: "left", 2: "right"}
DIFFERENT = {
    "classes": (
        {"classes": {0: "background", 255: "tumour"}},
        r"classes: \[\('0', 'background'\), \('255', 'lesion'\)\] there",
    ),
    "normalisation": ({"normalisation": FIXED}, r"normalisation\.kind: percentile_zscore there, fixed here"),
    "channels": ({"input_channels": 1}, r"input_channels: grey there, 1 here"),
    "ignore": ({"ignore": (7,)}, r"ignore: \[\] there, \[7\] here"),
    "architecture": ({"network": ResUNet(channels=(4, 8), units=1)}, r"architecture\.channels: \[4, 6\] there, \[4, 8\] here"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_named(write_run, tmp_path, what):
    values, message = DIFFERENT[what]
    with pytest.raises(InputError, match=rf"(?s)b: cannot be in one ensemble with .*a:\n.*{message}.*train them with the same"):
        make_ensemble([write_run("a"), write_run("b", **values)], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_classes_in_another_order_have_other_logits(write_run, tmp_path):
    networks = [ResUNet(num_classes=3, channels=(4, 6)) for _ in range(2)]
    first = write_run("a", network=networks[0], classes=TWO_MORE)
    other = write_run("b", network=networks[1], classes=dict([*list(TWO_MORE.items())[:1], *list(TWO_MORE.items())[:0:-1]]))
    assert read_config(first).classes == read_config(other).classes  # as mappings they are equal
    with pytest.raises(InputError, match="classes: "):
        make_ensemble([first, other], tmp_path / "all")


def test_what_is_no_ensemble_is_refused(write_run, tmp_path):
    a, b = write_run("a"), write_run("b")
    with pytest.raises(InputError, match="at least two members, 1 given"):
        make_ensemble([a], tmp_path / "all")
    with pytest.raises(InputError, match=r"a: has the weights of .*a\. Name each run once"):
        make_ensemble([a, b, a], tmp_path / "all")
    both = make_ensemble([a, b], tmp_path / "both")
    with pytest.raises(InputError, match="both: is an ensemble itself"):
        make_ensemble([both, a], tmp_path / "all")
    with pytest.raises(InputError, match="exists already"):
        make_ensemble([a, b], both)
    ResidualEncoder(1, (4, 6)).save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"encoder: is an encoder, which segments nothing"):
        make_ensemble([a, tmp_path / "encoder"], tmp_path / "all")
    (b / ARCHIVE).unlink()
    with pytest.raises(InputError, match=r"b: has no archive\.parquet"):
        make_ensemble([a, b], tmp_path / "all")
    with pytest.raises(InputError, match="no such folder"):
        make_ensemble([a, tmp_path / "nowhere"], tmp_path / "all")


def test_two_encoders_are_no_ensemble(tmp_path):
    folders = []
    for name in "ab":
        torch.manual_seed(ord(name))
        ResidualEncoder(1, (4, 6)).save_pretrained(tmp_path / name)
        table = pa.table({key: pa.array([], SCHEMA.field(key).type) for key in SCHEMA.names}, schema=SCHEMA)
        write_archive(tmp_path / name / ARCHIVE, Evidence(table, "salt"))
        folders.append(tmp_path / name)
    with pytest.raises(InputError, match="a: is an encoder, which segments nothing"):
        make_ensemble(folders, tmp_path / "all")


def test_members_that_were_trained_on_other_regions_are_refused(write_run, tmp_path):
    regions = {"both": ("left", "right"), "left": ("left",)}
    alike = [
        write_run(name, network=ResUNet(num_classes=3, channels=(4, 6)), classes=TWO_MORE, regions=regions)
        for name in ("a", "b")
    ]
    assert read_config(make_ensemble(alike, tmp_path / "all")).regions == regions
    other = write_run("c", network=ResUNet(num_classes=3, channels=(4, 6)), classes=TWO_MORE)
    with pytest.raises(InputError, match=r"regions: \{'both': \['left', 'right'\], 'left': \['left'\]\} there, None here"):
        make_ensemble([alike[0], other], tmp_path / "unlike")
