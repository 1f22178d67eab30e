import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy import ndimage

from finetune.labelled import resolve
from finetune.planning.cautions import geometry_warnings, refuse_other_sizes, warnings_of
from finetune.planning.facts import part_facts
from finetune.planning.geometry import compare_geometry
from finetune.planning.page import page, write_recipe
from finetune.planning.plan import Choice, apply, choose_validate_every, make_plan, recommend
from finetune.planning.timing import Cost
from finetune.recipe import FinetuneRecipe
from resunet.config import load_recipe
from resunet.data.cases import IGNORE, Case, LoadedCase
from resunet.data.perceptual import look
from resunet.errors import InputError
from resunet.runtime import percentile_intensity

NAMES = ["lesion", "core"]


def case(labels, spacing=None, values=None, group="g", path="x.png", known=True) -> LoadedCase:
    labels = np.asarray(labels, np.uint8)
    values = np.random.default_rng(0).normal(size=labels.shape) if values is None else np.asarray(values)
    spacing = spacing or (1.0,) * labels.ndim
    ours = Case("id", group, group, group, "pool", (path,), path, spacing=spacing if known else None)
    intensities = percentile_intensity(values[None], 0.5, 99.5)
    return LoadedCase(ours, values[None], spacing, intensities, labels, "f", "p", look(values[None]), in_mm=known)


def squares(*places: tuple[int, int, int, int], size: int = 40) -> np.ndarray:
    """Label map with squares (y, x, side, class)."""
    labels = np.zeros((size, size), np.uint8)
    for y, x, side, value in places:
        labels[y : y + side, x : x + side] = value
    return labels


def test_objects_and_shares_are_those_of_an_independent_count() -> None:
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, 2, IGNORE], (3, 30, 30), p=[0.9, 0.04, 0.04, 0.02]).astype(np.uint8)
    facts = part_facts("train", [case(labels, (5.0, 2.0, 0.5))], 3)
    assert facts.in_mm and facts.cases[0].plane == (30, 30) and facts.cases[0].slices == 3
    for index in (0, 1):
        found, count = ndimage.label(labels == index + 1, np.ones((3, 3, 3)))
        sizes = np.sort(np.bincount(found.ravel())[1:])
        assert facts.object_pixels(index).tolist() == sizes.tolist() and facts.object_counts(index).tolist() == [count]
        assert facts.object_volumes(index) == pytest.approx(sizes * 5.0)
        assert facts.share(index) == pytest.approx((labels == index + 1).sum() / (labels != IGNORE).sum())
    (inside,) = {one.slices_with_foreground for one in facts.cases}
    assert inside == sum(np.isin(labels[z], (1, 2)).any() for z in range(3))


def test_pixels_beyond_the_clip_are_counted_by_class() -> None:
    labels = squares((2, 2, 1, 1), (10, 10, 2, 2))
    values = np.random.default_rng(0).uniform(0, 1, labels.shape)
    values[labels == 1] = 50  # 1 pixel of 1600 above the 99.5th percentile
    values[labels == 2] = 0.5
    facts = part_facts("train", [case(labels, values=values)], 3)
    assert (facts.beyond(0, "above"), facts.beyond(1, "above"), facts.beyond(0, "below")) == (1, 0, 0)
    assert facts.beyond(0, "clipped") == 1


