import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.deploy.export import ExportRequest, export
from finetune.deploy.golden import synthetic_scan
from finetune.deploy.requirements import requirements
from resunet.bundle import Bundle
from resunet.bundle.contract import Normalising
from resunet.bundle.verify import verify
from resunet.checkpoint import LabelledGroups, ModelConfig, Provenance
from resunet.cli import main
from resunet.config import FixedNormalisation
from resunet.errors import EnvironmentFault, InputError
from resunet.model import ResUNet
from resunet.runtime import Intensity


def figure(mean: float) -> dict:
    return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 9}


_USED = LabelledGroups(groups=("HMAC of a group",), salt_fingerprint="fingerprint of a salt")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a fine-tuning run of volumes leaves, as far as export reads it."""
    root = tmp_path_factory.mktemp("home") / "Mueller-run"
    torch.manual_seed(0)
    network = ResUNet(1, 3, (4, 4), units=1, spatial_dims=3)
    nn.init.normal_(network.head.weight)
    network.config = ModelConfig(
        architecture=network.config.architecture,
        spacing=(1.0, 0.5, 0.5),
        normalisation=FixedNormalisation(kind="fixed", low=0, high=3000, mean=1200, std=400),
        classes={0: "background", 1: "core", 2: "edema"},
        regions={"whole": ("core", "edema"), "core": ("core",)},
        provenance=Provenance(labels=(_USED,), probe=_USED),
    )
    network.save_pretrained(root / "model")
    (root / "run.json").write_text("{}")
    (root / "model" / "archive.parquet").write_bytes(b"HMACs of patients")
    (root / "evaluation").mkdir()
    classes = {name: {"dice": figure(0.5)} for name in ("whole", "core")}
    summary = dict(split="test", groups=9, dice=figure(0.4321), lesions={"recall": figure(0.6)}, classes=classes)
    (root / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return root


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory) -> Path:
    request = ExportRequest(formats=("openvino", "onnx"), precisions=("fp32", "bf16", "fp16"))
    return export(run, tmp_path_factory.mktemp("out") / "volumes.bundle", request)


def test_every_precision_of_volumes(bundle):
    rows = verify(bundle, told=lambda line: None).rows
    assert [(row.graph.runtime, row.graph.precision, row.verdict) for row in rows] == [
        *(("openvino", precision, "equal") for precision in ("fp32", "bf16", "fp16")),
        *(("onnxruntime", precision, "equal") for precision in ("fp32", "fp16")),
    ]
    largest = {(row.graph.runtime, row.graph.precision): row.answers.difference for row in rows}
    assert largest["openvino", "fp32"] < 1e-5 and largest["onnxruntime", "fp32"] < 1e-5
    assert largest["onnxruntime", "fp16"] > 1e-5 and largest["openvino", "fp16"] > 1e-5  # they really are others
    sizes = {path.parent.name: path.stat().st_size for path in (bundle / "graphs").glob("*/model.bin")}
    assert sizes["fp16"] < 0.7 * sizes["fp32"]


def test_the_contract_says_what_the_model_says(bundle, run):
    contract = Bundle.open(bundle).contract
    assert contract.classes == {0: "background", 1: "core", 2: "edema"}
    assert contract.regions == {"whole": ("core", "edema"), "core": ("core",)}
    assert contract.normalisation == Normalising("fixed", 0, 3000, 1200, 400)
    assert contract.normalisation.rule == Intensity(0, 3000, 1200, 400)
    assert (contract.output.activation, contract.output.threshold, contract.output.channels) == ("softmax", None, 3)
    assert contract.input.spacing == (1.0, 0.5, 0.5) and contract.spatial_dims == 3 and contract.footprint.stride == 2
    assert contract.tensorrt is not None and contract.tensorrt.faults == ()
    assert len(contract.golden) == 6 and not (bundle / "model").exists()


def test_the_card_has_the_measured_figures(bundle):
    card = (bundle / "README.md").read_text(encoding="utf-8")
    head, *_ = card.removeprefix("---\n").split("\n---\n")
    assert "pipeline_tag: image-segmentation" in head and "value: 0.4321" in head
    assert "| Dice | 0.4321 | 0.3321 to 0.5321 | 9 |" in card and "| recall of lesions | 0.6 |" in card
    assert "| Dice of whole | 0.5 |" in card and "| regions | whole: core, edema; core: core |" in card
    needed = (bundle / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(">=")[0] for line in needed if line.startswith("openvino")] == ["openvino"]
    assert all("<" in line for line in needed if line and not line.startswith("#"))
    assert not [line for line in needed if line.startswith(("torch", "monai", "pydantic", "onnx"))]


def test_requirements_name_the_packages_that_are_installed(bundle, monkeypatch):
    """ONNX Runtime for GPUs is another package with the same module; TensorRT needs CUDA's own beside it."""
    contract, version = Bundle.open(bundle).contract, importlib.metadata.version
    graphs = tuple(replace(contract.graphs[0], runtime=runtime) for runtime in ("onnxruntime", "tensorrt"))
    packages = {"onnxruntime": ["onnxruntime-gpu"], "tensorrt": ["tensorrt-cu13"]}
    known = {"onnxruntime-gpu": "1.31.1", "tensorrt-cu13": "11.2"}

    def version_of(name):
        if name in ("onnxruntime", "tensorrt", "cuda-python"):
            raise importlib.metadata.PackageNotFoundError(name)
        return known.get(name) or version(name)

    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: packages)
    monkeypatch.setattr("importlib.metadata.version", version_of)
    lines = requirements(replace(contract, graphs=graphs)).splitlines()
    assert "onnxruntime-gpu>=1.31.1,<2" in lines
    assert "# or, for TensorRT: tensorrt-cu13>=11.2,<12 cuda-python" in lines


