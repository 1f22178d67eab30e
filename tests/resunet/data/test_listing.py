import pytest

from resunet.data.listing import complain, read_groups
from resunet.errors import InputError


def test_groups_are_read_by_stem(tmp_path):
    (tmp_path / "groups.csv").write_text("stem,group,note\na,p,1\nb,q,2\nc,p,3\n")
    assert read_groups(tmp_path / "groups.csv", ["a", "c"]) == {"a": "p", "b": "q", "c": "p"}
    assert read_groups(tmp_path / "none.csv", ["a"]) == {}
    with pytest.raises(InputError, match=r"groups\.csv: 1 images without a row: z\."):
        read_groups(tmp_path / "groups.csv", ["a", "z"])


def test_a_complaint_counts_all_and_names_some(tmp_path):
    complain(tmp_path, "of them", [], "Do it.")
    with pytest.raises(InputError, match=r"6 of them: a, b, c, d, e, …\. Do it\.$"):
        complain(tmp_path, "of them", list("abcdef"), "Do it.")
