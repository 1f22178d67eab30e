"""What a bundle's proof finds."""

import hashlib
import json
import shutil
import stat
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from resunet.bundle.bundle import Bundle
from resunet.bundle.contract import parse
from resunet.bundle.engines import open_engine
from resunet.bundle.golden import read_golden, replay, write_golden
from resunet.bundle.seal import described, write_sealed
from resunet.bundle.verify import verify
from resunet.cli import main
from resunet.errors import CheckFailed, EnvironmentFault, InputError


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def reseal(bundle: Path, **changes) -> None:
    """As somebody would who knows how: files, contract and seal agree again."""
    raw = json.loads((bundle / "contract.json").read_text()) | changes
    raw["files"] = {name: {"sha256": its.sha256, "bytes": its.bytes} for name, its in described(bundle).items()}
    text = json.dumps(raw)
    (bundle / "contract.json").write_text(text)
    (bundle / "contract.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  contract.json\n")


def test_a_bundle_as_it_was_written(exported, capsys):
    _, bundle = exported
    assert main(["verify", str(bundle)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1].split() == [
        *("runtime", "version", "precision", "largest", "difference", "tolerance", "decided", "otherwise", "seconds", "verdict")
    ]
    assert all("0.00% of pixels" in line for line in told[2:])
    assert [line.split()[0] for line in told[2:]] == ["OpenVINO", "ONNX", "PyTorch"]
    assert all(line.endswith("equal") for line in told[2:])
    digest = hashlib.sha256((bundle / "contract.json").read_bytes()).hexdigest()
    assert digest in told[0]
    zipped = bundle.with_name(f"{bundle.name}.zip")
    assert main(["verify", str(zipped), "--sha256", digest]) == 0
    assert main(["verify", str(zipped), "--sha256", "0" * 64]) == 1
    assert "is another bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *("graphs/fp32/model.onnx", "graphs/fp32/model.xml", "graphs/fp32/model.bin", "model/model.safetensors", "README.md"),
        *("model/config.json", "golden/67x81.npz", "requirements.txt", "contract.json", "contract.sha256"),
    ],
)
def test_a_flipped_bit_and_a_missing_file(bundle, name, capsys):
    flip_a_bit(bundle / name)
    assert main(["verify", str(bundle)]) == 1
    assert main(["predict", str(bundle), "x.png", "--out", str(bundle.parent / "out")]) == 1
    assert name.split("/")[-1].split(".")[0] in capsys.readouterr().err
    (bundle / name).unlink()
    assert main(["predict", str(bundle), "x.png", "--out", str(bundle.parent / "out")]) == 1  # not as a run, unverified
    assert main(["verify", str(bundle)]) == 1
    with pytest.raises(CheckFailed, match=f"{name}: is missing"):
        verify(bundle)


