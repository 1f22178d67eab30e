"""The backward pass of a contrastive set: all views at once, or in chunks with the gradients of the whole (GradCache).

Gao et al. 2021, arXiv 2101.06983, section 3.2: the loss needs all projections but not their graphs. A first pass without graphs
gives the projections, the loss their gradients, and a second pass goes back through one chunk at a time. Memory is that of a
chunk, time one forward pass more. Exact where a view's projection does not depend on the views beside it: not with batch norm.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.network import Inputs, Outputs

Score = Callable[[Outputs], dict[str, Tensor]]  # what the network gave → loss and figures


def backward_whole(
    network: nn.Module, inputs: Inputs, score: Score, weight: float, accelerator: Accelerator, synchronise: bool
) -> tuple[dict[str, Tensor], Outputs]:
    """Add the gradients of weight · loss; what `score` gave, and what the network gave.

    Args:
        network: as `accelerator.prepare` gave it.
        synchronise: average the gradients, and all that were added before, over the ranks.
    """
    with nullcontext() if synchronise else accelerator.no_sync(network):
        with accelerator.autocast():
            outputs = Outputs(*network(*inputs))
        terms = score(outputs)
        accelerator.backward(terms["loss"] * weight)
    return {name: value.detach() for name, value in terms.items()}, _detached(outputs)


def backward_in_chunks(
    network: nn.Module, inputs: Inputs, chunk: int, score: Score, weight: float, accelerator: Accelerator, synchronise: bool
) -> tuple[dict[str, Tensor], Outputs]:
    """`backward_whole` of views alone, in the memory of `chunk` of them; ranks must have equally many."""
    views = inputs.views
    assert inputs.places is None
    parts = views.split(chunk)
    alone = accelerator.unwrap_model(network)  # ranks need not meet in the first pass
    states, embeddings, projections = [], [], []
    for part in parts:
        states.append(_random_state(views.device))
        with torch.no_grad(), accelerator.autocast():
            found = alone(part)
        embeddings.append(found.embedding)
        projections.append(found.projection)
    outputs = Outputs(torch.cat(embeddings), projection := torch.cat(projections).requires_grad_())
    terms = score(outputs)
    accelerator.backward(terms["loss"] * weight)  # scaled, where there is a scaler, and so is all that follows
    assert projection.grad is not None
    for i, (part, gradient) in enumerate(zip(parts, projection.grad.split(chunk), strict=True)):
        last = synchronise and i == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(network), _replaying(states[i], views.device):
            with accelerator.autocast():
                again = Outputs(*network(part)).projection
            again.backward(gradient)
    return {name: value.detach() for name, value in terms.items()}, _detached(outputs)


def _detached(outputs: Outputs) -> Outputs:
    places = outputs.places
    return Outputs(outputs.embedding.detach(), outputs.projection.detach(), None if places is None else places.detach())


def _random_state(device: torch.device) -> list[Tensor]:
    """Of what a random layer, such as dropout, draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _replaying(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """The random numbers that followed `state`; afterwards those that would have come now."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
