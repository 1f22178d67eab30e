"""Before pretraining: a page of views, and a plan."""

import numpy as np
import pytest
import tifffile
from accelerate import Accelerator
from PIL import Image

from pretrain.archive import read_archive
from pretrain.example_views import examples, resized
from pretrain.loader import ContrastiveSets
from pretrain.planning.page import page
from pretrain.planning.plan import make_plan
from pretrain.planning.show import show_views
from pretrain.step import views_of_set
from resunet.errors import InputError


def test_the_views_shown_are_those_of_the_run(recipe):
    """Of a part of the set only, and bit for bit, in grey levels of the scan."""
    ours = recipe(batch=8, views={"size": 12})
    accelerator = Accelerator(cpu=True)
    scans = read_archive(ours, accelerator).scans
    whole = ContrastiveSets(scans, ours, 0)
    wanted = views_of_set(ours, whole.read(0), 0, accelerator)
    part = ContrastiveSets(scans, ours.model_copy(update={"processes": 2}), 0)
    shown = list(examples(ours, part, accelerator))
    assert len(shown) == 4
    for i, one in enumerate(shown):
        window = whole.read(0).windows[i, 0, : one.size[0], : one.size[1]].numpy()
        low, high = window.min(), window.max()
        assert np.allclose(one.window, (window - low) / (high - low), atol=1e-6)
        for view, its in zip(one.views, (wanted[i, 0], wanted[8 + i, 0]), strict=True):
            assert np.allclose(view, ((its.numpy() - low) / (high - low)).clip(0, 1), atol=1e-6)


def test_colours_stay_colours(recipe, archive):
    for path in archive.glob("*.png"):
        path.unlink()
    rng = np.random.default_rng(0)
    for i in range(4):
        red = rng.integers(0, 65535, (20, 20), dtype=np.uint16)
        tifffile.imwrite(archive / f"{i}.tif", np.stack([red, red // 2 + 99, red * 0], axis=-1), photometric="rgb")
    ours = recipe(data={"channels": "rgb"})
    accelerator = Accelerator(cpu=True)
    sets = ContrastiveSets(read_archive(ours, accelerator).scans, ours, 0)
    for one in examples(ours, sets, accelerator):
        assert one.window.shape == (20, 20, 3) and one.views[0].shape == (12, 12, 3)
        assert one.window[..., 0].max() == 1 and one.window[..., 0].min() == 0 and one.window[..., 2].max() == 0
        assert np.allclose(one.window[..., 0], one.window[..., 1], atol=1e-3)


def test_resizing_keeps_proportions():
    picture = np.zeros((4, 8), np.float32)
    fitted = resized(picture, (16, 16))
    assert (fitted == 0).sum() == 8 * 16 and (fitted[:4] == 1).all() and (fitted[12:] == 1).all()
    assert resized(np.zeros((40, 80, 3), np.float32), (16, 16)).shape == (16, 16, 3)


def test_a_page_of_views(recipe, tmp_path):
    out = tmp_path / "pages" / "views.png"
    assert show_views(recipe(processes=2, batch=8), out) == out
    pixels = np.asarray(Image.open(out))
    assert (pixels[:20] == 255).all() and (pixels[:, :20] == 255).all() and (pixels[-20:] == 255).all()
    assert len(np.unique(pixels)) > 50 and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"exists already\. Name another file"):
        show_views(recipe(), out)


def test_a_plan(recipe, archive, tmp_path):
    (archive / "groups.csv").write_text(
        "stem,group\n" + "".join(f"scan{i:02},{'a' if i < 5 else 'b'}\n" for i in range(9)), encoding="utf-8"
    )
    Image.fromarray(np.full((20, 20), 3, np.uint8)).save(archive / "scan99.png")
    with (archive / "groups.csv").open("a", encoding="utf-8") as file:
        file.write("scan99,a\n")
    ours = recipe(steps=18, processes=2, batch=4, views={"size": 24, "window": 26}, keep_checkpoints=3)
    plan = make_plan(ours)
    text = page(plan)
    assert "10 scans of 2 groups, 9 slices with contrast, 1 without, which are left out" in text
    assert "10 of y × x: median 23.5 × 23.5 pixels, from 20 × 20 to 28 × 28" in text
    assert "8 epochs: so often each of 9 slices" in text
    assert "none of theirs is in the archive" in text and "channels: 1 (10)" in text
    larger = sum(max(20 + i, 28 - i) > 26 for i in range(9))
    smaller = sum(min(20 + i, 28 - i) < 24 for i in range(9)) + 1
    assert f"{larger} of 10 larger than views.window (26 × 26)" in text
    assert f"{smaller} of 10 smaller than a view (24 × 24)" in text
    assert "batch=4 is larger than the number of groups, 2" in text and "objective.same_group=ignore" in text
    assert "2 ranks" in text and "batch norm over 2 ranks" in text
    assert plan.cost.step > 0 and plan.cost.checkpoint > 4 * 3 * sum(plan.cost.parameters) and plan.cost.memory > 2**26
    assert not (tmp_path / "run").exists()


def test_a_plan_finds_what_is_held_out_and_does_not_stop(recipe, archive, tmp_path):
    held_out = tmp_path / "elsewhere"
    held_out.mkdir()
    (held_out / "copy.png").write_bytes((archive / "scan03.png").read_bytes())
    text = page(make_plan(recipe(data={"held_out": str(held_out)})))
    assert "there are images of theirs in the archive" in text and "the run will stop and list them" in text


def test_a_plan_is_of_one_process(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="run in one process, and speak for the recipe's `processes`"):
        make_plan(recipe(processes=2))
    with pytest.raises(InputError, match="without accelerate"):
        show_views(recipe(processes=2), tmp_path / "x.png")