def test_spacing_is_not_made_up(tmp_path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    facts = part_facts("train", [case(squares((2, 2, 3, 1)), path=tmp_path / "a.png", known=False)], 2)
    assert not facts.in_mm and len(facts.object_volumes(0)) == 0 and len(facts.object_pixels(0)) == 1


def of_key(choices: list[Choice], key: str) -> Choice:
    return next(choice for choice in choices if choice.key == key)


def test_the_patch_is_the_median_slice_in_strides(recipe) -> None:
    ours = resolve(recipe(patch=[32, 32], model={"channels": [4, 8, 8, 8, 8]}))
    sizes = [(100, 41), (100, 41), (500, 500)]
    facts = part_facts("train", [case(np.ones(size), known=True) for size in sizes], 2)
    assert of_key(recommend(ours, facts, ["a"], 1.0, "cpu", "fp32"), "patch").value == (96, 48)  # 100 → 96, 41 → 48
    large = part_facts("train", [case(np.ones((20, 900)))], 2)
    choices = recommend(ours, large, ["a"], 1.0, "cpu", "fp32")
    assert of_key(choices, "patch").value == (32, 256)  # two strides at least, 256 on a CPU at most
    assert of_key(choices, "batch").value == 16  # 2**17 pixels
    assert of_key(recommend(ours.model_copy(update={"processes": 3}), large, ["a"], 1.0, "cpu", "fp32"), "batch").value == 15


def test_bright_small_objects_open_the_clip(recipe) -> None:
    labels = squares((2, 2, 2, 1))
    bright = np.random.default_rng(0).uniform(0, 1, labels.shape) + 9 * labels
    ours = resolve(recipe())
    high = {}
    for name, values in (("bright", bright), ("dark", -bright), ("same", None)):
        choices = recommend(ours, part_facts("train", [case(labels, values=values)], 2), ["lesion"], 1.0, "cpu", "fp32")
        high[name] = (of_key(choices, "normalisation.low").value, of_key(choices, "normalisation.high").value)
    assert high == {"bright": (0.5, 100), "dark": (0, 99.5), "same": (0.5, 99.5)}
    assert apply(ours, choices).normalisation == ours.normalisation


def test_rare_foreground_is_sampled_more(recipe) -> None:
    facts = part_facts("train", [case(squares((2, 2, 2, 1)))], 2)
    for share, value in ((0.2, 0.5), (0.5, 0.33)):
        choice = of_key(recommend(resolve(recipe()), facts, ["a"], share, "cpu", "fp32"), "foreground")
        assert choice.value == value and f"{share:.0%}" in choice.reason


def test_validation_takes_a_fifth_of_the_time_at_most(recipe) -> None:
    ours = recipe(steps=1000)
    cost = Cost(step=1.0, steps_measured=5, case_slice=1.0, statistics=0.0, memory=1, device="cpu", busy=0)
    assert choose_validate_every(ours, cost, validation=0.1).value == 50
    slow = choose_validate_every(ours, cost, validation=100.0).value
    assert 100 / (100 + slow) == pytest.approx(0.2)


def three(train, val, test):
    return [part_facts(name, cases, 3) for name, cases in (("train", train), ("val", val), ("test", test))]


def test_warnings_are_given_and_only_where_they_hold(recipe) -> None:
    ours = resolve(recipe(batch=8))
    both = [case(squares((2, 2, 8, 1), (20, 20, 8, 2))) for _ in range(6)]
    assert warnings_of(ours, True, three(both, both, both), NAMES) == []
    only = [case(squares((2, 2, 8, 1))) for _ in range(6)]
    absent = warnings_of(ours, True, three(both, only, []), NAMES)
    assert len(absent) == 1 and "'core' is in none of the 6 val cases" in absent[0]
    large = [case(squares((2, 2, 16, 1), (20, 20, 8, 2))) for _ in range(6)]
    unlike = warnings_of(ours, True, three(both, both, large), NAMES)
    assert len(unlike) == 1 and "'lesion' is 4.00% of the pixels of train and 16.00% of test" in unlike[0]
    specks = [*both[1:], case(squares((2, 2, 8, 1), (30, 2, 2, 1), (20, 20, 8, 2)))]
    assert (
        "1 of 7 objects of 'lesion' have fewer than 10 pixels, the smallest 4"
        in warnings_of(ours, True, three(specks, both, []), NAMES)[0]
    )
    assert "groups.csv" in warnings_of(ours, False, three(both, both, []), NAMES)[0]
    noise = warnings_of(ours.model_copy(update={"processes": 4}), True, three(both, both, []), NAMES)
    assert len(noise) == 1 and "batch norm 2 patches" in noise[0]


def test_objects_that_coarse_scans_cannot_show(recipe) -> None:
    labels = squares((2, 2, 4, 1), (20, 20, 8, 2))  # 4 pixels of 0.5 mm: a disc 2.26 mm wide
    fine, coarse = case(labels, (0.5, 0.5)), case(squares((2, 2, 8, 1), (20, 20, 8, 2)), (3.0, 3.0))
    one, lost = warnings_of(resolve(recipe(batch=8)), True, three([fine], [coarse], []), NAMES)
    assert "from 0.5 to 3 mm" in one and "6.0 times" in one
    assert "'lesion' is about 2.26 mm wide, less than a pixel of 3 mm" in lost
    middle = case(labels, (2.0, 2.0))
    assert (
        len(warnings_of(resolve(recipe(batch=8)), True, three([fine], [middle], []), NAMES)) == 1
    )  # 2.26 mm is more than a pixel


def test_constants_that_clip_a_class_are_told(recipe, encoder) -> None:
    fixed = {"kind": "fixed", "low": 0, "high": 1, "mean": 0, "std": 1}
    labels = squares((2, 2, 8, 1), (20, 20, 8, 2))
    kept = case(labels, values=np.where(labels == 1, 5.0, 0.5))
    kept = replace(kept, intensities=[replace(kept.intensities[0], low=0, high=1)])
    facts = three([kept], [kept], [])
    (warning,) = warnings_of(resolve(recipe(batch=8, normalisation=fixed)), True, facts, NAMES)
    assert "100% of the pixels of 'lesion' lie beyond the limits of the recipe's constants" in warning
    (warning,) = warnings_of(resolve(recipe(batch=8, encoder=str(encoder))), True, facts, NAMES)
    assert "the encoder's normalisation" in warning
    assert {choice.key for choice in recommend(resolve(recipe(encoder=str(encoder))), facts[0], NAMES, 1, "cpu", "fp32")} == {
        "patch", "batch", "foreground", "precision"
    }  # fmt: skip


def pair(folder, name: str, affine=None, mask_affine=None, mask_size=(6, 5, 4)) -> Case:
    affine = np.diag([-2.0, -2.0, 3.0, 1.0]) if affine is None else affine
    paths = folder / f"{name}.nii.gz", folder / f"{name}-mask.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 4), np.uint8), affine), paths[0])
    nibabel.save(nibabel.Nifti1Image(np.zeros(mask_size, np.uint8), affine if mask_affine is None else mask_affine), paths[1])
    return Case(name, name, name, name, "pool", (paths[0],), paths[1])


def test_geometry_that_differs_is_told_with_its_numbers(tmp_path) -> None:
    base = np.diag([-2.0, -2.0, 3.0, 1.0])
    moved, wider, turned = base.copy(), np.diag([-2.0, -2.5, 3.0, 1.0]), base.copy()
    moved[:3, 3] = (3, -4, 0)
    c, s = np.cos(np.radians(10)), np.sin(np.radians(10))
    turned[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ base[:3, :3]
    cases = [pair(tmp_path, "same"), pair(tmp_path, "origin", mask_affine=moved)]
    cases += [pair(tmp_path, "spacing", mask_affine=wider), pair(tmp_path, "direction", mask_affine=turned)]
    nearly = base.copy()
    nearly[:3, 3] = 1e-3  # rounding of a header
    cases += [pair(tmp_path, "nearly", mask_affine=nearly), pair(tmp_path, "size", mask_size=(6, 5, 3))]
    mismatches, compared = compare_geometry(cases)
    assert compared == 6
    assert {one.case.id: one.what for one in mismatches} == {
        name: (name,) for name in ("origin", "spacing", "direction", "size")
    }
    message = {one.case.id: one.message for one in mismatches}
    assert (
        "mask (-3, 4, 0) mm (LPS), 5 mm apart" in message["origin"]
        and "(2, 2, 3) mm, mask (2, 2.5, 3) mm" in message["spacing"]
    )
    assert "(10, 10, 0) degrees apart" in message["direction"]
    assert "3 masks do not lie where their image lies" in geometry_warnings(mismatches)[0]
    with pytest.raises(InputError, match=r"1 masks have another size.*\n.*image \(6, 5, 4\), mask \(6, 5, 3\)"):
        refuse_other_sizes(mismatches)
    refuse_other_sizes([one for one in mismatches if one.case.id != "size"])


def test_geometry_is_compared_across_formats(tmp_path) -> None:
    """NIfTI's RAS and MetaImage's LPS headers of one grid are the same grid."""
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.uint8))
    image.SetSpacing((1, 2, 3))
    image.SetOrigin((7, -8, 9))
    angle = np.radians(20)
    image.SetDirection((np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1))
    sitk.WriteImage(image, tmp_path / "a.mha")
    sitk.WriteImage(image, tmp_path / "a.nii.gz")
    ours = Case("a", "a", "a", "a", "pool", (tmp_path / "a.mha",), tmp_path / "a.nii.gz")
    assert compare_geometry([ours]) == ([], 1)
    image.SetOrigin((7, 8, 9))
    sitk.WriteImage(image, tmp_path / "a.nii.gz")
    assert [one.what for one in compare_geometry([ours])[0]] == [("origin",)]


