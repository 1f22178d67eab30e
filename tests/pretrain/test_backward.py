from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pretrain.backward import backward_in_chunks, backward_whole
from pretrain.losses import Items
from pretrain.network import Inputs, PretrainingNetwork
from pretrain.objective import build_loss, contrast
from pretrain.recipe import HeadSettings, ObjectiveSettings
from resunet.encoder import ResidualEncoder
from resunet.training import start_ranks

COUNT = 7


class Passes:
    """How many views went through an encoder at a time, and whether a graph was kept."""

    def __init__(self, network: PretrainingNetwork) -> None:
        self.seen: list[tuple[int, bool]] = []
        network.encoder.levels[0].register_forward_hook(self._look)

    def _look(self, module: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
        self.seen.append((len(given[0]), out.requires_grad))


def network(norm: str = "group", dropout: float = 0.0) -> PretrainingNetwork:
    torch.manual_seed(0)
    made = PretrainingNetwork(
        ResidualEncoder(1, (4, 8), units=1, norm=norm), HeadSettings(hidden=8, output=5, batch_norm=norm == "batch")
    )
    if dropout:
        made.head.layers.insert(1, nn.Dropout(dropout))
    return made


def views() -> torch.Tensor:
    return torch.randn(2 * COUNT, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def gradients(
    made: PretrainingNetwork, backward, accelerator: Accelerator, settings: dict, weights=(1.0,)
) -> dict[str, torch.Tensor]:
    criterion = build_loss(ObjectiveSettings.model_validate(settings), 0.2, 5)
    its = Items(torch.tensor([0, 0, 1, 1, 2, 3, 4]), torch.zeros(COUNT, dtype=torch.long), torch.linspace(0, 1, COUNT))
    wrapped = accelerator.prepare(made)
    found = {}
    for number, weight in enumerate(weights):
        terms, outputs = backward(
            wrapped,
            Inputs(views() + number),
            score=lambda found: contrast(found.embedding, found.projection, criterion, its),
            weight=weight,
            accelerator=accelerator,
            synchronise=True,
        )
        projection = outputs.projection
        assert not projection.requires_grad and projection.shape == (2 * COUNT, 5)
        found |= {f"{name} {number}": value for name, value in terms.items()}
    return found | {name: parameter.grad for name, parameter in made.named_parameters()}


OBJECTIVES = {
    "plain": {},
    "decoupled": {"loss": "decoupled"},
    "scan-aware": {"same_group": "ignore", "position_threshold": 0.4},
    "memory bank": {"memory_bank": COUNT},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("chunk", [1, 4, 14, 100])
def test_chunks_give_the_gradients_of_the_whole(objective, chunk):
    accelerator, found = Accelerator(cpu=True), []
    for backward in (backward_whole, partial(backward_in_chunks, chunk=chunk)):
        torch.manual_seed(5)
        found.append(gradients(network(), backward, accelerator, objective, weights=(0.5, 0.5)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_no_graph_is_larger_than_a_chunk():
    made = network()
    passes = Passes(made)
    gradients(made, partial(backward_in_chunks, chunk=4), Accelerator(cpu=True), {})
    assert passes.seen == [(4, False)] * 3 + [(2, False)] + [(4, True)] * 3 + [(2, True)]


def test_random_layers_draw_the_same_twice():
    """Of one view a chunk, so that the projections of the second pass are seen to be those that the loss had."""
    made, seen = network(dropout=0.5), []
    made.head.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    torch.manual_seed(9)
    gradients(made, partial(backward_in_chunks, chunk=3), Accelerator(cpu=True), {})
    passes = len(seen) // 2
    assert all(torch.equal(one, again) for one, again in zip(seen[:passes], seen[passes:], strict=True))
    assert not torch.equal(seen[0], seen[1])
    after = torch.rand(1)
    torch.manual_seed(9)
    with torch.no_grad():
        for part in views().split(3):
            made(part)
    assert torch.equal(torch.rand(1), after)


def test_bf16_too(recipe):
    """Autocast keeps casts of the weights: one made without a graph must not be used in the second pass."""
    ours = recipe(precision="bf16")
    accelerator = start_ranks(ours, ours.batch, "scans")
    whole, chunks = (
        gradients(network(), backward, accelerator, {}) for backward in (backward_whole, partial(backward_in_chunks, chunk=4))
    )
    for name, value in whole.items():
        assert chunks[name] is not None and chunks[name].dtype == torch.float32, name
        torch.testing.assert_close(chunks[name], value, atol=0.02 * max(1e-2, float(value.abs().max())), rtol=0.05, msg=name)


class Scaled(Accelerator):
    """An accelerator with a loss scaler, as with fp16 on a GPU."""

    def backward(self, loss: torch.Tensor, **kwargs: object) -> None:
        super().backward(loss * 1024, **kwargs)


def test_a_scaled_loss_gives_scaled_gradients():
    plain, scaled = (
        gradients(network(), partial(backward_in_chunks, chunk=4), accelerator, {})
        for accelerator in (Accelerator(cpu=True), Scaled(cpu=True))
    )
    for name, value in plain.items():
        factor = 1 if " " in name else 1024
        torch.testing.assert_close(scaled[name], value * factor, atol=1e-6, rtol=1e-4, msg=name)


def test_batch_norm_would_not_be_exact():
    """Why the recipe refuses it."""
    found = [
        gradients(network("batch"), backward, Accelerator(cpu=True), {})
        for backward in (backward_whole, partial(backward_in_chunks, chunk=4))
    ]
    assert abs(found[0]["loss 0"] - found[1]["loss 0"]) > 1e-3