def test_no_path_and_no_name_is_in_a_bundle(bundle, run):
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        data = path.read_bytes()
        patients = (b"Mueller", b"HMACs of patients", b"HMAC of a group", b"fingerprint of a salt")
        for secret in (*patients, str(run.parent).encode(), str(Path(__file__).parents[3]).encode()):
            assert secret not in data, path
    assert not list(bundle.rglob("archive.parquet"))


def test_synthetic_scans_are_no_noise_and_are_the_same_again():
    scan = synthetic_scan(2, (33, 100), 3)
    assert scan.shape == (2, 33, 100) and scan.max() > 2500 and (scan == synthetic_scan(2, (33, 100), 3)).all()
    assert (scan != synthetic_scan(2, (33, 100), 4)).any()


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(formats=("onnx", "caffe")), r"--formats onnx,caffe: \['caffe'\] is no format; there are onnx, openvino"),
        (dict(precisions=("int4",)), r"--precision int4: \['int4'\] is no precision"),
        (dict(formats=("onnx",), precisions=("bf16",)), "--precision bf16: of the formats OpenVINO alone"),
        (
            dict(formats=("openvino", "onnx", "tensorrt"), precisions=("bf16",)),
            "--formats openvino,onnx,tensorrt: onnx and tensorrt would have no graph",
        ),
        (dict(formats=("pytorch",), precisions=("fp16",)), "--precision fp16: is of graphs"),
    ],
)
def test_what_cannot_be_exported(run, tmp_path, request_, message):
    with pytest.raises(InputError, match=message):
        export(run, tmp_path / "out", ExportRequest(**request_))
    assert not (tmp_path / "out").exists()


def test_the_command(run, tmp_path, capsys):
    out = tmp_path / "b"
    assert main(["export", str(run), "--out", str(out), "--formats", "pytorch", "--zip"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and "PyTorch" in said.err and "sha256 of the bundle" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.zip"]
    assert main(["export", str(run), "--out", str(out), "--formats", "pytorch"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "c"), "--formats", "tensorrt"]) == 3
    assert "--formats tensorrt: tensorrt is not installed" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "b.zip")]) == 0


def test_a_graph_that_nobody_replayed_does_not_stand(run, tmp_path, monkeypatch):
    """A runtime that is installed and lacks something, as TensorRT without cuda-python."""

    def unusable(folder, contract, graph):
        raise EnvironmentFault("needs cuda-python")

    monkeypatch.setattr("resunet.bundle.verify.open_engine", unusable)
    with pytest.raises(EnvironmentFault, match=r"not be replayed here(.|\n)*pytorch fp32: not usable here: needs cuda-python"):
        export(run, tmp_path / "x.bundle", ExportRequest(formats=("pytorch",)))
    assert not (tmp_path / "x.bundle").exists()


def test_without_onnx_it_says_what_to_install(tmp_path: Path):
    """The extra `export` is not part of the plain installation; what needs none of it goes on."""
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from resunet.cli import main\n"
        "export = ['export', 'nowhere', '--out', 'bundle']\n"
        "print([main(export), main([*export, '--formats', 'pytorch']), main(['compress', 'nowhere', '--recipe', 'prune'])])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1:] == ["[3, 2, 2]"], done.stderr
    assert "--formats onnx: onnx is not installed: pip install 'resunet[export]'" in done.stderr
    assert "nowhere: no such folder" in done.stderr and "Traceback" not in done.stderr