def test_what_nobody_listed(bundle):
    (bundle / "graphs" / "more.bin").write_bytes(b"")
    with pytest.raises(CheckFailed, match=r"graphs/more\.bin: is not in the contract"):
        verify(bundle)
    (bundle / "graphs" / "more.bin").unlink()
    (bundle / "link").symlink_to("graphs")
    with pytest.raises(CheckFailed, match=r"link: is not in the contract"):
        verify(bundle)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw["class_names"].reverse(), "not its mask|class_names|post"),
        (lambda raw: raw["normalisation"].update(high=90.0), "from the live network's"),
        (lambda raw: raw["window"].update(overlap=0.5), "from the live network's"),
        (lambda raw: raw["postprocessing"]["rules"][0].update(smallest=4000), "are not its mask"),
        (lambda raw: raw["output"].update(threshold=0.6), "output="),
        (lambda raw: raw["output"].update(activation="softmax"), "output="),
        (lambda raw: raw["input"].update(count=3), "is not of count=3"),
        (lambda raw: raw["input"].update(name="image"), "the contract says"),
        (lambda raw: raw["normalisation"].update(high=500), "percentiles from 0 to 100"),
        (lambda raw: raw["normalisation"].update(low=int("9" * 400)), "must be a finite number"),
        (lambda raw: raw["golden"][0].update(window=0), r"golden\.window: at least 1"),
        (lambda raw: raw["footprint"].update(stride=0), "stride at least 1"),
        (lambda raw: raw["window"].update(memory=0), "memory and sigma above 0"),
        (lambda raw: raw["operating_point"].update(threshold=5), r"operating_point\.threshold: between 0 and 1"),
        (lambda raw: raw.update(nonsense=1), "nonsense: there is no such key"),
        (lambda raw: raw.pop("window"), "window: is missing"),
        (lambda raw: raw["window"].update(size="512"), "window.size='512': must be a whole number"),
        (lambda raw: raw.update(schema_version=1), "schema_version=1: this version reads 2"),
        (lambda raw: [one.update(opset=17) for one in raw["graphs"] if one["opset"]], "is of opset 18, the contract says 17"),
        (lambda raw: [one.update(ir=10) for one in raw["graphs"] if one["ir"]], "is of IR version 11, the contract says 10"),
        (lambda raw: raw["graphs"][0].update(file="../x.xml"), "named in the contract, and not among its files"),
    ],
)
def test_an_edited_contract_that_agrees_with_its_seal(bundle, change, message):
    raw = json.loads((bundle / "contract.json").read_text())
    change(raw)
    if message.startswith("not its mask"):
        raw["postprocessing"] = None
    (bundle / "contract.json").write_text(json.dumps(raw))
    if message.startswith("not its mask"):  # the names of mask values changed places: no golden case can tell, the digest does
        before = verify_digest(bundle)
        reseal(bundle)
        assert Bundle.open(bundle).sha256 != before
        return
    reseal(bundle)
    with pytest.raises(CheckFailed, match=message):
        verify(bundle, told=lambda line: None)


def verify_digest(bundle: Path) -> str:
    return (bundle / "contract.sha256").read_text().split()[0]


def test_other_weights_that_agree_with_their_seal(bundle):
    model = onnx.load(bundle / "graphs" / "fp32" / "model.onnx")
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, bundle / "graphs" / "fp32" / "model.onnx")
    reseal(bundle)
    with pytest.raises(CheckFailed, match=r"(?s)1 of 3 graphs failed:.*onnxruntime fp32: golden/.*the tolerance is 0\.0001"):
        verify(bundle, told=lambda line: None)
    (bundle / "graphs" / "fp32" / "model.onnx").write_bytes(b"\x08\x0a nonsense")
    reseal(bundle)
    with pytest.raises(CheckFailed, match=r"onnxruntime fp32: model\.onnx: is no ONNX file"):
        verify(bundle, told=lambda line: None)


def test_a_mask_that_the_logits_do_not_make(bundle):
    path = bundle / "golden" / "64x64.npz"
    case = read_golden(path)
    case.mask[10, 10] ^= 1
    write_golden(path, case)
    reseal(bundle)
    with pytest.raises(
        CheckFailed, match=r"64x64\.npz: its logits, decided and post-processed by the contract, are not its mask"
    ):
        verify(bundle, told=lambda line: None)


def test_logits_that_are_not_finite_hide_nothing(bundle):
    path = bundle / "golden" / "64x64.npz"
    case = read_golden(path)
    case.logits[0, 3, 3] = np.nan
    write_golden(path, case)
    reseal(bundle)
    with pytest.raises(CheckFailed, match=r"64x64\.npz: its logits are not finite"):
        verify(bundle, told=lambda line: None)


def test_a_golden_case_is_not_unpickled(bundle):
    np.savez(bundle / "golden" / "64x64.npz", values=np.array([object()]), spacing=1, logits=1, mask=1)
    reseal(bundle)
    with pytest.raises(CheckFailed, match="is no golden case"):
        verify(bundle, told=lambda line: None)


