"""Doing the cells of a label curve: one after another, or shared by as many processes as are started on one folder."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.beforehand import is_blind
from finetune.evaluation.evaluate import predicting
from finetune.evaluation.targets import targets_of
from finetune.judging import measure
from finetune.label_curve.cells import Cell, Point
from finetune.labelled import read_labelled, resolve
from finetune.loop import finetune, write_test_evaluation
from finetune.mirrored import mirror_evaluation
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import model_folder
from resunet.data.cases import source_digest
from resunet.errors import EnvironmentFault, InputError
from resunet.layout import place
from resunet.mirror import start_mirror, without_paths
from resunet.model import load_finetuned
from resunet.progress import say
from resunet.runs import is_done, note_input

# What a launcher tells a process of its ranks.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Task:
    """Something that one process does once: `do` is called unless `done`, `ready` says whether it can be."""

    name: str
    ready: Callable[[], bool]
    done: Callable[[], bool]
    do: Callable[[], object]


def do_all(points: Sequence[Point], locks: Path) -> None:
    """Train every cell and evaluate the chosen one of every point; returns when all is done, by whomever.

    What another process is at is left to it, and waited for in the end: should it be killed, its lock is free and its cell is
    continued here.

    Raises:
        ResUNetError: what a cell raises; cells that are done stay done.
    """
    tasks = [task for point in points for task in _tasks_of(point)]
    for wait in (False, True):  # first what is free, then what others were at
        for number, task in enumerate(tasks, 1):
            if task.done() or not (wait or task.ready()):
                continue
            with locked(locks / f"{task.name}.lock", wait) as mine:
                if mine and not task.done():
                    say(f"label-curve {number}/{len(tasks)}: {task.name}")
                    task.do()


def look_for_leaks(points: Sequence[Point], locks: Path) -> None:
    """Before anything is trained: is anything of test among an arm's labels, or in the archive of a model that it rests on?

    Cells do not read test, so that each would find out only after all its steps. Looked at with the most labels of every arm that
    has cells left, once for all processes.

    Raises:
        InputError: no test case has anything to find.
        CheckFailed: test cases are among the training cases or in the encoder's, start's or teacher's archive.
    """
    for arm in dict.fromkeys(point.arm for point in points if not point.done):
        point = max((one for one in points if one.arm == arm), key=lambda one: (one.labelled, -one.draw))
        values = hashlib.sha256(point.cells[0].recipe.model_dump_json().encode()).hexdigest()  # an arm without cells may change
        looked = locks / f"{arm}-{point.labelled}-{values[:12]}.no-leak"
        with locked(locks / f"{arm}-leak.lock", wait=True):
            if not looked.exists():
                say(f"label-curve: looking for copies of test behind {arm}")
                recipe = point.cells[0].recipe.model_copy(update={"evaluate_test": True})
                data = read_labelled(resolve(recipe), quiet=False)
                if is_blind(data.test):
                    raise InputError(
                        f"finetune.data.source={recipe.data.source}: none of its {len(data.test)} test cases has a pixel of any "
                        f"class, and a curve is of test Dice. {recipe.data.remedy}."
                    )
                looked.touch()


def _tasks_of(point: Point) -> Iterator[_Task]:
    def trained() -> bool:
        return all(cell.done for cell in point.cells)

    for cell in point.cells:
        yield _Task(cell.name, lambda: True, lambda cell=cell: cell.done, lambda cell=cell: _train(cell))  # type: ignore[misc]
    yield _Task(f"{point.name}-test", trained, lambda: point.done, lambda: evaluate_on_test(point.chosen.folder))


def _train(cell: Cell) -> None:
    finetune(cell.recipe)
    # nothing is left to continue, and the optimiser's state of a hundred cells fills a disk; model/ stays
    shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)


def evaluate_on_test(run: Path) -> None:
    """Write evaluation/ of a finished run that did not read test: what it would have written itself.

    Raises:
        CheckFailed: test cases are among the training cases or in the encoder's archive.
    """
    assert is_done(run)
    recipe = FinetuneRecipe.model_validate_json((run / "config.json").read_text(encoding="utf-8"))
    recipe = recipe.model_copy(update={"evaluate_test": True})
    data = read_labelled(recipe, quiet=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, config = load_finetuned(model_folder(run))
    network = place(network, device)
    measured = measure(network, data.test, recipe, rules=config.object_rules())
    digest = source_digest(data.test)
    note_input(run, "test", digest)
    summary = write_test_evaluation(run, network, measured, data, recipe)
    before = json.loads((run / "run.json").read_text(encoding="utf-8"))
    run_id = f"{before['wandb_id']}-test" if "wandb_id" in before else uuid.uuid4().hex[:8]
    values = without_paths(json.loads(recipe.model_dump_json())) | {"inputs": {"test": digest}}
    mirror = start_mirror(recipe.wandb, "evaluate", run_id, run, values)
    if mirror is not None:
        predict = predicting(network, config, device, recipe.precision_of_test, recipe.inference)
        targets = targets_of(recipe.data.classes, recipe.data.regions)
        mirror_evaluation(mirror, summary, measured, targets, config, predict)
        mirror.finish(succeeded=True)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock of a file; with `wait` it does, sooner or later.

    A record lock (POSIX): it holds over a shared file system, where the server has locks, and it ends with the process that
    took it, however that ends and whatever children it leaves behind. The file stays: taking it away would let two in.

    Raises:
        EnvironmentFault: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except (BlockingIOError, PermissionError):  # POSIX lets a system say either
            mine = False
        except OSError as error:
            raise EnvironmentFault(f"{path}: cannot be locked: {error}. Put out= on a file system that has locks.") from error
        yield mine  # closing the file gives the lock back


def work_alone(joins: bool) -> None:
    """Make a process that a launcher started as one rank of several a worker of its own, with a GPU of its own.

    Cells are single processes: ranks share the cells, not the batches.

    Args:
        joins: the curve may be there already. Ranks do not know of each other, so that all but one find it there.

    Raises:
        InputError: several ranks that would each begin the curve.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if not joins:
        raise InputError("resume=false: several processes share a label curve only with resume=true. Set it; out may be new.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) and visible[0] else str(local)
    for name in list(os.environ):
        if name in _RANKS or name.startswith(("ACCELERATE_", "TORCHELASTIC_")):
            del os.environ[name]
