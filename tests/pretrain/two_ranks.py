"""What test_ranks.py runs in one process and, started by `accelerate launch`, in two: FOLDER holds the recipes.

Every rank takes its share of the same sets; what comes out must not depend on their number.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from pretrain.backward import backward_in_chunks, backward_whole
from pretrain.dense import contrast_places
from pretrain.loop import pretrain
from pretrain.losses import Items
from pretrain.network import Inputs, PretrainingNetwork
from pretrain.non_finite import NonFinite, suspects
from pretrain.objective import build_loss, loss_state, score
from pretrain.recipe import DenseSettings, HeadSettings, ObjectiveSettings, PretrainRecipe
from resunet.config import validate
from resunet.data.cases import Case
from resunet.encoder import ResidualEncoder

BATCH = 8
AWARE = {"same_group": "ignore", "position_threshold": 0.2}
# the objective, views a chunk, the size of a view
CASES: dict[str, tuple[dict, int | None, tuple[int, ...]]] = {
    "plain": ({}, None, (12, 12)),
    "decoupled": ({"loss": "decoupled"}, None, (12, 12)),
    "memory bank": ({"memory_bank": 2 * BATCH}, None, (12, 12)),
    "scan-aware": (AWARE, None, (12, 12)),
    "plain, cached": ({}, 3, (12, 12)),
    "memory bank, cached": ({"memory_bank": 2 * BATCH}, 3, (12, 12)),
    "scan-aware, cached": (AWARE, 3, (12, 12)),
    "volumes": ({}, None, (8, 8, 6)),
    "volumes, cached": ({}, 3, (8, 8, 6)),
}


def recipe_of(changes: dict) -> PretrainRecipe:
    return validate(PretrainRecipe, {"out": "unused", "steps": 1, "batch": BATCH, "data": {"source": "."}} | changes, "test")


def gradients(name: str, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The loss, its figures and the gradients of a step of two accumulated sets, and what the loss remembers."""
    settings, chunk, size = CASES[name]
    torch.manual_seed(0)
    head = HeadSettings(hidden=8, output=5, batch_norm=False)
    network = PretrainingNetwork(ResidualEncoder(1, (4, 8), units=1, norm="group", spatial_dims=len(size)), head)
    criterion = build_loss(ObjectiveSettings.model_validate(settings), 0.2, head.output)
    wrapped = accelerator.prepare(network)
    share = BATCH // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    found: dict[str, torch.Tensor] = {}
    backward = backward_whole if chunk is None else partial(backward_in_chunks, chunk=chunk)
    for number in range(2):
        draw = torch.Generator().manual_seed(number)
        views = torch.randn(2, BATCH, 1, *size, generator=draw)[:, mine].flatten(0, 1)
        group = torch.randint(3, (BATCH,), generator=draw)
        axis = torch.randint(2, (BATCH,), generator=draw)
        position = torch.rand(BATCH, generator=draw)
        position[5] = torch.nan
        items = Items(group[mine], axis[mine], position[mine])
        scored = partial(score, recipe=recipe_of({"objective": settings}), criterion=criterion, items=items)
        terms, _ = backward(wrapped, Inputs(views), score=scored, weight=0.5, accelerator=accelerator, synchronise=number == 1)
        found |= {f"{key} {number}": accelerator.reduce(value, reduction="mean") for key, value in terms.items()}
    found |= {key: parameter.grad for key, parameter in network.named_parameters() if parameter.grad is not None}
    return found | loss_state(criterion)


def dense_gradients(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The same of a set with contrast of places, which all scans have equally many of; more than are used."""
    torch.manual_seed(0)
    head = HeadSettings(hidden=8, output=5, batch_norm=False)
    recipe = recipe_of({"dense": {"points": 6, "pairs": 32, "hidden": 8, "output": 5}, "objective": {"weight": 0.7}})
    network = PretrainingNetwork(ResidualEncoder(1, (4, 8, 8), units=1, norm="group"), head, recipe.dense)
    wrapped = accelerator.prepare(network)
    share = BATCH // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    draw = torch.Generator().manual_seed(7)
    views = torch.randn(2, BATCH, 1, 12, 12, generator=draw)[:, mine].flatten(0, 1)
    places = (torch.rand(2, BATCH, 6, 2, generator=draw) * 2 - 1)[:, mine].flatten(0, 1)
    found = torch.ones(share, 6, dtype=torch.bool)
    criterion = build_loss(recipe.objective, 0.2, head.output)
    scored = partial(score, recipe=recipe, criterion=criterion, items=None, matched=found)
    terms, _ = backward_whole(wrapped, Inputs(views, places), scored, 1.0, accelerator, synchronise=True)
    assert terms["dense_points"] == 32
    terms = {key: accelerator.reduce(value, reduction="mean") for key, value in terms.items()}
    return terms | {key: parameter.grad for key, parameter in network.named_parameters() if parameter.grad is not None}


def dense_share(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Where one rank has fewer places all use as few: of eight scans the last two have one place each, or none."""
    share = BATCH // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    found = torch.zeros(BATCH, 6, dtype=torch.bool)
    found[:4] = True
    found[6:, :1] = True
    projection = torch.randn(2, BATCH, 6, 5, generator=torch.Generator().manual_seed(3))
    few = contrast_places(projection[:, mine].flatten(0, 1), found[mine], DenseSettings())
    found[4:] = False
    none = contrast_places(projection[:, mine].flatten(0, 1), found[mine], DenseSettings())
    return {"few": few["dense_points"], "none": none["dense_points"], "loss of none": none["dense_loss"]}


def left_out(folder: Path, accelerator: Accelerator) -> None:
    """One scan of the last rank has a projection that is not finite; it writes skipped.jsonl."""
    cases = [Case(f"id{i}", "", "", "", None, (Path(f"{i}.png"),), None) for i in range(BATCH)]
    share = BATCH // accelerator.num_processes
    scan = torch.arange(share) + accelerator.process_index * share
    projection = torch.zeros(2 * share, 3)
    if accelerator.process_index == accelerator.num_processes - 1:
        projection[-1, 1] = torch.inf
    rows = suspects(scan, torch.zeros(2 * share, 1, 2, 2), projection)
    NonFinite(folder, True, cases, accelerator.is_main_process).leave_out(1, "the loss is not finite (nan)", rows, accelerator)


def run(folder: Path) -> None:
    """results-RANK.pt, skipped.jsonl and the runs of the recipes in FOLDER."""
    for name in ("recipe", "volumes", "dense"):  # first: they start the ranks as the command does
        pretrain(PretrainRecipe.model_validate_json((folder / f"{name}.json").read_text(encoding="utf-8")))
    accelerator = Accelerator(cpu=True)
    results = {name: gradients(name, accelerator) for name in CASES} | {"dense": dense_gradients(accelerator)}
    results["dense, unequal"] = dense_share(accelerator)
    torch.save(results, folder / f"results-{accelerator.process_index}.pt")
    left_out(folder, accelerator)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