def test_a_plan_of_the_embedded_source(recipe, tmp_path) -> None:
    ours = recipe(patch=[8, 8], steps=40)
    plan = make_plan(ours)
    assert [len(part.cases) for part in plan.parts] == [6, 3, 6] and [len(part.groups) for part in plan.parts] == [5, 3, 6]
    assert plan.cost.step > 0 and plan.cost.memory > 2**20 and not ours.out.exists()
    assert plan.recipe.patch == (24, 24) and plan.recipe.steps == 40
    truth = [np.asarray(Image.open(path)) > 0 for path in (ours.data.source / "masks").glob("c0[0-4]*.png")]
    assert plan.parts[0].share(0) == pytest.approx(np.mean(truth))
    text = page(plan)
    for words in ("patch: [8, 8] → [24, 24]", "s a step", "lesion", "24 × 24 pixels", "do not say their spacing", "None."):
        assert words in text
    path = tmp_path / "planned.yaml"
    write_recipe(plan, path)
    assert load_recipe(FinetuneRecipe, "finetune", str(path)) == plan.recipe
    assert "# the median slice is 24 × 24 pixels" in path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        write_recipe(plan, path)
    changes = {"classes": {0: "yes", 255: "a: #1 'ü'", 7: "null"}, "ignore": [9]}
    awkward = resolve(recipe(data=changes, optimizer={"lr": 1e-5, "weight_decay": 0}, name="out put: 1", allow=["leak"]))
    write_recipe(replace(plan, recipe=awkward), tmp_path / "awkward.yaml")
    assert load_recipe(FinetuneRecipe, "finetune", str(tmp_path / "awkward.yaml")) == awkward
    with pytest.raises(InputError, match=r"\.yaml"):
        write_recipe(plan, tmp_path / "planned")


def test_a_leak_is_a_warning_of_the_plan(recipe, source) -> None:
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    stem = splits["test"][0]
    for folder in ("images", "masks"):
        (source / folder / "c08a.png").write_bytes((source / folder / f"{splits['pool'][0]}.png").read_bytes())
    assert stem == "c08a"
    plan = make_plan(recipe())
    assert len(plan.warnings) == 1 and "1 test cases are among the labelled training cases" in plan.warnings[0]
    assert "training will stop" in plan.warnings[0] and plan.recipe.allow == ()
