"""Two real ranks, of this file as a program, beside one process."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from finetune.loop import finetune
from finetune.recipe import FinetuneRecipe
from finetune.training.batch_statistics import batch_norms, recompute_statistics, share_statistics
from resunet.checkpoint import read_weights
from resunet.report import read_metrics
from resunet.training import sum_over_ranks

BATCHES = 5  # that statistics are recomputed from: the ranks' shares differ


def work(folder: Path) -> None:
    """What every rank does."""
    finetune(FinetuneRecipe.model_validate_json((folder / "two.json").read_text(encoding="utf-8")))
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    numbers = torch.arange(6.0).view(2, 3)[rank].requires_grad_()
    total = sum_over_ranks(numbers**2, accelerator)
    total.prod().backward()
    network = tiny()
    network(batch(10 + rank))
    own = statistics(network)
    share_statistics(network, accelerator)
    shared = statistics(network)
    recompute_statistics(network, batch_norms(network), [batch(i) for i in range(rank, BATCHES, 2)], accelerator)
    found = {"total": total.detach(), "gradient": numbers.grad, "own": own, "shared": shared, "precise": statistics(network)}
    torch.save(found, folder / f"rank-{rank}.pt")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())


def batch(index: int) -> torch.Tensor:
    return torch.randn(4, 1, 9, 9, generator=torch.Generator().manual_seed(index)) + index


def statistics(network: nn.Module) -> torch.Tensor:
    return torch.cat([network[1].running_mean, network[1].running_var]).clone()


@pytest.fixture
def both(recipe, source, tmp_path) -> tuple[Path, Path]:
    """The run directories of two ranks and of one process, by recipes that ask for the same."""
    for number, path in enumerate(sorted((source / "masks").iterdir())):
        mask = np.asarray(Image.open(path)).copy()
        mask[:, : number % 5] = 7  # ignored, in each by another share
        Image.fromarray(mask).save(path)
    splits = json.loads((source / "splits.json").read_text(encoding="utf-8"))
    assert len(splits["val"]) % 2 == 1 and len(splits["test"]) == 6
    (source / "splits.json").write_text(json.dumps(splits | {"test": splits["test"][:-1]}), encoding="utf-8")
    same = {
        "steps": 4,
        "batch": 4,
        "validate_every": 2,
        "ema": 0.5,
        "data": {"ignore": [7]},
        "model": {"channels": [4, 4, 8, 8], "norm": "group"},
        "loss": {"deep_supervision": True, "component_weight": 1, "class_weights": {"lesion": 3}},
    }
    two = recipe(name="two", processes=2, **same)
    (tmp_path / "two.json").write_text(two.model_dump_json(), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8", timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return two.out, finetune(recipe(name="one", **same))


def test_two_ranks_with_half_the_batch_are_one_with_all_of_it(both, tmp_path):
    two, one = both
    ours, expected = read_metrics(two), read_metrics(one)
    assert ours.keys() == expected.keys() >= {"loss", "component", "val_dice", "gradient_norm", "elastic_rms"}
    assert ours["gradient_norm"][1][0] == pytest.approx(expected["gradient_norm"][1][0], rel=1e-5)
    for name in expected:
        assert ours[name][0] == expected[name][0] and ours[name][1] == pytest.approx(expected[name][1], rel=2e-4), name
    weights = read_weights(one / "model" / "model.safetensors")
    for name, tensor in read_weights(two / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)

    # of five test cases each is measured once
    texts = [(run / "evaluation" / "cases.csv").read_text(encoding="utf-8") for run in both]
    rows = [list(csv.reader(text.splitlines()))[1:] for text in texts]
    assert len(rows[0]) == 5 == len({row[0] for row in rows[0]}) and [row[0] for row in rows[0]] == [row[0] for row in rows[1]]

    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    (x**2).sum(dim=0).prod().backward()
    gradient = torch.stack([rank["gradient"] for rank in ranks])
    assert torch.equal(ranks[0]["total"], (x.detach() ** 2).sum(dim=0)) and torch.equal(ranks[0]["total"], ranks[1]["total"])
    torch.testing.assert_close(gradient / 2, x.grad)  # DistributedDataParallel averages where it should add

    assert not torch.equal(ranks[0]["own"], ranks[1]["own"])
    torch.testing.assert_close(ranks[0]["shared"], (ranks[0]["own"] + ranks[1]["own"]) / 2)
    network = tiny()
    recompute_statistics(network, batch_norms(network), [batch(i) for i in range(BATCHES)], Accelerator(cpu=True))
    torch.testing.assert_close(ranks[0]["precise"], statistics(network))
    for name in ("shared", "precise"):
        assert torch.equal(ranks[0][name], ranks[1][name])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
