from types import SimpleNamespace

from resunet.progress import progress


def test_progress_is_a_line_at_each_tenth_of_a_log(capsys, monkeypatch):
    assert list(progress(range(25), 25, "work")) == list(range(25))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work 2/25" and lines[-1] == "work 25/25" and len(lines) == 13
    assert list(progress(range(3), 20, "work", start=17)) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == ["work 18/20", "work 20/20"]
    monkeypatch.setattr("resunet.progress.time", SimpleNamespace(monotonic=iter(range(0, 10**6, 250)).__next__))
    assert list(progress(range(100), 100, "slow")) == list(range(100))
    assert capsys.readouterr().err.splitlines()[:3] == [
        "slow 3/100, about 6.7 h left",
        "slow 6/100, about 6.5 h left",
        "slow 9/100, about 6.3 h left",
    ]
    assert list(progress("ab", 2, "work", quiet=True)) == ["a", "b"]
    assert capsys.readouterr().err == ""
