import json
from dataclasses import dataclass, replace

import pytest

from finetune.comparison.arms import read_arm
from finetune.comparison.compare import compare
from finetune.comparison.online import of_api, of_folder, runs_of_group, write_comparison
from finetune.loop import finetune
from finetune.mirrored import case_columns_of
from resunet.errors import EnvironmentFault, InputError

pytestmark = pytest.mark.filterwarnings("default")  # wandb's own


@dataclass(frozen=True)
class Uploaded:
    """A run as wandb.Api would give it after `wandb sync`: what its offline file holds."""

    name: str
    config: dict
    summary: dict
    lines: list

    def scan_history(self):
        return self.lines


@pytest.fixture
def uploaded(recipe, source, offline, read_mirror):
    """Two runs, here and as W&B knows them."""
    folders, runs = [], []
    for name, changes in (("first", dict(steps=4)), ("second", dict(steps=2, seed=1))):
        folders.append(finetune(recipe(name=name, wandb=offline | {"name": name}, **changes)))
        mirrored = read_mirror(folders[-1])
        runs.append(Uploaded(mirrored.run().display_name, mirrored.config(), mirrored.summary(), mirrored.history()))
    return folders, runs


def test_what_wandb_holds_gives_the_comparison_that_the_runs_give(uploaded, tmp_path):
    folders, runs = uploaded
    online = write_comparison(of_api(runs), "entity/project/group", tmp_path / "online")
    here = compare(folders, tmp_path / "here")
    told, wanted = (json.loads((out / "compare.json").read_text(encoding="utf-8")) for out in (online, here))
    assert told["runs"] == wanted["runs"] == ["first", "second"]
    (ours,), (theirs,) = (record["paired_dice_difference"].values() for record in (told, wanted))
    assert ours["mean"] == pytest.approx(theirs["mean"]) != 0 and ours["ci95"] == pytest.approx(theirs["ci95"])
    for name in told["runs"]:
        assert told["dice"][name]["mean"] == pytest.approx(wanted["dice"][name]["mean"])
        assert told["dice"][name]["ci95"] == pytest.approx(wanted["dice"][name]["ci95"])
    page = (online / "report.html").read_text(encoding="utf-8")
    for words in ("entity/project/group", "Dice of the val scans by step", "Training loss by step", "seed", "surface_dice"):
        assert words in page, words
    for private in (str(tmp_path), "c08a", "patient8"):
        assert private not in page


def test_a_run_here_is_beside_one_of_wandb(uploaded, tmp_path):
    folders, runs = uploaded
    mine, theirs = of_folder(folders[0], "here"), of_api(runs[:1])[0]
    assert (mine.scores, mine.groups, mine.test) == (theirs.scores, theirs.groups, theirs.test)
    assert mine.figures == pytest.approx(theirs.figures) and mine.curves["loss"] == theirs.curves["loss"]
    out = write_comparison([mine, theirs], "entity/project/group", tmp_path / "out")
    (difference,) = json.loads((out / "compare.json").read_text(encoding="utf-8"))["paired_dice_difference"].values()
    assert difference["mean"] == 0 and difference["n"] == len(set(read_arm(folders[0], "here").groups.values()))


def test_other_cases_other_classes_and_too_few_are_refused(uploaded, tmp_path):
    _, runs = uploaded
    first, second = of_api(runs)
    moved = Uploaded("moved", runs[1].config | {"inputs": {"test": "ab" * 32}}, runs[1].summary, [])
    with pytest.raises(InputError, match="first and moved were evaluated on different test cases: 6 with sha256"):
        write_comparison([first, *of_api([moved])], "e/p/g", tmp_path / "out")
    data = runs[1].config["data"] | {"classes": {"0": "background", "255": "tumour"}}
    renamed = Uploaded("renamed", runs[1].config | {"data": data}, runs[1].summary, [])
    with pytest.raises(InputError, match=r"Compare runs of the same data\.classes"):
        write_comparison([first, *of_api([renamed])], "e/p/g", tmp_path / "out")
    unfinished = Uploaded("unfinished", runs[1].config, {"loss": 1.0}, [])
    with pytest.raises(InputError, match="--wandb e/p/g: 1 runs with test cases were found, two are needed"):
        write_comparison(of_api([runs[0], unfinished]), "e/p/g", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    twice = write_comparison([first, second, *of_api([runs[0]])], "e/p/g", tmp_path / "twice")
    assert json.loads((twice / "compare.json").read_text(encoding="utf-8"))["runs"] == ["first", "second", "first-2"]


def test_cases_that_have_other_numbers_are_not_paired(uploaded, tmp_path):
    """Numbers are counted in the order of ids, which another salt makes another; a group may be called after a path."""
    folders, runs = uploaded
    first, second = of_api(runs)
    for order in ("ab" * 32, ""):
        with pytest.raises(InputError, match="which test case of one is which of the other is not known"):
            write_comparison([first, replace(second, order=order)], "e/p/g", tmp_path / "out")
        with pytest.raises(InputError, match="which test case of one is which of the other is not known"):
            write_comparison([replace(first, order=""), replace(second, order="")], "e/p/g", tmp_path / "out")
    grouped = replace(second, groups=second.groups | {"0": "5"})
    with pytest.raises(InputError, match="group the same test cases otherwise"):
        write_comparison([first, grouped], "e/p/g", tmp_path / "out")

    arm = read_arm(folders[0], "here")
    rows = [(case, arm.groups[case], its, dice) for (case, its), dice in arm.scores.items()]
    elsewhere = {group: f"{hash(group)}" for group in arm.groups.values()}
    moved = [(case, elsewhere[group], its, dice) for case, group, its, dice in rows]
    assert case_columns_of(rows, arm.groups) == case_columns_of(moved, {c: elsewhere[g] for c, g in arm.groups.items()})


@pytest.mark.parametrize("group", ["project/group", "a//c", "a/b/c/d", ""])
def test_a_group_that_cannot_be_one_is_refused(group):
    with pytest.raises(InputError, match="ENTITY/PROJECT/GROUP"):
        runs_of_group(group)


def test_without_a_server_one_message(offline, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(EnvironmentFault, match="--wandb a/b/c: W&B cannot be asked"):
        runs_of_group("a/b/c")
