import hashlib
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resunet.data.manifest import (
    ROWS,
    beside,
    is_foreign,
    open_manifest,
    path_from,
    path_text,
    private_aside,
    thumbnail_offsets,
)
from resunet.data.perceptual import look
from resunet.errors import InputError


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return {f"i{number}": np.kron(rng.integers(0, 255, (4, 4), np.uint8), np.ones((9, 9), np.uint8)) for number in range(9)}


def test_rows_paths_and_thumbnails_belong_together(make_manifest, images):
    manifest = make_manifest("m", images)
    assert manifest.num_rows == 9 and not manifest.groups_known
    ids = manifest.column("id").to_pylist()
    assert ids == sorted(ids)
    for row, digest in enumerate(manifest.column("file_sha256").to_pylist()):
        (file,) = manifest.files(row)
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
        assert np.array_equal(manifest.thumbnail(row), look(images[file.stem][None]).thumbnail)
    wanted = [ids[3], "nobody", ids[0]]
    assert manifest.rows_of(wanted).tolist() == [3, -1, 0]
    assert manifest.columns("group", "id").column_names == ["group", "id"]


def test_groups_are_known_when_everybody_has_one(make_manifest, images):
    assert make_manifest("m", images, groups=dict.fromkeys(images, "one")).groups_known
    assert not make_manifest("n", images, groups={"i0": "one"}).groups_known


def test_what_is_missing_or_of_another_manifest_is_told(make_manifest, images):
    manifest = make_manifest("m", images)
    other = make_manifest("other", {"j": images["i0"]})
    paths = beside(manifest.path, "paths.parquet")
    with pytest.raises(InputError, match="do not belong together"):
        manifest.files_of("0" * 32)
    paths.unlink()
    with pytest.raises(InputError, match=r"m.paths.parquet: is missing"):
        open_manifest(manifest.path).files(0)
    manifest.thumbnails.write_bytes(other.thumbnails.read_bytes())
    with pytest.raises(InputError, match="has 1 planes"):
        open_manifest(manifest.path).thumbnail(0)
    manifest.thumbnails.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_manifest(manifest.path).thumbnail(0)


def test_files_that_are_no_manifest(tmp_path, make_manifest, images):
    path = make_manifest("m", images).path
    with pytest.raises(InputError, match=r"no such manifest. resunet index SOURCE --out"):
        open_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(InputError, match="not a readable manifest"):
        open_manifest(tmp_path / "text.parquet")
    table = pq.read_table(path)
    for name, metadata in (("bare", None), ("new", table.schema.metadata | {b"resunet.schema_version": b"99"})):
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match="not a manifest of schema version"):
            open_manifest(tmp_path / f"{name}.parquet")
    foreign = {name: is_foreign(tmp_path / f"{name}.parquet") for name in ("m", "none", "text", "bare", "new")}
    assert foreign == {"m": False, "none": False, "text": True, "bare": True, "new": False}


def test_paths_of_any_bytes_survive_as_text():
    for name in (b"/plain/a.png", "/ä/ö".encode(), b"/\xff\xfe/\n", "/ä".encode() + b"\xe4", b"/00/\\x00"):
        path = os.fsdecode(name)
        text = path_text(path)
        assert path_from(pa.array([text])[0].as_py()) == path
        assert (text == path) == (b"\xff" not in name and b"\xe4" not in name)


def test_planes_of_a_row():
    shapes = pa.chunked_array([pa.array([[4, 5], [3, 4, 5]]), pa.array([[1, 4, 5], [9, 9, 9]], pa.list_(pa.int64()))])
    assert thumbnail_offsets(shapes).tolist() == [0, 1, 4, 5, 8]
    assert thumbnail_offsets(pa.chunked_array([], pa.list_(pa.int32()))).tolist() == [0]


def test_a_private_file_is_private_from_its_first_byte(tmp_path):
    with private_aside(tmp_path / "a") as aside:
        assert aside.stat().st_mode & 0o777 == 0o600
        pq.write_table(pa.table({"a": [1]}), aside)
        assert aside.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_the_schema_holds_nothing_that_names_a_person():
    assert not {"path", "patient", "name", "date", "birth"} & set("_".join(ROWS.names).split("_"))
