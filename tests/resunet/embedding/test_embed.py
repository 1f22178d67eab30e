import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from resunet.checkpoint import WEIGHTS
from resunet.config import PercentileZScore
from resunet.data.identity import Salt
from resunet.data.images import read_scan
from resunet.embedding.embed import EmbedRequest, embed
from resunet.embedding.features import ScanFeatures
from resunet.embedding.pieces import ReadScan, pieces_of, shrink
from resunet.embedding.table import read_embeddings
from resunet.encoder import ResidualEncoder
from resunet.errors import EnvironmentFault, InputError
from resunet.files import sha256
from resunet.model import ResUNet, UNet
from resunet.runtime import normalise, percentile_intensity

SALT = Salt(bytes.fromhex("ab" * 32))


@pytest.fixture
def made(model, source, tmp_path):
    def make(name="e.parquet", its_model=model, **changes):
        request = EmbedRequest(**dict(source=source, names="keep", salt_file=tmp_path / "salt") | changes)
        embedded = embed(its_model, tmp_path / name, request)
        assert embedded.out == tmp_path / name
        return read_embeddings(embedded.out)

    return make


def by_id(embeddings):
    return {row["id"]: row for row in embeddings.table.to_pylist()}


def naive(encoder, values) -> np.ndarray:
    """The mean over the last level, one slice alone in its batch."""
    with torch.no_grad():
        return encoder(torch.from_numpy(values)[None])[-1][0].flatten(1).mean(dim=1).numpy()


def test_embeddings_are_what_the_encoder_gives_of_each_whole_slice(made, model, source):
    encoder, rows = ResidualEncoder.from_pretrained(model), by_id(made(batch=3))
    assert list(rows) == sorted(rows) and len(rows) == 14
    for stem in ("p0-0", "p5-1"):
        values = read_scan(source / "images" / f"{stem}.png", "grey").values
        wanted = naive(encoder, normalise(values, percentile_intensity(values, 0.5, 99.5)))
        np.testing.assert_allclose(rows[stem]["embedding"], wanted, rtol=1e-4, atol=1e-6)
        assert rows[stem]["slices"] == 1
    values = read_scan(source / "images" / "vol.nii.gz", "grey").values
    seen = normalise(values, percentile_intensity(values, 0.5, 99.5))  # by the whole volume
    wanted = np.mean([naive(encoder, seen[:, z]) for z in range(1, 5)], axis=0)  # slice 0 is air
    np.testing.assert_allclose(rows["vol"]["embedding"], wanted, rtol=1e-4, atol=1e-6)
    assert rows["vol"]["slices"] == 4
    assert rows["empty"]["slices"] == 0 and rows["empty"]["embedding"] is None


def test_the_batch_changes_nothing(made):
    one, many = made(batch=1), made("other.parquet", batch=7)
    np.testing.assert_allclose(one.vectors()[1], many.vectors()[1], rtol=1e-4, atol=1e-6)
    assert made("again.parquet", batch=7).table.equals(many.table)


def test_a_row_a_slice(made, source):
    scans, slices = by_id(made()), made("slices.parquet", per_slice=True)
    table = [row for row in slices.table.to_pylist() if row["id"] == "vol"]
    assert [row["slice"] for row in table] == [1, 2, 3, 4]
    assert [row["position"] for row in table] == [0.25, 0.5, 0.75, 1.0]
    mean = np.mean([row["embedding"] for row in table], axis=0)
    np.testing.assert_allclose(mean, scans["vol"]["embedding"], rtol=1e-5, atol=1e-6)
    image = next(row for row in slices.table.to_pylist() if row["id"] == "p0-0")
    assert image["slice"] is None and image["position"] is None and len(slices.table) == 16
    groups = source / "groups.csv"
    first, *rows = groups.read_text(encoding="utf-8").split()
    lines = [f"{first},position", *(f"{row},{0.625 if row.startswith('p0-0') else ''}" for row in rows)]
    groups.write_text("\n".join(lines), encoding="utf-8")
    again = made("again.parquet", per_slice=True).table.to_pylist()
    assert [row["position"] for row in again if row["id"] in ("p0-0", "p0-1", "vol")] == [0.625, None, 0.25, 0.5, 0.75, 1.0]


def test_what_it_was_made_with_and_no_name(made, model, source, tmp_path):
    found = made(names="hash", longest=30)
    record = found.record
    assert record.model_sha256 == sha256(model / WEIGHTS) and record.salt_fingerprint == SALT.fingerprint
    assert (record.dims, record.longest, record.normalisation) == (12, 30, PercentileZScore())
    assert found.column("id") == sorted(found.column("id"))
    assert SALT.identify("file", "p3-1") in found.column("id")
    assert SALT.identify("group", "patient3") in found.column("group")
    assert str(pq.read_schema(tmp_path / "e.parquet").field("embedding").type) == "fixed_size_list<element: float>[12]"
    written = (tmp_path / "e.parquet").read_bytes()
    assert not any(word.encode() in written for word in ("patient", "p3-", "source", str(tmp_path)))


def test_groups_are_hashed_where_names_are_kept(made):
    assert by_id(made())["p3-1"]["group"] == SALT.identify("group", "patient3")


def test_long_slices_are_shrunk_by_area():
    values = np.random.default_rng(0).normal(size=(1, 40, 20)).astype(np.float32)
    np.testing.assert_allclose(shrink(values, 20), values.reshape(1, 20, 2, 10, 2).mean(axis=(2, 4)), rtol=1e-5, atol=1e-6)
    assert shrink(values, 40) is values