def test_a_golden_case_that_is_torn(bundle):
    flip_a_bit(bundle / "golden" / "64x64.npz")
    reseal(bundle)
    with pytest.raises(CheckFailed, match=r"64x64\.npz: is no golden case"):
        verify(bundle, told=lambda line: None)


def test_a_runtime_that_cannot_be_used_here_hides_no_other(bundle, monkeypatch, capsys):
    def without_driver(folder, contract, graph):
        if graph.runtime == "openvino":
            raise EnvironmentFault("no driver")
        return open_engine(folder, contract, graph)

    monkeypatch.setattr("resunet.bundle.verify.open_engine", without_driver)
    told = verify(bundle)
    assert [row.verdict for row in told.rows] == ["not usable here: no driver", "equal", "equal"]
    monkeypatch.setattr("resunet.bundle.verify.version_of", lambda runtime: "1" if runtime == "openvino" else None)
    with pytest.raises(EnvironmentFault, match="nothing was replayed"):
        verify(bundle)


def test_pixels_that_a_runtime_decides_otherwise_are_counted(exported):
    _, bundle = exported
    contract = Bundle.open(bundle).contract
    graph = replace(contract.graphs[0], tolerance=1e6)
    engine = open_engine(bundle, contract, graph)
    same = replay(bundle, contract, graph, engine)
    assert same.decided == 0 and same.difference < 1e-4
    shifts = {shift: lambda images, by=shift: engine(images) + by for shift in (0.001, 5)}
    assert 0 < replay(bundle, contract, graph, shifts[0.001]).decided < 0.1
    with pytest.raises(CheckFailed, match=r"decides \d\d\.\d% of the golden cases' pixels otherwise .* another segmenter"):
        replay(bundle, contract, graph, shifts[5])


@pytest.mark.parametrize("fault", [RuntimeError("Failed to allocate memory"), ValueError("a shape")])
def test_a_runtime_that_fails_while_it_runs_is_told(bundle, monkeypatch, capsys, fault, tmp_path):
    """verify goes on to the other runtimes; predict to the other scans."""

    def failing(path, contract, graph):
        def run(images):
            raise fault

        return run

    monkeypatch.setattr("resunet.bundle.engines._onnxruntime", failing)
    with pytest.raises(CheckFailed, match="1 of 3 graphs failed"):
        verify(bundle)
    told = capsys.readouterr().out
    assert told.count("equal") == 2 and told.count("FAILED") == 1
    scan = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(scan)
    arguments = ["predict", str(bundle), str(scan), "--out", str(tmp_path / "out"), "--runtime", "onnxruntime"]
    assert main(arguments) == 2
    assert f"ONNX Runtime cannot run it on (1, 1, 32, 32): {fault}" in capsys.readouterr().err


def test_a_runtime_whose_library_does_not_load_hides_no_other(bundle, monkeypatch):
    def broken(path, contract, graph):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr("resunet.bundle.engines._openvino", broken)
    told = verify(bundle)
    assert sorted(row.verdict for row in told.rows)[:2] == ["equal", "equal"]
    assert any("OpenVINO is installed and does not load: libgomp" in row.verdict for row in told.rows)


