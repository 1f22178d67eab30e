import pytest

from resunet.data.listing import complain, read_groups, read_positions
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


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a,p,0.25\nb,p,1\nc,p,\nd,q,0\n", {"a": 0.25, "b": 1, "d": 0}),  # places, as they are; one is not known
        ("a,p,7\nb,p,3\nc,p,4\nd,q,0\ne,q,1\n", {"a": 1, "b": 0, "c": 0.25, "d": 0, "e": 1}),  # numbers, group by group
        ("a,p,7\nb,p,7\nc,q,1\n", {}),  # numbers of one slice: of what volume is not known
        ("a,p\nb,p,5\nc,p,6\n", {"b": 0, "c": 1}),  # a short row
    ],
)
def test_places_of_slices(tmp_path, rows, expected):
    (tmp_path / "groups.csv").write_text("stem,group,position\n" + rows)
    assert read_positions(tmp_path / "groups.csv") == expected
    assert read_groups(tmp_path / "groups.csv").keys() == {row[0] for row in rows.split()}


def test_without_a_column_or_a_file_no_place_is_known(tmp_path):
    (tmp_path / "groups.csv").write_text("stem,group\na,p\n")
    assert read_positions(tmp_path / "groups.csv") == read_positions(tmp_path / "none.csv") == {}


@pytest.mark.parametrize("wrong", ["x", "-1", "-0.5", "nan", "inf"])
def test_places_that_are_none(tmp_path, wrong):
    (tmp_path / "groups.csv").write_text(f"stem,group,position\na,p,0.5\nb,p,{wrong}\n")
    with pytest.raises(InputError, match=rf"groups\.csv: 1 rows whose position is no number from 0 on: b \({wrong}\)\. Give"):
        read_positions(tmp_path / "groups.csv")


def test_numbers_of_slices_and_places_are_not_mixed(tmp_path):
    (tmp_path / "groups.csv").write_text("stem,group,position\na,p,0.5\nb,p,12\n")
    with pytest.raises(InputError, match=r"numbers of slices, as of b \(12\), and places between 0 and 1, as of a \(0\.5\)"):
        read_positions(tmp_path / "groups.csv")
