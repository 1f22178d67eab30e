"""The light network in fine-tuning: its recipe, its runs, and the commands that take them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from finetune.deploy.graph import write_onnx
from finetune.deploy.tensorrt_check import tensorrt_faults
from finetune.explanation.gradcam import default_layer, grad_cam, layers_of, randomised
from finetune.inference.window import footprint
from finetune.labelled import resolve
from finetune.loop import finetune
from finetune.settings import NetworkSettings
from finetune.step import build
from finetune.training.supervision import Supervised, coarser, supervised_loss
from resunet.checkpoint import ModelConfig, read_config
from resunet.config import validate
from resunet.errors import InputError
from resunet.fingerprint import fingerprint
from resunet.light_model import MobileResUNet
from resunet.losses import segmentation_loss
from resunet.mobile import MobileEncoder
from resunet.model import load_finetuned
from tests.finetune.conftest import NOBODY, write_record

TINY = "mobilenetv3_small_050"
LIGHT = {"name": "mobile_resunet", "backbone": TINY, "channels": None, "units": 2}


@pytest.fixture(scope="module")
def network() -> MobileResUNet:
    torch.manual_seed(0)
    model = MobileResUNet(1, 2, TINY)
    nn.init.normal_(model.head[0].weight)
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(4, 1, 64, 64))
    return model.eval()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"spatial_dims": 3}, "MobileNetV3 is of two dimensions; for volumes use 'resunet'"),
        ({"norm": "group"}, "norm='group' is none of MobileNetV3's choices"),
        ({"units": 1}, "units=1 is none of MobileNetV3's choices"),
        ({"channels": [8, 8]}, "are of its decoder, 4 widths: at 1/2, 1/4, 1/8 and 1/16"),
        ({"backbone": "resnet18"}, "timm has .*mobilenetv3_small_050"),
        ({"name": "resunet", "backbone": None, "output_stride": 16}, "output_stride=16: only name='mobile_resunet' has it"),
        ({"name": "unet", "backbone": None, "weights": "imagenet"}, "weights=imagenet: only name='mobile_resunet' has it"),
    ],
)
def test_what_the_light_network_is_not(given, fault):
    with pytest.raises(InputError, match=fault):
        validate(NetworkSettings, LIGHT | given, "settings")


def test_the_coarsest_stride_limits_the_patch(recipe):
    with pytest.raises(
        InputError, match=r"1/32 of the size, would see it as one position; .*model.output_stride a smaller one"
    ):
        recipe(model=LIGHT)
    assert recipe(model=LIGHT | {"output_stride": 8}).model.stride == 8


def test_what_is_left_open_is_the_backbones(recipe):
    resolved = resolve(recipe(model=LIGHT, patch=[40, 40]))
    assert resolved.model.channels == (32, 32, 32, 32) and resolved.model.norm == "batch"
    model, receipt = build(resolved)
    assert receipt is None and isinstance(model, MobileResUNet) and model.encoder.config.architecture.backbone == TINY
    assert model.config.architecture == MobileResUNet(1, 2, TINY).config.architecture


def test_weights_come_from_a_file_or_from_an_encoder(recipe, tmp_path):
    first = MobileEncoder(1, TINY)
    torch.save({first.timm_name(name): one for name, one in first.state_dict().items()}, tmp_path / "net.pth")
    given = LIGHT | {"weights": str(tmp_path / "net.pth")}
    model, _ = build(resolve(recipe(model=given, patch=[40, 40])))
    assert all(torch.equal(one, model.encoder.state_dict()[name]) for name, one in first.state_dict().items())
    kept, _ = build(resolve(recipe(model=given | {"statistics": "frozen"}, patch=[40, 40])))  # those of the weights
    assert all(torch.equal(one, kept.encoder.state_dict()[name]) for name, one in first.state_dict().items())
    with pytest.raises(InputError, match="brings weights of its own; leave one of them out"):
        recipe(model=given, patch=[40, 40], encoder=str(tmp_path))


def test_a_run_from_a_pretrained_encoder(recipe, tmp_path):
    """Deep supervision, moving average, frozen statistics, the decoder first: whatever a recipe can ask of an encoder."""
    torch.manual_seed(3)
    first = MobileEncoder(1, TINY)
    first.config = ModelConfig(architecture=first.config.architecture, feature_check=fingerprint(first))
    first.save_pretrained(tmp_path / "encoder")
    write_record(tmp_path / "encoder", [NOBODY], "another salt")
    run = finetune(
        recipe(
            model=LIGHT | {"statistics": "frozen", "squeeze_excite": True},
            encoder=str(tmp_path / "encoder"),
            patch=[40, 33],
            loss={"deep_supervision": True},
            ema=0.5,
            steps=4,
            validate_every=4,
            optimizer={"decoder_first": 0.4, "encoder_lr_factor": 0.5},
        )
    )
    receipt = json.loads((run / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["encoder_share_loaded"] == 1 and receipt["feature_error"] < 1e-9
    units = json.loads((run / "gradients.json").read_text(encoding="utf-8"))["records"][-1]["units"]
    assert "decoder.blocks.3.unit" in units and "encoder.levels.1.0.0" in units
    model, config = load_finetuned(run / "model")
    assert config == read_config(run / "model") and config.architecture.channels == (32, 32, 32, 32)
    kept = {name: one for name, one in first.state_dict().items() if "running" in name}
    assert all(torch.equal(one, model.encoder.state_dict()[name]) for name, one in kept.items())
    assert not all(torch.equal(one, model.encoder.state_dict()[name]) for name, one in first.named_parameters())


def test_every_level_has_logits_that_labels_fit(network):
    supervised = Supervised(network).eval()
    x, labels = torch.randn(2, 1, 49, 66), (torch.rand(2, 49, 66) < 0.3).to(torch.uint8)
    logits = supervised(x)
    for level, one in enumerate(logits):
        fits = coarser(labels, level).shape[1:]
        assert all(0 <= given - wanted <= 1 for given, wanted in zip(one.shape[2:], fits, strict=True))
    assert torch.equal(logits[0][:, :, :49, :66], network(x)) and len(logits) == 3
    seen = []
    supervised_loss(logits, labels, lambda one, its: seen.append((one, its)) or segmentation_loss(one, its))
    assert all(one.shape[2:] == its.shape[1:] for one, its in seen)


def test_grad_cam_finds_levels_by_name_and_randomises_every_stage(network):
    layers = layers_of(network, 1)
    assert default_layer(layers).name == "decoder.blocks.2"
    assert {f"encoder.levels.{level}": 2 ** (level + 1) for level in range(5)}.items() <= {
        name: layer.stride for name, layer in layers.items()
    }.items()
    region = np.zeros((45, 70), bool)
    region[10:20, 30:40] = True
    for name in ("decoder.blocks.2", "encoder.levels.3"):
        image = torch.randn(1, 45, 70)
        against, found = (grad_cam(network, layers[name], image, index, region).heat for index in (0, 1))
        assert found.shape == (45, 70) and (against + found).max() > 0  # of random weights one of the two may be 0
    stages = [stage for stage, _ in randomised(network, 0)]
    assert stages[0] == "head.0" and stages[-1] == "encoder.levels.0" and len(stages) == 1 + 4 + 5


def test_inference_knows_its_stride(network):
    assert footprint(network, 1, torch.device("cpu")).stride == 32


def test_its_graph_is_of_any_size(network, tmp_path):
    """Hard swishes, gates, resizes and the shuffle of the head, in ONNX Runtime."""
    import onnxruntime

    write_onnx(network, 1, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for size in ((1, 64, 64), (2, 37, 101), (1, 1, 33)):
        x = torch.randn(size[0], 1, *size[1:])
        with torch.no_grad():
            wanted = network(x).numpy()
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(session.run(None, {"scan": x.numpy()})[0], wanted, atol=1e-4)
    assert tensorrt_faults(tmp_path / "model.onnx") == ()
