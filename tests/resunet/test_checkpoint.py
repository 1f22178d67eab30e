import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelHubMixin
from safetensors.torch import load_file, save_file

from resunet.checkpoint import (
    CONFIG,
    SCHEMA_VERSION,
    WEIGHTS,
    FeatureCheck,
    LabelledGroups,
    ModelConfig,
    Provenance,
    cast_to,
    load_exactly,
    model_folder,
    read_config,
    read_weights,
    without_patients,
    write_weights,
)
from resunet.config import FixedNormalisation
from resunet.decision import ClassRule, OperatingPoint, Postprocessing
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.files import folder_aside, is_empty, sha256, write_text
from resunet.model import ResUNet, UNet
from resunet.runtime import ObjectRule


def trained_looking(model: torch.nn.Module) -> torch.nn.Module:
    """No tensor, running statistics included, is what a new network has."""
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
        else:
            tensor.fill_(17)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    trained_looking(ResUNet(channels=(4, 6))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "model",
    [
        ResUNet(2, 3, (4, 6), 1, "group", True, 3),
        ResUNet(channels=(4, 6)),
        UNet(2, 3, (4, 6), "instance"),
        ResidualEncoder(3, (4, 6), 3),
    ],
    ids=["resunet3d", "resunet", "unet", "encoder"],
)
def test_saved_and_loaded_is_the_same_bit_for_bit(model, tmp_path):
    trained_looking(model)
    model.config = ModelConfig(
        architecture=model.config.architecture,
        input_channels=2,
        spacing=(0.1, 1 / 3),
        normalisation=FixedNormalisation(kind="fixed", low=-1000, high=3000, mean=1 / 7, std=400),
        classes={0: "background", 255: "tumour"},
        ignore=(7,),
        provenance=Provenance(data_sha256="a" * 64, versions={"torch": "2"}),
        feature_check=FeatureCheck(seed=1, size=2, features={"equal": [0.1, 1 / 3, 1e-300]}),
        allowed=["leak: 1 val cases"],
    )
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    own, its = model.state_dict(), loaded.state_dict()
    assert list(own) == list(its)
    assert all(torch.equal(own[name], its[name]) and own[name].dtype == its[name].dtype for name in own)


def test_a_model_directory_has_the_layout_of_the_hub(folder):
    assert {CONFIG, WEIGHTS} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["schema_version"] == SCHEMA_VERSION
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: resunet" in card and "license: apache-2.0" in card


def test_saving_again_replaces(folder):
    other = trained_looking(ResUNet(channels=(4, 6), num_classes=3))
    other.save_pretrained(folder)
    loaded = ResUNet.from_pretrained(folder)
    assert loaded.config == other.config
    assert loaded.head.out_channels == 3


def test_push_to_hub_uploads_the_model_directory(monkeypatch):
    uploaded = {}

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **_):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        uploaded["to"] = repo_id

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = ResUNet(channels=(4, 6))
    assert isinstance(model, ModelHubMixin)
    groups = LabelledGroups(groups=("5ec2e7",), salt_fingerprint="f1n9e2")
    model.config = model.config.model_copy(update={"provenance": Provenance(data_sha256="ab", labels=(groups,), probe=groups)})
    model.push_to_hub("someone/some-model", private=True)
    assert uploaded["to"] == "someone/some-model"
    assert {CONFIG, WEIGHTS, "README.md"} <= set(uploaded)
    assert model.config.provenance.labels == (groups,)
    pushed = ModelConfig.model_validate_json(uploaded[CONFIG])
    assert pushed == without_patients(model.config) and pushed.provenance.data_sha256 == "ab"
    assert not any(secret in uploaded[name] for name in (CONFIG, WEIGHTS, "README.md") for secret in (b"5ec2e7", b"f1n9e2"))


NAME = "encoder.levels.1.0.conv1.weight"


