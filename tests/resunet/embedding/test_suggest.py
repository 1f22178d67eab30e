import csv
import json

import numpy as np
import pytest
from PIL import Image

from resunet.cli import main
from resunet.data.identity import Salt
from resunet.data.index import IndexRequest, index
from resunet.embedding.embed import EmbedRequest, embed
from resunet.embedding.suggest import SuggestRequest, suggest
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError

SALT = Salt(bytes.fromhex("ab" * 32))


def hmac(number: int) -> str:
    return SALT.identify("group", f"patient{number}")


@pytest.fixture
def made(model, source, tmp_path):
    def make(name="out", its_source=source, budget=2, **changes):
        request = SuggestRequest(source=its_source, salt_file=tmp_path / "salt", budget=budget, **changes)
        lines = suggest(model, tmp_path / name, request).lines
        with open(tmp_path / name / "suggestions.csv", newline="", encoding="utf-8") as file:
            return lines, list(csv.DictReader(file))

    return make


def masked(source, *groups):
    (source / "masks").mkdir(exist_ok=True)
    for group in groups:
        for i in range(2):
            Image.fromarray(np.ones((24 + 8 * i, 40), np.uint8)).save(source / "masks" / f"p{group}-{i}.png")


def test_a_manifest_whose_masks_say_who_is_labelled(made, source, tmp_path, look_at):
    masked(source, 0, 1)
    index(IndexRequest((source,), tmp_path / "m.parquet", None, workers=1, salt_file=tmp_path / "salt"))
    lines, rows = made(its_source=tmp_path / "m.parquet", budget=5, method="kcenter")
    assert {row["group"] for row in rows} == {hmac(2), hmac(3), hmac(4), hmac(5), SALT.identify("group", "patient-vol")}
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    by_group = {row["group"]: row for row in rows}
    assert by_group[hmac(3)]["scans"] == "2" and len(by_group[hmac(3)]["ids"].split()) == 2
    shown = [line.split("\t") for line in lines]
    assert len(shown) == 9 and {path for _, group, path in shown if group == hmac(3)} == {
        str(source / "images" / f"p3-{i}.png") for i in range(2)
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "suggestions.csv", "labelled.csv", "report.html", "embeddings.parquet",
    }  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert not any(word in path.read_bytes() for word in (b"patient", b"p3-", str(tmp_path).encode()))
    page = look_at(tmp_path / "out" / "report.html")
    assert len(page.pictures) == 6 and "5 of 5 unlabelled groups to label next; 2 are labelled." in page.text
    assert "1 groups have no content" in page.text and "as it is now" in page.text


def test_rounds_follow_each_other(made, source, tmp_path):
    """The list of one round names who was labelled before it, too."""
    masked(source, 0, 1)
    _, first = made("first", method="kcenter")
    _, second = made("second", labelled=tmp_path / "first" / "labelled.csv", method="kcenter")
    _, third = made("third", labelled=tmp_path / "second" / "labelled.csv", budget=1, method="kcenter")
    suggested = [row["group"] for rows in (first, second, third) for row in rows]
    assert len(set(suggested)) == 5 and not {hmac(0), hmac(1)} & set(suggested)
    with open(tmp_path / "second" / "labelled.csv", newline="", encoding="utf-8") as file:
        rows = [(row["group"], row["suggested"]) for row in csv.DictReader(file)]
    before = sorted([hmac(0), hmac(1), *(row["group"] for row in first)])
    assert rows == [(group, "0") for group in before] + [(row["group"], "1") for row in second]
    made("forgetful", labelled=tmp_path / "first" / "suggestions.csv")
    page = (tmp_path / "forgetful" / "report.html").read_text(encoding="utf-8")
    assert "2 groups have a mask and are not among those that --labelled names" in page
    assert "not among those" not in (tmp_path / "second" / "report.html").read_text(encoding="utf-8")


def test_a_scan_that_cannot_be_read_is_told(source, model, tmp_path, capsys):
    (source / "images" / "p3-0.png").write_bytes(b"no image")
    words = [
        "suggest",
        str(model),
        str(source),
        "--budget",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--salt-file",
        str(tmp_path / "salt"),
    ]
    assert main(words) == 2
    assert "1 scans could not be embedded, as said above" in capsys.readouterr().err
    assert "1 scans could not be embedded" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_val_and_test_are_neither_suggested_nor_covered(made, source, tmp_path):
    stems = {part: [f"p{group}-{i}" for group in groups for i in range(2)] for part, groups in
             dict(pool=(0, 1, 2), val=(3,), test=(4, 5)).items()}  # fmt: skip
    (source / "splits.json").write_text(json.dumps(stems))
    made("all", budget=4)  # patients 0 to 2 and the volume, which is in no part
    with pytest.raises(InputError, match="there are 4 unlabelled groups outside val and test"):
        made("more", budget=5)
    assert not (tmp_path / "more").exists()
    assert "3 groups of val and test are left out" in (tmp_path / "all" / "report.html").read_text(encoding="utf-8")


