import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.probe.scans import ProbeScan, read_probe_scans
from resunet.data.images import read_mask
from resunet.data.source import open_source
from resunet.data.splits import draw_groups
from resunet.errors import InputError


def scans_of(recipe):
    return read_probe_scans(recipe, recipe.probe, 2)


def groups_of(recipe, found) -> set[str]:
    named = {case.group_hmac: case.group_name for case in open_source(recipe.data, masks=True).cases}
    return {named[group] for group in found.labels.groups}


def test_groups_with_all_classes_come_first_in_the_order_of_the_draw(probed):
    for draw in range(4):
        recipe = probed(probe={"draw": draw})
        order = draw_groups([f"patient-{group}" for group in "abcde"], None, draw)
        wanted = [group for group in order if group[-1] in "bde"][:2]
        assert groups_of(recipe, scans_of(recipe)) == set(wanted)


def test_where_too_few_have_all_classes_those_that_share_most_are_taken(probed, labelled):
    for name in ("d0", "d1", "e0", "e1"):  # then only b has both classes
        path = labelled / "masks" / f"{name}.png"
        mask = read_mask(path).values.copy()
        mask[mask == (255 if name[0] == "d" else 7)] = 0
        Image.fromarray(mask).save(path)
    order = draw_groups([f"patient-{group}" for group in "abcde"], None, 0)
    # b shows both; of the others one with the dark class makes two of it, and one with the bright one two of that
    bright = min(("patient-a", "patient-e"), key=order.index)
    recipe = probed(probe={"groups": 3})
    assert groups_of(recipe, scans_of(recipe)) == {"patient-b", "patient-d", bright}


def test_scans_are_normalised_with_their_labels_and_their_evidence(probed):
    recipe = probed()
    found = scans_of(recipe)
    assert len(found.scans) == 4 and [scan.fold for scan in found.scans] == [0, 0, 1, 1]
    assert all(scan.values.shape == (1, 24, 24) and set(np.unique(scan.labels)) == {0, 1, 2} for scan in found.scans)
    for scan in found.scans:
        means = [scan.values[0][scan.labels == label].mean() for label in range(3)]
        assert means[2] < means[0] < means[1] and abs(scan.values.mean()) < 0.1
    assert len(found.evidence) == 4 and set(found.evidence.table.column("group").to_pylist()) == set(found.labels.groups)
    assert found.evidence.thumbnail is None and found.told_apart() == [1, 2]


def test_of_one_group_the_slices_are_left_out_in_blocks(probed):
    found = scans_of(probed(probe={"groups": 1}))
    assert [scan.fold for scan in found.scans] == [0, 1]


def test_what_cannot_be_probed_says_why(probed, labelled):
    with pytest.raises(InputError, match=r"probe\.groups=3: the pool of its source has 2 labelled groups"):
        stems = {"pool": ["a0", "b0"], "val": ["v0"], "test": ["t0"]}
        (labelled / "splits.json").write_text(json.dumps(stems), encoding="utf-8")
        scans_of(probed(probe={"groups": 3}))
    with pytest.raises(InputError, match=r"probe\.groups=1: its group is one image"):
        scans_of(probed(probe={"groups": 1}))
    with pytest.raises(InputError, match=r"no foreground class occurs in two of the 2 groups"):
        (labelled / "splits.json").write_text(json.dumps(stems | {"pool": ["c0", "c1", "a0"]}), encoding="utf-8")
        scans_of(probed())
    with pytest.raises(InputError, match=r"data\.classes does not list"):
        scans_of(probed(probe={"classes": {0: "background", 7: "dark"}}))
    with pytest.raises(InputError, match="image of two dimensions"):
        read_probe_scans(recipe := probed(probe={"groups": 2}), recipe.probe, 3)


def test_a_source_of_its_own(probed, archive):
    recipe = probed(data={"source": str(archive)})
    with pytest.raises(InputError, match="mask"):
        scans_of(recipe)
    own = probed(data={"source": str(archive)}, probe={"source": str(Path(recipe.out).parent / "labelled")})
    assert len(scans_of(own).scans) == 4


def test_a_lattice_is_even_and_has_about_the_number():
    scan = ProbeScan(np.zeros((1, 40, 60), np.float32), np.zeros((40, 60), np.uint8), 0)
    assert scan.lattice(10**6).shape == (40, 60, 2)
    assert (scan.lattice(10**6)[3, 7] == [3, 7]).all()
    few = scan.lattice(24)
    assert few.shape == (4, 6, 2) and set(np.diff(few[:, 0, 0])) == {10} and few[0, 0].tolist() == [5, 5]


def test_a_large_slice_is_cut_to_what_is_around_its_foreground(probed, labelled):
    for name in ("d0", "d1", "e0", "e1", "b0", "b1"):
        pixels, mask = np.zeros((30, 900), np.uint8), np.zeros((30, 900), np.uint8)
        mask[5:15, 800:820], mask[16:20, 800:820], pixels[::2] = 255, 7, 200
        Image.fromarray(pixels).save(labelled / "images" / f"{name}.png")
        Image.fromarray(mask).save(labelled / "masks" / f"{name}.png")
    for scan in scans_of(probed()).scans:
        assert scan.labels.shape == (30, 512) and (scan.labels == 1).sum() == 200 and (scan.labels == 2).sum() == 80