def test_a_renamed_tensor_is_named_twice(folder):
    edit_weights(folder, lambda t: t.update({"encoder.levels.9.weight": t.pop(NAME)}))
    with pytest.raises(InputError) as error:
        ResUNet.from_pretrained(folder)
    assert f"missing (1): {NAME}" in str(error.value)
    assert "unexpected (1): encoder.levels.9.weight" in str(error.value)


def test_a_missing_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.pop(NAME))
    with pytest.raises(InputError) as error:
        ResUNet.from_pretrained(folder)
    assert f"missing (1): {NAME}" in str(error.value) and "unexpected" not in str(error.value)


def test_an_extra_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(InputError) as error:
        ResUNet.from_pretrained(folder)
    assert "unexpected (1): extra" in str(error.value) and "missing" not in str(error.value)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    edit_weights(folder, lambda t: t.update({NAME: t[NAME][:, :2].clone()}))
    with pytest.raises(InputError) as error:
        ResUNet.from_pretrained(folder)
    assert f"{NAME}: (6, 2, 3, 3) in the file, (6, 4, 3, 3) in the network" in str(error.value)


def test_a_module_is_untouched_by_weights_that_do_not_fit():
    module = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(InputError, match="missing"):
        load_exactly(module, {"weight": torch.zeros(2, 2)}, "here")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_is_refused(folder, version):
    edit_config(folder, schema_version=version)
    with pytest.raises(InputError, match="schema_version="):
        read_config(folder)


def test_a_config_with_an_unknown_key_is_refused(folder):
    edit_config(folder, surprise=1)
    with pytest.raises(InputError, match="surprise"):
        read_config(folder)


def test_another_class_is_refused_and_named(folder):
    with pytest.raises(InputError, match=r"'resunet' is not a UNet \('unet'\)"):
        UNet.from_pretrained(folder)
    with pytest.raises(InputError, match=r"'resunet' is not a ResidualEncoder"):
        ResidualEncoder.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[]", "", "null"])