def test_windows_tile_a_volume_and_the_empty_ones_are_left_out():
    values = np.random.default_rng(0).normal(size=(1, 10, 33, 5)).astype(np.float32)
    values[:, :, 16:] = 3
    scan = ReadScan(values, 0, percentile_intensity(values, 0, 100))
    (left,) = pieces_of(scan, 3, 20)
    assert left.values.shape == (1, 10, 16, 5) and left.weight == 800
    values[:, :, 16:] += np.arange(5)
    both = list(pieces_of(ReadScan(values, 0, percentile_intensity(values, 0, 100)), 3, 20))
    assert [piece.weight for piece in both] == [800, 850] and both[1].values.shape == (1, 10, 17, 5)


def test_an_encoder_of_volumes(made, source, tmp_path):
    torch.manual_seed(0)
    encoder = ResidualEncoder(channels=(4, 6), units=1, spatial_dims=3).eval()
    encoder.save_pretrained(tmp_path / "volumes")
    for path in (source / "images").glob("p[0-4]*"):
        path.unlink()
    (source / "images" / "vol.nii.gz").rename(tmp_path / "vol.nii.gz")
    with pytest.raises(InputError, match=r"none of 3 scans .* image of two dimensions"):
        made(its_model=tmp_path / "volumes")
    assert not (tmp_path / "e.parquet").exists()
    (tmp_path / "vol.nii.gz").rename(source / "images" / "vol.nii.gz")
    embedded = embed(
        tmp_path / "volumes",
        tmp_path / "v.parquet",
        EmbedRequest(source=source, names="keep", salt_file=tmp_path / "salt", longest=16),
    )
    assert embedded.scans == 1 and len(embedded.faults) == 3 and "spatial_dims=3" in embedded.faults[0]
    (row,) = read_embeddings(tmp_path / "v.parquet").table.to_pylist()
    values = read_scan(source / "images" / "vol.nii.gz", "grey").values
    seen = normalise(values, percentile_intensity(values, 0.5, 99.5))
    parts = [seen[:, :, y, x] for y in (slice(12), slice(12, 24)) for x in (slice(15), slice(15, 30))]
    np.testing.assert_allclose(
        row["embedding"], np.mean([naive(encoder, part) for part in parts], axis=0), rtol=1e-4, atol=1e-6
    )
    assert row["slices"] == 4
    with pytest.raises(InputError, match="--per-slice: the model is one of volumes"):
        made(its_model=tmp_path / "volumes", per_slice=True)


def test_a_scan_that_cannot_be_read_is_left_out(made, model, source, tmp_path, capsys):
    (source / "images" / "p2-0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    embedded = embed(model, tmp_path / "e.parquet", EmbedRequest(source=source, names="keep", salt_file=tmp_path / "salt"))
    assert embedded.scans == 13 and "p2-0.png" in embedded.faults[0] and "p2-0.png" in capsys.readouterr().err
    assert "p2-0" not in by_id(read_embeddings(tmp_path / "e.parquet"))


def test_an_embedding_that_is_not_finite_is_a_fault(model, source, tmp_path):
    network = ResidualEncoder.from_pretrained(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1e20)
    network.save_pretrained(tmp_path / "broken")
    embedded = embed(tmp_path / "broken", tmp_path / "b.parquet", EmbedRequest(source=source, salt_file=tmp_path / "salt"))
    assert len(embedded.faults) == 13 and all("its embedding is not finite" in fault for fault in embedded.faults)
    ids, vectors = read_embeddings(tmp_path / "b.parquet").vectors()
    assert not len(ids) and not len(vectors)  # the image without content has a row, and no embedding


def test_a_segmenter_has_an_encoder_too(made, model, tmp_path):
    network = ResUNet(channels=(4, 6, 8, 12), units=1)
    network.encoder.load_state_dict(ResidualEncoder.from_pretrained(model).state_dict())
    network.save_pretrained(tmp_path / "segmenter")
    one, other = made(), made("s.parquet", tmp_path / "segmenter")
    np.testing.assert_array_equal(one.vectors()[1], other.vectors()[1])
    UNet(channels=(4, 6)).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match=r"architecture.name='unet' has no encoder"):
        made("u.parquet", tmp_path / "unet")


def test_bf16_is_near(made):
    exact, half = made().vectors()[1], made("half.parquet", precision="bf16").vectors()[1]
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def test_instance_norm_says_what_is_too_small(made, source, tmp_path):
    ResidualEncoder(channels=(4, 6, 8, 12), units=1, norm="instance").save_pretrained(tmp_path / "instance")
    Image.fromarray(np.random.default_rng(0).integers(0, 250, (8, 6), np.uint8)).save(source / "images" / "empty.png")
    embedded = embed(tmp_path / "instance", tmp_path / "i.parquet", EmbedRequest(source=source, salt_file=tmp_path / "salt"))
    assert embedded.scans == 13 and "above 8 pixels" in embedded.faults[0]


def test_refusals(made, model, tmp_path, monkeypatch):
    with pytest.raises(EnvironmentFault, match="fp16"):
        made(precision="fp16")
    made()
    with pytest.raises(InputError, match="exists already"):
        made()
    with pytest.raises(InputError, match="not a table of embeddings"):
        pq.write_table(pq.read_table(tmp_path / "e.parquet").replace_schema_metadata(None), tmp_path / "bare.parquet")
        read_embeddings(tmp_path / "bare.parquet")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        made("two.parquet")


def test_the_mean_over_windows_is_by_their_size():
    features = ScanFeatures(np.array([[0.0, 1], [3, 1]], np.float32), np.array([1.0, 2]), [None, None], [0.0, 0.0])
    np.testing.assert_allclose(features.mean, [2, 1])
