"""What a person opens, in a browser; each page is looked at on a desktop and a phone."""

import shutil

import numpy as np
from PIL import Image

from finetune.comparison.compare import compare
from finetune.evaluation.evaluate import EvaluateRequest, evaluate
from finetune.explanation.explain import explain
from finetune.explanation.request import ExplainRequest


def request_for(run) -> EvaluateRequest:
    source = run.parent / "labelled"
    return EvaluateRequest(source=source, salt_file=source.parent / "salt", names="keep")


def test_the_report_of_a_run(runs, look_at):
    seen = look_at(runs[0] / "report.html")
    wanted = {"On the test cases", "Worst, median and best", "Objects by size", "Calibration", "Learning"}
    assert wanted <= set(seen.headings) and seen.headings[-1] == "How the figures were counted"
    assert seen.headings.index("Objects by size") < seen.headings.index("Learning")
    names = [one["name"] for one in seen.pictures]
    assert sum(name.startswith("Scan, truth and prediction side by side; ") for name in names) == 6
    assert any(name.startswith("Reliability") for name in names) and any(name.startswith("True objects") for name in names)
    assert "ECE" in seen.text and "false alarm" in seen.text


def test_the_page_of_an_evaluation_lists_what_is_missed_and_false(runs, tmp_path, look_at):
    """Masks that miss the objects of three cases, and hold a speck in one."""
    masks = tmp_path / "masks"
    shutil.copytree(runs[0].parent / "labelled" / "masks", masks)
    sizes = []
    for stem in ("c08a", "c09a", "c10a"):
        sizes.append(int((np.asarray(Image.open(masks / f"{stem}.png")) > 0).sum()))
        Image.fromarray(np.zeros((24, 24), np.uint8)).save(masks / f"{stem}.png")
    speck = np.array(Image.open(masks / "c11a.png"))
    speck[0, 23] = 255
    assert not speck[:2, 22].any()
    Image.fromarray(speck).save(masks / "c11a.png")
    seen = look_at(evaluate(masks, request_for(runs[0]), tmp_path / "out") / "report.html")
    assert {"Missed objects", "False alarms"} <= set(seen.headings) and "Calibration" not in seen.headings
    missed = [one["name"] for one in seen.pictures if "a missed object" in one["name"]]
    assert [int(name.split(": ")[2].split(" ")[0]) for name in missed] == sorted(sizes, reverse=True)
    assert all(any(f"; {stem}" in name for name in missed) for stem in ("c08a", "c09a", "c10a"))
    (false,) = [one["name"] for one in seen.pictures if "a false alarm" in one["name"]]
    assert false.endswith("255: 1 pixel; c11a")
    assert "6 true objects, 3 found, 3 missed." in seen.text and "3 in all." in seen.text


def test_the_page_of_a_comparison(runs, tmp_path, look_at):
    seen = look_at(compare(runs, tmp_path / "out") / "report.html")
    assert {"Paired", "Size and speed", "Where they differ most", "Learning"} <= set(seen.headings)


def test_the_page_of_an_explanation(runs, tmp_path, look_at):
    request = ExplainRequest(
        inputs=tuple(runs[0].parent / "labelled" / "images" / f"{stem}.png" for stem in ("c08a", "c09a")),
        masks=runs[0].parent / "labelled" / "masks",
        salt_file=runs[0].parent / "salt",
        lesions=1,
    )
    seen = look_at(explain(runs[0], request, tmp_path / "out") / "explain.html")
    assert "Predictions" in seen.headings and seen.pictures
