import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resunet.config import DataSettings, Recipe, WandbSettings
from resunet.errors import EnvironmentFault, InputError
from resunet.machine import git_commit, machine, versions
from resunet.runs import Run, check_out


class SmallRecipe(Recipe):
    data: DataSettings
    temperature: float = 0.2


def small_recipe(out: Path, **values) -> SmallRecipe:
    defaults = dict(steps=10, data=DataSettings(source=Path("/somewhere/secret_source")), wandb=WandbSettings(mode="disabled"))
    return SmallRecipe(out=out, **(defaults | values))


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(small_recipe(tmp_path / "run"), "pretrain", {"data": "a" * 64})


def record(run: Run) -> dict:
    return json.loads((run.folder / "run.json").read_text(encoding="utf-8"))


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_new_folder_is_fine(tmp_path):
    check_out(small_recipe(tmp_path / "new"))
    check_out(small_recipe(tmp_path / "new", resume=True))
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"exists already.*resume=true"):
        check_out(small_recipe(tmp_path))


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(InputError, match=r"not a run directory \(no config\.json\)"):
        check_out(small_recipe(tmp_path, resume=True))


def test_a_run_cannot_be_resumed_with_another_recipe(run):
    check_out(small_recipe(run.folder, resume=True))
    with pytest.raises(InputError) as error:
        check_out(small_recipe(run.folder, resume=True, temperature=0.5, seed=3))
    assert "\n  temperature: 0.2 then, 0.5 now" in str(error.value)
    assert "\n  seed: 0 then, 3 now" in str(error.value)
    assert "steps:" not in str(error.value)


def test_some_keys_are_free_on_resume(run):
    before = (run.folder / "config.json").read_bytes()
    check_out(small_recipe(run.folder, resume=True, log_every=3, checkpoint_every=5, wandb=WandbSettings()))
    assert (run.folder / "config.json").read_bytes() == before


def test_another_number_of_ranks_is_refused_on_resume(run):
    with pytest.raises(InputError, match=r"started with processes=1, not 2\. Set allow=\[ranks\]"):
        check_out(small_recipe(run.folder, resume=True, processes=2))
    named = small_recipe(run.folder, resume=True, processes=2, allow=("ranks",))
    check_out(named)
    of_before = record(run)
    assert of_before.pop("processes") == [1]
    (run.folder / "run.json").write_text(json.dumps(of_before))  # as an earlier version left it
    for _ in range(2):
        assert record(Run(named, "pretrain", {"data": "a" * 64}))["processes"] == [1, 2]
    check_out(small_recipe(run.folder, resume=True, allow=("ranks",)))
    with pytest.raises(InputError, match=r"another recipe:\n  processes: 1 then, 2 now\n  seed"):
        check_out(small_recipe(run.folder, resume=True, processes=2, allow=("ranks",), seed=1))
    with pytest.raises(InputError, match=r"\n  allow: \[\] then, \['leak'\] now"):
        check_out(small_recipe(run.folder, resume=True, allow=("leak", "ranks")))


def test_a_run_directory_may_move(run, tmp_path):
    run.folder.rename(tmp_path / "moved")
    check_out(small_recipe(tmp_path / "moved", resume=True))
    with pytest.raises(InputError, match="seed: 0 then, 1 now"):  # and is the same run there
        check_out(small_recipe(tmp_path / "moved", resume=True, seed=1))


def test_config_json_is_the_recipe_and_is_never_edited(run):
    text = (run.folder / "config.json").read_text(encoding="utf-8")
    assert SmallRecipe.model_validate_json(text) == small_recipe(run.folder)
    Run(small_recipe(run.folder, resume=True, log_every=7), "pretrain", {"data": "a" * 64})
    assert (run.folder / "config.json").read_text(encoding="utf-8") == text


def test_run_json_says_what_ran(run):
    found = record(run)
    assert {
        "schema_version",
        "stage",
        "seed",
        "versions",
        "machine",
        "git_commit",
        "inputs",
        "started",
        "status",
        "updated",
    } <= set(found)
    assert (found["stage"], found["seed"], found["status"]) == ("pretrain", 0, "running")
    assert found["inputs"] == {"data": "a" * 64}
    assert torch.__version__.startswith(found["versions"]["torch"])
    run.finish("done", seconds_per_step=0.5)
    assert (record(run)["status"], record(run)["seconds_per_step"]) == ("done", 0.5)


def test_a_resumed_run_keeps_its_start_and_its_facts(run):
    run.set_status("stopped", fact=1)
    path = run.folder / "run.json"
    path.write_text(json.dumps(record(run) | {"started": "long ago"}))
    again = Run(small_recipe(run.folder, resume=True), "pretrain", {"data": "a" * 64})
    assert (record(again)["started"], record(again)["fact"], record(again)["status"]) == ("long ago", 1, "running")


def test_a_run_is_not_resumed_on_other_data(run):
    before = record(run)
    with pytest.raises(InputError, match="inputs have changed since it was started: data"):
        Run(small_recipe(run.folder, resume=True), "pretrain", {"data": "b"})
    assert record(run) == before


