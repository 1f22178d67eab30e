import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.deploy.export import ExportRequest, export
from resunet.checkpoint import ModelConfig
from resunet.decision import ClassRule, OperatingPoint, Postprocessing
from resunet.model import ResUNet


def write_model(folder: Path, num_classes: int = 2, **arguments) -> Path:
    """Random weights whose head is large, so that all classes are predicted somewhere; post-processing for the second class."""
    torch.manual_seed(0)
    network = ResUNet(1, num_classes, (4, 8), units=1, **arguments)
    nn.init.normal_(network.head.weight)
    network.head.weight.data -= network.head.weight.data.mean()  # else one class is everywhere
    network.config = ModelConfig(
        architecture=network.config.architecture,
        classes={0: "background", 7: "lesion", 200: "tumour"} if num_classes == 3 else {0: "background", 7: "lesion"},
        postprocessing=Postprocessing(
            rules=(ClassRule(name="lesion", smallest=3),), val_groups=4, val_dice=(0.5, 0.6), val_lesion_recall=(0.7, 0.7)
        ),
        operating_point=OperatingPoint(threshold=0.625, budget=20, clean=50, alarmed=1) if num_classes == 2 else None,
    )
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model directory and its bundle, whose zip lies beside it. Not to be changed: `bundle` is a copy."""
    root = tmp_path_factory.mktemp("exported")
    model = write_model(root / "model")
    return model, export(model, root / "lesions.bundle", ExportRequest(zipped=True))


@pytest.fixture
def bundle(tmp_path: Path, exported: tuple[Path, Path]) -> Path:
    return Path(shutil.copytree(exported[1], tmp_path / "lesions.bundle"))
