import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resunet.cli import main
from resunet.data.check import check
from resunet.data.manifest import beside
from resunet.errors import InputError


def picture(seed, side=96):
    """Blobs: with content at all frequencies, and no copy of another."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def manifests(make_manifest):
    """An archive and what must not be in it: a turned and resized copy, the same file, a patient, and one who is not in it."""
    turned = np.asarray(Image.fromarray(np.rot90(picture(1))).resize((80, 80), Image.Resampling.BICUBIC))
    archive = make_manifest(
        "a", {"one": picture(1), "two": picture(2), "three": picture(3), "new\nline": picture(9)}, groups={"three": "P"}
    )
    held_out = make_manifest(
        "b",
        {"turned": turned, "same": picture(2), "visit": picture(4), "else": picture(5), "line": picture(9)},
        groups={"visit": "P"},
    )
    return archive, held_out


def test_every_pair_is_a_line_with_both_images_and_the_evidence(manifests, capsys, tmp_path):
    archive, held_out = manifests
    out = tmp_path / "new" / "pairs.parquet"
    assert check(archive.path, held_out.path, out) == 4
    shown = capsys.readouterr()
    lines = [line.split("\t") for line in shown.out.splitlines()]
    by_name = {line[1].rsplit("/", 1)[1]: line for line in lines}
    assert set(by_name) == {"turned.png", "same.png", "visit.png", "line.png"}
    assert by_name["same.png"][0].endswith("/a/two.png") and by_name["line.png"][0].endswith("/a/new\\nline.png")
    assert by_name["same.png"][2].startswith("sha256 of the file; sha256 of the pixels; perceptual, correlation 1.000")
    assert by_name["turned.png"][2].startswith("perceptual, correlation ") and by_name["visit.png"][2] == "group"
    assert "4 of 5 images" in shown.err

    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 4
    for row in rows:
        one, other = (int(m.rows_of([row[key]])[0]) for m, key in ((archive, "archive_id"), (held_out, "held_out_id")))
        name = held_out.files(other)[0].name
        assert archive.files(one)[0].name == by_name[name][0].rsplit("/", 1)[1].replace("\\n", "\n")
        assert (row["group"], row["file_sha256"]) == (name == "visit.png", name in ("same.png", "line.png"))
        assert (row["correlation"] is None) == (name == "visit.png")
    assert all(name not in out.read_bytes() for name in (b"turned", b"visit", b".png"))
    with pytest.raises(InputError, match="exists already"):
        check(archive.path, held_out.path, out)


def test_the_command_says_1_where_there_are_any(manifests, make_manifest, capsys):
    archive, held_out = manifests
    clean = make_manifest("c", {"x": picture(77)})
    assert main(["index", "--check", str(archive.path), "--against", str(held_out.path)]) == 1
    assert main(["index", "--check", str(archive.path), "--against", str(clean.path)]) == 0
    assert main(["index", "--check", str(archive.path)]) == 2
    assert capsys.readouterr().out.count("\n") == 4


def test_other_salts_and_no_paths(manifests, make_manifest, capsys):
    archive, _ = manifests
    other = make_manifest("d", {"visit": picture(4), "same": picture(2)}, key=bytes([1]) * 32, groups={"visit": "P"})
    beside(other.path, "paths.parquet").unlink()
    assert check(archive.path, other.path, None) == 1
    shown = capsys.readouterr()
    assert "group evidence unavailable" in shown.err and "named by their ids" in shown.err
    assert shown.out.split("\t")[1] in other.column("id").to_pylist()
