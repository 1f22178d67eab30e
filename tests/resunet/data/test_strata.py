from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resunet.data.cases import Case
from resunet.data.strata import read_strata


def case(group: str, mask: Path) -> Case:
    return Case(id="id", group="x", group_hmac="x", group_name=group, part=None, files=(), mask=mask)


@pytest.fixture
def mask(tmp_path):
    """A mask of 32 × 32 with as many pixels of each value as asked for, the rest 0."""
    made = []

    def make(**pixels: int) -> Path:
        values = np.zeros(1024, np.uint8)
        start = 0
        for value, count in pixels.items():
            values[start : start + count] = int(value.removeprefix("v"))
            start += count
        made.append(tmp_path / f"{len(made)}.png")
        Image.fromarray(values.reshape(32, 32)).save(made[-1])
        return made[-1]

    return make


def test_a_stratum_is_the_values_and_how_much_of_the_mask_is_labelled(mask):
    groups = {
        "empty": mask(),
        "all": mask(v255=1024),
        "quarter": mask(v1=256),
        "below": mask(v1=255),
        "one": mask(v1=1),
        "two classes": mask(v1=100, v2=156),
    }
    assert read_strata([case(group, path) for group, path in groups.items()]) == {
        "empty": "0",
        "all": "255, at least 1/1 not 0",
        "quarter": "0 1, at least 1/4 not 0",
        "below": "0 1, at least 1/16 not 0",
        "one": "0 1, at least 1/1024 not 0",
        "two classes": "0 1 2, at least 1/4 not 0",
    }


def test_the_masks_of_a_group_count_together(mask):
    cases = [case("a", mask(v1=256)), case("b", mask()), case("a", mask(v2=1)), case("b", mask())]
    together = read_strata(cases)
    assert together == {"a": "0 1 2, at least 1/16 not 0", "b": "0"}
    # what a group is does not depend on the others, nor on the order
    assert read_strata(cases[::-1]) == together and read_strata([cases[0], cases[2]]) == {"a": together["a"]}
