"""What a run that is left alone for a week has to survive: kills at any step, a full disk; and which checkpoints it keeps."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from pretrain.loop import pretrain
from pretrain.save import encoder_of_checkpoint
from resunet.checkpoint import read_config
from resunet.data.leakage import read_archive
from resunet.encoder import ResidualEncoder
from resunet.errors import EnvironmentFault, InputError
from resunet.fingerprint import feature_error


def kept(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def left_by(out: Path) -> dict[str, bytes]:
    """Metrics, gradients and the model."""
    names = ("metrics.jsonl", "gradients.json", "model/config.json", "model/model.safetensors", "model/archive.parquet")
    return {name: (out / name).read_bytes() for name in names}


def stopped(out: Path) -> None:
    """As if the run had not come to its end."""
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (out / "run.json").write_text(json.dumps(record | {"status": "stopped"}), encoding="utf-8")


@pytest.fixture
def at_step() -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Does something at the end of the n-th optimiser step of this process, once."""
    handles = []

    def at(step: int, action: Callable[[], None]) -> None:
        done = []

        def hook(optimizer: object, args: object, kwargs: object) -> None:
            done.append(None)
            if len(done) == step:
                action()

        handles.append(register_optimizer_step_post_hook(hook))

    yield at
    for handle in handles:
        handle.remove()


@pytest.fixture
def files_of_at_most() -> Iterator[Callable[[int | None], None]]:
    """The system refuses to write a byte beyond so many of a file, as it does on a full disk; Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(count: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if count is None else count, hard))

    yield limit
    limit(None)


@pytest.mark.parametrize("room, refused", [(0, "run: cannot be written"), (5000, "step-4: the checkpoint cannot be written")])
def test_a_full_disk_leaves_the_checkpoint_before(recipe, tmp_path, at_step, files_of_at_most, room, refused):
    """At 0 bytes the log is refused first, at 5,000 it has room and the checkpoint has not."""
    whole, ours = (recipe(steps=6, checkpoint_every=2, out=str(tmp_path / name)) for name in ("whole", "run"))
    pretrain(whole)
    at_step(4, lambda: files_of_at_most(room))
    with pytest.raises(EnvironmentFault, match=rf"{refused}: File too large.*stand: free space.*resume=true") as error:
        pretrain(ours)
    assert error.value.exit_code == 3 and kept(ours.out) == [2]
    assert [path.name for path in ours.out.rglob(".*")] == []
    files_of_at_most(None)
    pretrain(ours.model_copy(update={"resume": True}))
    assert left_by(ours.out) == left_by(whole.out)


def test_a_disk_that_is_full_at_the_end_is_no_traceback(recipe, files_of_at_most):
    """Of a run whose steps are done; there is room for its status, and none for the model."""
    ours = recipe(steps=2)
    out = pretrain(ours)
    before = left_by(out)
    shutil.rmtree(out / "model")
    stopped(out)
    files_of_at_most(3000)
    with pytest.raises(EnvironmentFault, match="run: cannot be written: File too large"):
        pretrain(ours.model_copy(update={"resume": True}))
    assert not (out / "model").exists()
    files_of_at_most(None)
    pretrain(ours.model_copy(update={"resume": True}))
    assert left_by(out) == before


VARIANTS = {
    "batch norm, one worker": {"data": {"workers": 1}, "accumulate": 2},
    "memory bank": {"objective": {"memory_bank": 8}},
    "cached gradients": {"cache_chunk": 3, "model": {"norm": "group"}, "head": {"batch_norm": False}},
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is forked may not use the threads of OpenMP, which stay behind in the parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_killed_it_ends_as_one_left_alone(recipe, tmp_path, changes):
    """SIGKILL in the middle of a step, in a process of its own; `benchmarks.pretrain_kills` does so at random steps."""
    whole, ours = (recipe(steps=5, checkpoint_every=2, out=str(tmp_path / name), **changes) for name in ("whole", "run"))
    pretrain(whole)
    child = os.fork()
    if child == 0:
        done = []

        def hook(*_: object) -> None:
            done.append(None)
            if len(done) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        register_optimizer_step_post_hook(hook)
        try:
            pretrain(ours)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kept(ours.out) == [2] and not (ours.out / "model").exists()
    pretrain(ours.model_copy(update={"resume": True}))
    assert left_by(ours.out) == left_by(whole.out)
    states = [torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True) for out in (ours.out, whole.out)]
    assert repr(states[0]["optimizer"]) == repr(states[1]["optimizer"])
    assert all(torch.equal(states[0]["loss"][name], states[1]["loss"][name]) for name in states[1]["loss"])


def test_the_latest_checkpoints_are_kept_and_each_is_an_encoder(recipe, tmp_path):
    out = pretrain(recipe(steps=6, checkpoint_every=1, keep_checkpoints=4))
    assert kept(out) == [3, 4, 5, 6]
    written = {step: encoder_of_checkpoint(out, step, tmp_path / f"encoder-{step}") for step in (4, 6)}
    last = written[6]
    for name in ("model.safetensors", "archive.parquet"):
        assert (last / name).read_bytes() == (out / "model" / name).read_bytes()
    ours, theirs = (read_config(folder).model_copy(update={"feature_check": None}) for folder in (last, out / "model"))
    assert ours == theirs
    earlier = ResidualEncoder.from_pretrained(written[4])
    state = torch.load(out / "checkpoints" / "step-4" / "state.pt", weights_only=True)["network"]
    assert all(torch.equal(tensor, state[f"encoder.{name}"]) for name, tensor in earlier.state_dict().items())
    assert feature_error(earlier, read_config(written[4]).feature_check) < 1e-12
    assert feature_error(earlier, read_config(last).feature_check) > 1e-6
    assert len(read_archive(written[4])) == 9
    with pytest.raises(InputError, match=r"there is no step-2; kept are 3, 4, 5, 6.*keep_checkpoints"):
        encoder_of_checkpoint(out, 2, tmp_path / "none")
    with pytest.raises(InputError, match="exists already"):
        encoder_of_checkpoint(out, 4, last)


def test_how_many_are_kept_may_change_on_resume(recipe):
    ours = recipe(steps=6, checkpoint_every=1, keep_checkpoints=1)
    out = pretrain(ours)
    assert kept(out) == [6]
    stopped(out)
    assert pretrain(ours.model_copy(update={"resume": True, "keep_checkpoints": 5})) == out