def test_a_config_that_is_not_one_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(InputError, match=CONFIG):
        read_config(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_corrupted_weights_are_the_users_fault(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        ResUNet.from_pretrained(folder)


def test_missing_weights_are_the_users_fault(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no such file"):
        ResUNet.from_pretrained(folder)


def test_model_folder(tmp_path, folder):
    assert model_folder(folder) == folder
    assert model_folder(tmp_path) == folder
    with pytest.raises(InputError, match="no such folder"):
        model_folder(tmp_path / "none")


def test_weights_are_written_whole_and_in_any_memory_layout(tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4).t(), "b": torch.tensor(3), "c": torch.zeros(1, requires_grad=True)}
    write_weights(tmp_path / WEIGHTS, tensors)
    read = read_weights(tmp_path / WEIGHTS)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_write_text_replaces_whole(tmp_path):
    path = tmp_path / "text"
    write_text(path, "before")
    write_text(path, "after é")
    assert path.read_text(encoding="utf-8") == "after é"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "text"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it is fine \ud800")
    assert path.read_text(encoding="utf-8") == "before"


def test_a_text_that_cannot_be_written_leaves_nothing_beside(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text", "half of it is fine \ud800")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_not_taken_away(tmp_path, monkeypatch):
    """It may be a mount point, a link or the working directory."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    before = (tmp_path / "there").stat().st_ino
    (tmp_path / "there" / ".partial.of-a-killed-one").mkdir()
    for folder in (tmp_path / "link", tmp_path / "there", Path()):
        monkeypatch.chdir(tmp_path / "there")
        with folder_aside(folder) as aside:
            (aside / "sub").mkdir()
            (aside / "sub" / "file").write_text("x")
            (aside / "other").write_text("y")
            assert is_empty(folder)
        assert sorted(one.name for one in folder.iterdir()) == [".partial.of-a-killed-one", "other", "sub"]
        assert (folder / "sub" / "file").read_text() == "x" and not is_empty(folder)
        assert (tmp_path / "there").stat().st_ino == before and (tmp_path / "link").is_symlink()
        shutil.rmtree(folder / "sub")
        (folder / "other").unlink()


def test_a_folder_aside_replaces_the_one_that_stands(tmp_path):
    folder = tmp_path / "deep" / "folder"
    for content in ("one", "two"):
        with folder_aside(folder) as aside:
            (aside / content).write_text(content)
            assert not (folder / content).exists()
        assert [path.name for path in folder.iterdir()] == [content]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("exists", [True, False])
def test_a_block_that_fails_leaves_the_folder_as_it_was(tmp_path, exists):
    folder = tmp_path / "folder"
    if exists:
        folder.mkdir()
        (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), folder_aside(folder) as aside:
        (aside / "new").write_text("new")
        raise KeyboardInterrupt
    assert folder.exists() == exists
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == (
        ["folder", "folder/old"] if exists else []
    )


def test_sha256_is_the_known_digest(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_cast_to_leaves_the_original():
    model = ResUNet(channels=(4,)).train()
    copy = cast_to(model, torch.float64)
    assert {p.dtype for p in copy.parameters()} == {torch.float64} and not copy.training
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.training
    assert copy.head.weight.data_ptr() != model.head.weight.data_ptr()


def test_from_pretrained_of_a_config_that_is_not_json(folder):
    (folder / CONFIG).write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ResUNet.from_pretrained(folder)


def test_a_file_is_not_a_model_directory(folder):
    with pytest.raises(InputError, match="not a model directory"):
        read_config(model_folder(folder / WEIGHTS))


def test_what_val_chose_is_kept_and_older_models_have_none(tmp_path):
    chosen = Postprocessing(
        rules=(ClassRule(name="oedema", largest_only=True, smallest=8),),
        val_groups=4,
        val_dice=(0.5, 0.625),
        val_lesion_recall=(1.0, 1.0),
    )
    point = OperatingPoint(threshold=0.75, budget=20, clean=60, alarmed=1)
    model = ResUNet(1, 3, (4, 8))
    classes = {0: "none", 7: "lesion", 3: "oedema"}
    model.config = model.config.model_copy(update=dict(classes=classes, postprocessing=chosen, operating_point=point))
    model.save_pretrained(tmp_path / "model")
    config = read_config(tmp_path / "model")
    assert (config.postprocessing, config.operating_point) == (chosen, point)
    assert config.object_rules() == (ObjectRule(2, True, 8),)
    raw = json.loads((tmp_path / "model" / CONFIG).read_text(encoding="utf-8"))
    del raw["postprocessing"], raw["operating_point"]
    write_text(tmp_path / "model" / CONFIG, json.dumps(raw))
    older = read_config(tmp_path / "model")
    assert older.postprocessing is None is older.operating_point and older.object_rules() == ()
    for name in ("none", "tumour"):  # the background, and no class at all
        wrong = chosen.model_copy(update={"rules": (ClassRule(name=name, smallest=8),)}).model_dump(mode="json")
        write_text(tmp_path / "model" / CONFIG, json.dumps(raw | {"postprocessing": wrong}))
        with pytest.raises(InputError, match=rf"postprocessing names \['{name}'\]"):
            read_config(tmp_path / "model")


def test_regions_are_kept_and_are_of_the_classes(tmp_path):
    model, regions = ResUNet(1, 3, (4, 8)), {"both": ("rim", "core"), "core": ("core",)}
    model.config = model.config.model_copy(update=dict(classes={0: "none", 7: "rim", 3: "core"}, regions=regions))
    model.save_pretrained(tmp_path / "model")
    assert read_config(tmp_path / "model").regions == regions
    raw = json.loads((tmp_path / "model" / CONFIG).read_text(encoding="utf-8"))
    write_text(tmp_path / "model" / CONFIG, json.dumps(raw | {"regions": {"both": ["rim", "tumour"]}}))
    with pytest.raises(InputError, match=r"region 'both' names \['tumour'\]"):
        read_config(tmp_path / "model")
    del raw["regions"]
    write_text(tmp_path / "model" / CONFIG, json.dumps(raw))
    assert read_config(tmp_path / "model").regions is None