def test_who_is_labelled_can_be_said(made, source, tmp_path):
    given = {
        "splits.json": json.dumps({"pool": ["p0-0", "p1-1"], "val": ["p2-0"], "test": ["vol"]}),
        "names.txt": "patient0\npatient1\npatient2\npatient-vol\n",
        "hashed.csv": "group\n" + "\n".join([*map(hmac, range(3)), SALT.identify("group", "patient-vol")]),
    }
    for name, text in given.items():
        (tmp_path / name).write_text(text)
        _, rows = made(f"of-{name}", budget=3, labelled=tmp_path / name)
        assert {row["group"] for row in rows} == {hmac(3), hmac(4), hmac(5)}
    (tmp_path / "wrong.txt").write_text("patient0\nnobody\n")
    with pytest.raises(InputError, match=r"1 of 2 groups are not in .* 'nobody'"):
        made("wrong", labelled=tmp_path / "wrong.txt")
    (tmp_path / "wrong.csv").write_text("name\npatient0\n")
    with pytest.raises(InputError, match="one must be called group"):
        made("wrong", labelled=tmp_path / "wrong.csv")


def test_one_after_another(made, tmp_path):
    """What was suggested and labelled is covered the next time; given embeddings give what computed ones do."""
    _, first = made("first", budget=3, method="kcenter")
    _, more = made("more", budget=5, method="kcenter", embeddings=tmp_path / "first" / "embeddings.parquet")
    labelled = tmp_path / "first" / "suggestions.csv"
    _, then = made("then", budget=2, method="kcenter", labelled=labelled)
    assert [row["group"] for row in first + then] == [row["group"] for row in more]


def test_masks_and_splits_that_came_after_the_embeddings(made, model, source, tmp_path):
    embed(model, tmp_path / "before.parquet", EmbedRequest(source=source, salt_file=tmp_path / "salt"))
    masked(source, 0)
    stems = {part: [f"p{group}-{i}" for group in groups for i in range(2)] for part, groups in
             dict(pool=(0, 1, 2), val=(3,), test=(4, 5)).items()}  # fmt: skip
    (source / "splits.json").write_text(json.dumps(stems))
    Image.fromarray(np.arange(24 * 24, dtype=np.uint8).reshape(24, 24)).save(source / "images" / "new.png")
    (source / "groups.csv").write_text((source / "groups.csv").read_text() + "new,patient9\n")
    with pytest.raises(InputError, match=r"there are 3 unlabelled groups outside val and test \(1 are labelled"):
        made("more", budget=4, embeddings=tmp_path / "before.parquet")
    _, rows = made("all", budget=3, embeddings=tmp_path / "before.parquet")
    assert {row["group"] for row in rows} == {hmac(1), hmac(2), SALT.identify("group", "patient-vol")}
    assert "1 scans are not in --embeddings" in (tmp_path / "all" / "report.html").read_text(encoding="utf-8")


def test_embeddings_of_something_else(made, model, source, tmp_path):
    ResidualEncoder(channels=(4, 6), units=1).save_pretrained(tmp_path / "other")
    request = EmbedRequest(source=source, salt_file=tmp_path / "salt")
    embed(tmp_path / "other", tmp_path / "other.parquet", request)
    with pytest.raises(InputError, match="is of another model"):
        made(embeddings=tmp_path / "other.parquet")
    embed(model, tmp_path / "slices.parquet", request.model_copy(update={"per_slice": True}))
    with pytest.raises(InputError, match="a row a slice"):
        made(embeddings=tmp_path / "slices.parquet")
    embed(model, tmp_path / "own.parquet", request)
    (source / "images" / "p0-0.png").rename(source / "images" / "q.png")
    (source / "groups.csv").write_text((source / "groups.csv").read_text().replace("p0-0", "q"))
    with pytest.raises(InputError, match=r"has scans that .* does not have"):
        made(embeddings=tmp_path / "own.parquet")


def test_the_commands(model, source, tmp_path, capsys):
    given = [str(model), "--data", str(source), "--out", str(tmp_path / "e.parquet"), "--salt-file", str(tmp_path / "salt")]
    assert main(["embed", *given]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'e.parquet'}\n"
    given = [str(model), str(source), "--budget", "1", "--out", str(tmp_path / "s"), "--salt-file", str(tmp_path / "salt")]
    assert main(["suggest", *given, "--embeddings", str(tmp_path / "e.parquet")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "s") and out[0].startswith("1\t") and str(source) in out[0]
    assert main(["suggest", *given]) == 2 and "exists already" in capsys.readouterr().err
    (source / "images" / "p0-0.png").write_bytes(b"no image")
    given = [str(model), "--data", str(source), "--out", str(tmp_path / "f.parquet"), "--salt-file", str(tmp_path / "salt")]
    assert main(["embed", *given]) == 2 and (tmp_path / "f.parquet").exists()