def test_a_run_is_not_started_over_another(run):
    with pytest.raises(EnvironmentFault):
        Run(small_recipe(run.folder), "pretrain", {})


def test_other_ranks_write_nothing(tmp_path):
    run = Run(small_recipe(tmp_path / "run"), "pretrain", {}, writes=False)
    run.log(1, {"loss": 1.0})
    run.save_checkpoint(1, {"step": 1})
    run.rewind(0)
    run.finish("done")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_environments_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        Run(small_recipe(tmp_path / "file" / "run"), "pretrain", {})


def test_a_run_that_dies_as_it_begins_leaves_no_folder_behind(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        Run(small_recipe(tmp_path / "run"), "pretrain", {})
    assert not (tmp_path / "run").exists()
    check_out(small_recipe(tmp_path / "run", resume=True))


def test_metrics_are_a_line_each_and_can_be_rewound(run):
    for step in (10, 20, 30):
        run.log(step, {"loss": 1 / step})
    assert lines(run) == [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]
    run.rewind(20)
    assert [line["step"] for line in lines(run)] == [10, 20]
    run.log(30, {"loss": 9.0})
    assert lines(run)[-1] == {"step": 30, "loss": 9.0}
    run.rewind(0)
    assert lines(run) == []


def steps_kept(run: Run) -> set[str]:
    return {path.name for path in (run.folder / "checkpoints").iterdir() if not path.is_symlink()}


def test_the_last_two_checkpoints_and_the_best_are_kept(run):
    for step in (5, 10, 15, 20, 100):
        run.save_checkpoint(step, {"step": step}, best=step == 10)
    assert steps_kept(run) == {"step-10", "step-20", "step-100"}
    assert (run.folder / "checkpoints" / "last").readlink() == Path("step-100")
    assert (run.folder / "checkpoints" / "best").readlink() == Path("step-10")
    assert run.load_checkpoint("last") == {"step": 100}
    assert run.load_checkpoint("best") == {"step": 10}
    run.save_checkpoint(200, {"step": 200}, best=True)
    assert steps_kept(run) == {"step-100", "step-200"}
    assert run.load_checkpoint("best") == {"step": 200}


def test_what_a_kill_left_of_a_checkpoint_is_removed_on_resume(run):
    run.save_checkpoint(1, {"step": 1})
    (run.folder / "checkpoints" / ".step-2.0123").mkdir()
    Run(small_recipe(run.folder, resume=True), "pretrain", {"data": "a" * 64})
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["last", "step-1"]


def test_a_checkpoint_gives_back_what_was_saved(run):
    state = {
        "step": 3,
        "tensor": torch.randn(3, 4),
        "nested": {"none": None, "list": [1, 2.5, "x"], "half": torch.ones(2).bfloat16()},
    }
    run.save_checkpoint(3, state)
    loaded = run.load_checkpoint("last")
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert torch.equal(loaded["nested"].pop("half"), state["nested"].pop("half"))
    assert loaded == state


def test_there_may_be_no_checkpoint(run):
    assert run.load_checkpoint("last") is None
    run.save_checkpoint(1, {"step": 1})
    assert run.load_checkpoint("best") is None


class Unwritable:
    """What a full disk does in the middle of a checkpoint."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(run):
    run.save_checkpoint(1, {"step": 1}, best=True)
    with pytest.raises(EnvironmentFault, match=r"step-2.*No space left.*Those before it stand"):
        run.save_checkpoint(2, {"weights": torch.zeros(1000), "bad": Unwritable()}, best=True)
    assert run.load_checkpoint("last") == run.load_checkpoint("best") == {"step": 1}
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"step-1", "last", "best"}


def test_a_checkpoint_of_the_same_step_that_cannot_be_written_leaves_the_one_before(run):
    run.save_checkpoint(1, {"step": 1})
    with pytest.raises(EnvironmentFault):
        run.save_checkpoint(1, {"bad": Unwritable()})
    assert run.load_checkpoint("last") == {"step": 1}


def test_nothing_but_tensors_is_unpickled(run, tmp_path):
    run.save_checkpoint(1, {"step": 1})
    torch.save({"path": Path("x")}, run.folder / "checkpoints" / "last" / "state.pt")
    with pytest.raises(Exception, match="weights_only"):
        run.load_checkpoint("last")


def test_versions_and_machine_name_neither_host_nor_user():
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "unknown" not in versions().values()
    assert set(machine()) == {"system", "architecture", "cores", "threads", "gpus"}


def test_the_commit_is_that_of_the_checkout():
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, encoding="utf-8", check=False)
    assert git_commit() == (done.stdout.strip() or None)


def test_a_line_that_was_cut_short_does_not_stop_a_resume(run):
    run.log(1, {"loss": 1.0})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run.rewind(1)
    assert lines(run) == [{"step": 1, "loss": 1.0}]