def test_pytorch_without_what_the_network_needs_hides_no_other(bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resunet.model", None)
    *others, pytorch = verify(bundle).rows
    assert [row.verdict for row in others] == ["equal", "equal"]
    assert "PyTorch needs resunet.model, too: pip install resunet with all that it needs" in pytorch.verdict
    capsys.readouterr()
    assert main(["predict", str(bundle), "scan.png", "--out", str(bundle.parent / "o"), "--runtime", "pytorch"]) == 3
    assert "needs resunet.model, too" in capsys.readouterr().err and not (bundle.parent / "o").exists()


def test_which_graph_is_taken(exported, monkeypatch):
    whole = Bundle.open(exported[1])
    fp32 = whole.contract.graphs
    assert whole.graph() == fp32[0] and whole.graph(runtime="onnxruntime").runtime == "onnxruntime"
    half = [replace(one, precision="fp16") for one in fp32 if one.runtime != "pytorch"]
    other = replace(whole, contract=replace(whole.contract, graphs=(*half, fp32[-1])))
    assert other.graph() == fp32[-1], "fp32 first"
    assert replace(whole, contract=replace(whole.contract, graphs=tuple(half))).graph() == half[0]
    monkeypatch.setattr("resunet.bundle.bundle.version_of", lambda runtime: None if runtime == "pytorch" else "1")
    assert other.graph() == half[0], "what this machine can run"
    with pytest.raises(
        EnvironmentFault, match=r"PyTorch is needed.*pip install resunet, with all.*openvino fp16, onnxruntime fp16"
    ):
        other.graph("fp32")
    with pytest.raises(InputError, match="any runtime, int8: the bundle has no such graph"):
        other.graph("int8")


def zip_with(path: Path, *members: tuple[str, bytes], kind: int = stat.S_IFREG) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            member = zipfile.ZipInfo(name)
            member.external_attr = (kind | 0o644) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data)
    return path


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "C:evil", "./evil", "a//evil"])
def test_a_zip_that_would_write_elsewhere(tmp_path, name):
    (tmp_path / "deep").mkdir()
    made = zip_with(tmp_path / "deep" / "x.zip", (name, b"x"))
    with pytest.raises(CheckFailed, match="leaves the folder or is not plain"):
        verify(made)
    assert not list(tmp_path.rglob("evil"))


def test_zips_that_are_no_good(tmp_path, exported):
    with pytest.raises(CheckFailed, match="which is no file"):
        verify(zip_with(tmp_path / "link.zip", ("link", b"/etc"), kind=stat.S_IFLNK))
    with pytest.raises(CheckFailed, match="expands to more than 50 times"):
        verify(zip_with(tmp_path / "bomb.zip", ("zeros", bytes(80 * 2**20))))
    with pytest.raises(CheckFailed, match="holds 1001 files"):
        verify(zip_with(tmp_path / "many.zip", *((str(i), b"") for i in range(1001))))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zip_with(tmp_path / "twice.zip", ("a", b""), ("a", b""))
    with pytest.raises(CheckFailed, match="'a' twice"):
        verify(twice)
    with pytest.raises(CheckFailed, match=r"contract\.json: is missing"):
        verify(zip_with(tmp_path / "empty.zip"))
    zipped = exported[1].with_name(f"{exported[1].name}.zip")
    torn = Path(shutil.copy(zipped, tmp_path / "torn.zip"))
    flip_a_bit(torn)
    with pytest.raises(CheckFailed):
        verify(torn)
    deflated = zip_with(tmp_path / "deflated.zip", ("a", bytes(range(256)) * 400))
    data = bytearray(deflated.read_bytes())
    data[40:60] = b"\xff" * 20
    deflated.write_bytes(data)
    with pytest.raises(CheckFailed, match="cannot be unpacked"):
        verify(deflated)
    (tmp_path / "cut.zip").write_bytes(zipped.read_bytes()[:-4000])
    with pytest.raises(CheckFailed):
        verify(tmp_path / "cut.zip")


def test_a_zip_is_unpacked_for_as_long_as_it_is_used(exported):
    opened = Bundle.open(exported[1].with_name(f"{exported[1].name}.zip"))
    folder = opened.folder
    assert opened.contract == Bundle.open(exported[1]).contract and (folder / "README.md").is_file()
    del opened
    assert not folder.exists()


def test_the_contract_comes_back_as_it_was_written(exported, tmp_path):
    contract = Bundle.open(exported[1]).contract
    assert parse(contract.to_json()) == contract
    write_sealed(tmp_path, contract)
    assert (tmp_path / "contract.json").read_bytes() == (exported[1] / "contract.json").read_bytes()
