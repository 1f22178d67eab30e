import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finetune.labelled import read_labelled, resolve
from finetune.step import _STATISTICS, _TRAINING, _batch, apply_gradients, build, make_optimizer, start_step, supervise
from finetune.training.batch_statistics import batch_norms
from finetune.training.patches import PatchSampler
from resunet.checkpoint import ModelConfig
from resunet.config import FixedNormalisation
from resunet.encoder import ResidualEncoder
from resunet.errors import CheckFailed, InputError
from resunet.fingerprint import fingerprint
from resunet.model import ResUNet
from resunet.training import restore_training, training_state


@pytest.fixture
def batch_encoder(tmp_path, encoder):
    """A pretrained encoder with batch norm, whose statistics are not those of a fresh one; beside `encoder`, with its archive."""
    torch.manual_seed(3)
    network = ResidualEncoder(1, (4, 8), units=1)
    network(torch.randn(8, 1, 16, 16) + 2)
    network.config = ModelConfig(
        architecture=network.config.architecture,
        normalisation=FixedNormalisation(kind="fixed", low=0, high=255, mean=60, std=50),
        feature_check=fingerprint(network),
    )
    network.save_pretrained(encoder)
    return encoder


def test_the_batch_does_not_depend_on_the_number_of_ranks(recipe):
    ours = resolve(recipe(batch=6))
    sampler = PatchSampler(read_labelled(ours, quiet=True).train, ours.patch, ours.foreground)

    def share(rank: int, ranks: int, index: int = 5, streams: tuple[int, int] = _TRAINING) -> tuple:
        place = SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=ranks)
        return _batch(ours, sampler, index, place, streams)

    images, labels, moved = share(0, 1)
    assert images.shape[0] == 6 and moved[0] > 0 and 0 < moved[1] <= 6
    for ranks in (2, 3, 6):
        shares = [share(rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([one for one, *_ in shares]), images)
        assert torch.equal(torch.cat([one for _, one, _ in shares]), labels)
        assert [sum(its) for its in zip(*[its for *_, its in shares], strict=True)] == pytest.approx(moved)
    for other in (share(0, 1, index=6), share(0, 1, streams=_STATISTICS)):
        assert not torch.equal(other[0], images)
    assert len({tuple(one.flatten().tolist()) for one in images}) == 6


def scaled(recipe, scale: float) -> tuple:
    """A tiny network under a gradient scaler, as Accelerate sets one up for fp16 on a GPU: apart from the autocast."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    network = nn.Conv2d(1, 1, 3)
    return (
        recipe(optimizer={"clip": 1.0}),
        network,
        accelerator.prepare(torch.optim.AdamW(network.parameters(), 0.1)),
        accelerator,
    )


def take(ours, network, optimizer, accelerator, gradient: float, step: int) -> dict[str, float]:
    """One step whose gradients are about as large as told."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step)
    loss = gradient * network(torch.randn(2, 1, 5, 5, generator=generator)).mean()
    accelerator.backward(loss)
    return apply_gradients(ours, network, optimizer, float(loss.detach()), step, accelerator)


@pytest.fixture(autouse=True)
def _fresh_precision():
    """A test that sets up fp16 must leave Accelerate's shared state as it was."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_scaled_step_that_overflows_is_skipped(recipe):
    ours, network, optimizer, accelerator = scaled(recipe, 2.0**127)
    before = [parameter.clone() for parameter in network.parameters()]
    metrics = take(ours, network, optimizer, accelerator, 100, 0)
    assert metrics == {"loss_scale": 2.0**126, "skipped": 1}  # a norm that is not finite is not logged: JSON has none
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    json.dumps(metrics, allow_nan=False)
    taken = [take(ours, network, optimizer, accelerator, 1, step)["skipped"] for step in range(1, 9)]
    assert 0 in taken and not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_gradient_is_clipped_without_its_scale(recipe):
    """The step of a scaled loss is that of the loss itself."""
    results = []
    for scale in (1.0, 1024.0):
        ours, network, optimizer, accelerator = scaled(recipe, scale)
        norms = [take(ours, network, optimizer, accelerator, 50, step)["gradient_norm"] for step in range(3)]
        clipped = torch.cat([parameter.grad.ravel() for parameter in network.parameters()]).norm()
        assert norms[-1] > 10 and float(clipped) == pytest.approx(1, rel=1e-4)
        results.append([*norms, *network.weight.flatten().tolist()])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_the_scale_is_in_the_checkpoint(recipe):
    ours, network, optimizer, accelerator = scaled(recipe, 64.0)
    for step in range(4):
        take(ours, network, optimizer, accelerator, 1, step)
    assert accelerator.scaler.get_scale() == 128  # it grew after three steps, and one counts for the next time
    state = copy.deepcopy(training_state(4, network, optimizer, accelerator))
    _, other, its_optimizer, its_accelerator = scaled(recipe, 1.0)
    restore_training(state, other, its_optimizer, its_accelerator)
    for step in range(4, 7):
        expected = take(ours, network, optimizer, accelerator, 1, step)
        assert take(ours, other, its_optimizer, its_accelerator, 1, step) == expected
    assert expected["loss_scale"] == 256 and torch.equal(network.weight, other.weight)


def test_what_no_scale_can_save_stops(recipe):
    ours, network, optimizer, accelerator = scaled(recipe, 1e-3)
    with pytest.raises(CheckFailed, match=r"step 3: gradients overflow in fp16 even with the loss scaled by .*precision=bf16"):
        for step in range(4):
            optimizer.zero_grad()
            accelerator.backward(network(torch.randn(2, 1, 5, 5)).mean() * math.inf)
            apply_gradients(ours, network, optimizer, 1.0, step, accelerator)


def test_without_a_scaler_a_gradient_that_is_not_finite_stops_before_it_is_applied(recipe):
    network = nn.Conv2d(1, 1, 3)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(network.parameters(), 0.1))
    before = network.weight.clone()
    (network(torch.randn(2, 1, 5, 5)).mean() * math.inf).backward()
    with pytest.raises(CheckFailed, match=r"step 2: the gradient_norm is not finite \(loss=1\.0, gradient_norm=(nan|inf)\)"):
        apply_gradients(recipe(), network, optimizer, 1.0, 2, accelerator)
    assert torch.equal(network.weight, before)


def test_an_adapted_stem_goes_with_the_decoder(recipe, encoder, source):
    ours = resolve(
        recipe(
            steps=10,
            encoder=str(encoder),
            allow=["input_channels"],
            data={"channels": 3},
            optimizer={"decoder_first": 0.5, "encoder_lr_factor": 0.1, "weight_decay": 0.1},
        )
    )
    model, receipt = build(ours)
    optimizer = make_optimizer(ours, model, receipt)
    stem = {"encoder.levels.0.0.conv1.weight", "encoder.levels.0.0.shortcut.0.weight"}
    assert {tensor.name for tensor in receipt.tensors if tensor.state == "adapted"} == stem
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())  # each once
    for step, of_encoder in ((0, 0), (7, 0.1)):
        lr = start_step(ours, model, optimizer, step, transferred=True)
        for group in optimizer.param_groups:
            expected = of_encoder * lr if group["name"] == "encoder" else lr
            assert group["lr"] == pytest.approx(expected)
            assert (group["name"] == "stem") == ({names[id(parameter)] for parameter in group["params"]} == stem)
    assert {group["weight_decay"] for group in optimizer.param_groups if group["name"] == "stem"} == {0.1}


def test_frozen_statistics_stay_and_the_rest_trains(recipe, batch_encoder):
    ours = resolve(recipe(encoder=str(batch_encoder), model={"statistics": "frozen"}))
    model, receipt = build(ours)
    optimizer = make_optimizer(ours, model, receipt)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_step(ours, model, optimizer, 0, transferred=True)
    model(torch.randn(4, 1, 16, 16)).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    for name, layer in batch_norms(model).items():
        still = name.startswith("encoder.")
        assert layer.training != still
        assert torch.equal(after[f"{name}.running_mean"], before[f"{name}.running_mean"]) == still
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])


def test_statistics_need_a_batch_norm(recipe, encoder):
    with pytest.raises(InputError, match=r"model\.statistics='frozen': model\.norm='instance' keeps no batch statistics"):
        build(resolve(recipe(encoder=str(encoder), model={"statistics": "frozen"})))
    with pytest.raises(InputError, match=r"model\.statistics='precise': model\.norm='group' keeps no batch statistics"):
        build(resolve(recipe(model={"statistics": "precise", "norm": "group"})))


def test_the_heads_are_trained_and_fresh_by_the_seed(recipe):
    ours = resolve(recipe(model={"channels": [4, 4, 8, 8]}, loss={"deep_supervision": True}))
    model, _ = build(ours)
    assert isinstance(model, ResUNet)
    trained = supervise(ours, model)
    torch.rand(3)  # whatever is drawn in between, by a transfer for instance
    again = supervise(ours, build(ours)[0])
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    optimizer = make_optimizer(ours, trained)
    assert {group["name"] for group in optimizer.param_groups} == {"encoder", "decoder", "head", "heads"}
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(trained.parameters())) == len(list(model.parameters())) + 2
    assert supervise(resolve(recipe()), model) is model
