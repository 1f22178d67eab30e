"""Dense contrast: its loss, its network, and runs with it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from pretrain.dense import contrast_places
from pretrain.loop import pretrain
from pretrain.network import Outputs, PretrainingNetwork
from pretrain.objective import build_loss, score
from pretrain.recipe import DenseSettings, HeadSettings, PretrainRecipe
from pretrain.save import encoder_of_checkpoint
from resunet.checkpoint import read_config
from resunet.config import validate
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError, Stopped
from resunet.model import ResUNet
from resunet.transfer import DECODER, transfer_encoder

DENSE = {"points": 6, "pairs": 16, "hidden": 8, "output": 5}
MODEL = {"channels": [4, 6, 8], "units": 1}


def naive(first: list[torch.Tensor], second: list[torch.Tensor], temperature: float) -> float:
    """NT-Xent over pairs, one term after the other."""
    every, total = [*first, *second], 0.0
    for i, one in enumerate(every):
        partner = (i + len(first)) % len(every)
        logits = [float(torch.cosine_similarity(one, other, dim=0)) / temperature for other in every]
        total += math.log(sum(math.exp(logit) for k, logit in enumerate(logits) if k != i)) - logits[partner]
    return total / len(every)


@pytest.mark.parametrize("pairs", [4, 7, 100])
def test_the_loss_is_that_of_a_naive_loop(pairs):
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(2 * 3, 4, 5, generator=draw)
    found = torch.tensor([[True, True, True, False], [False] * 4, [True, True, False, False]])
    settings = DenseSettings(temperature=0.3, pairs=pairs)
    terms = contrast_places(projection, found, settings)
    taken = [(0, 0), (2, 0), (0, 1), (2, 1), (0, 2)][:pairs]  # (scan, place): every scan's first place, and so on
    wanted = naive([projection[n, k] for n, k in taken], [projection[3 + n, k] for n, k in taken], 0.3)
    assert float(terms["dense_loss"]) == pytest.approx(wanted, rel=1e-5)
    assert terms["dense_points"] == len(taken)


def test_chance_and_collapse():
    terms = contrast_places(torch.ones(4, 6, 5), torch.ones(2, 6, dtype=torch.bool), DenseSettings())
    assert float(terms["dense_loss"]) == pytest.approx(math.log(2 * 12 - 1)) and terms["dense_points"] == 12
    assert terms["dense_projection_std"] == 0


def test_a_set_without_places_has_no_loss_and_says_so():
    projection = torch.randn(4, 6, 5, requires_grad=True)
    terms = contrast_places(projection, torch.zeros(2, 6, dtype=torch.bool), DenseSettings())
    assert [float(value.detach()) for value in terms.values()] == [0, 0, 0]
    terms["dense_loss"].backward()
    assert torch.equal(projection.grad, torch.zeros_like(projection))


def test_the_whole_loss_is_the_sum_by_weight():
    changes = {"objective": {"weight": 0.5}, "dense": {"weight": 2}}
    recipe = validate(PretrainRecipe, {"out": "run", "steps": 5, "data": {"source": "scans"}} | changes, "recipe")
    outputs = Outputs(torch.ones(4, 2), torch.ones(4, 3), torch.ones(4, 6, 5))
    matched = torch.ones(2, 6, dtype=torch.bool)
    terms = score(outputs, recipe, build_loss(recipe.objective, 0.2, 3), None, matched)
    assert float(terms["loss"]) == pytest.approx(0.5 * math.log(3) + 2 * math.log(23), rel=1e-6)
    assert float(terms["global_loss"]) == pytest.approx(math.log(3)) and terms["projection_std"] == 0


@pytest.mark.parametrize("dims, level, excite", [(2, 1, False), (2, 0, True), (3, 1, True)])
def test_the_decoder_is_that_of_the_resunet_down_to_its_level(dims, level, excite):
    torch.manual_seed(0)
    whole = ResUNet(channels=(4, 6, 8), units=1, squeeze_excite=excite, spatial_dims=dims).eval()
    branch = PretrainingNetwork(whole.encoder, HeadSettings(), DenseSettings(level=level), squeeze_excite=excite).eval()
    names = branch.decoder.state_dict().keys()
    assert names == {name for name in whole.decoder.state_dict() if int(name.split(".")[1]) < 2 - level}
    branch.decoder.load_state_dict({name: whole.decoder.state_dict()[name] for name in names})
    x = torch.randn(2, 1, *[11] * dims)
    with torch.no_grad():
        assert torch.equal(branch.decoder(whole.encoder(x)), whole.levels(x)[level])


def test_encoder_and_head_begin_as_without_it():
    states = []
    for dense in (None, DenseSettings()):
        torch.manual_seed(0)
        states.append(PretrainingNetwork(ResidualEncoder(channels=(4, 6, 8)), HeadSettings(), dense).state_dict())
    assert states[0] and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_saves_the_decoder_that_it_trained(recipe, tmp_path):
    model = MODEL | {"squeeze_excite": True}
    out = pretrain(recipe(steps=4, dense=DENSE, model=model, checkpoint_every=2, keep_checkpoints=2))
    for line in metrics_of(out):
        assert line["loss"] == pytest.approx(line["global_loss"] + line["dense_loss"], rel=1e-5)
        assert line["dense_points"] == 16 and 0 < line["dense_loss"] < 10 and line["dense_projection_std"] > 0
    saved = load_file(out / "model" / DECODER)
    assert {name.split(".")[1] for name in saved} == {"0"}, "of two blocks the one that climbs to half resolution"
    for step, folder in ((4, out / "model"), (2, encoder_of_checkpoint(out, 2, tmp_path / "earlier"))):
        state = torch.load(out / "checkpoints" / f"step-{step}" / "state.pt", weights_only=True)["network"]
        for name, tensor in load_file(folder / DECODER).items():
            assert torch.equal(tensor, state[f"decoder.{name}"])
        part = read_config(folder).decoder
        assert part is not None and (part.finest, part.norm, part.squeeze_excite) == (1, "batch", True)
        network = ResUNet(**MODEL, squeeze_excite=True)
        receipt = transfer_encoder(folder, network, parts="both")
        assert {one.name for one in receipt.tensors if one.state == "loaded"} >= {f"decoder.{name}" for name in saved}
    assert any(not torch.equal(tensor, load_file(tmp_path / "earlier" / DECODER)[name]) for name, tensor in saved.items())
    ResidualEncoder.from_pretrained(out / "model")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "SimCLR and dense contrast on" in page and "Dense contrast</h2>" in page and "1/2 resolution" in page


def test_every_tensor_of_the_decoder_and_the_projection_learns(recipe):
    out = pretrain(recipe(steps=1, dense=DENSE, model=MODEL, objective={"weight": 0}))
    state = torch.load(out / "checkpoints" / "last" / "state.pt", weights_only=True)
    torch.manual_seed(recipe().seed)
    fresh = PretrainingNetwork(
        ResidualEncoder(1, (4, 6, 8), 1), recipe().head, DenseSettings.model_validate(DENSE)
    ).state_dict()
    changed = {name for name, tensor in state["network"].items() if not torch.equal(tensor, fresh[name])}
    assert {name for name in fresh if name.startswith(("dense", "decoder", "encoder"))} <= changed
    assert not [name for name in changed if name.startswith("head.") and name.endswith("bias")], "a weight of 0 moves no head"


@pytest.mark.parametrize(
    "objective", [{"loss": "decoupled"}, {"memory_bank": 8}, {"same_group": "ignore"}], ids=["decoupled", "bank", "groups"]
)
def test_it_goes_with_every_objective(recipe, objective):
    for line in metrics_of(pretrain(recipe(dense=DENSE, model=MODEL, objective=objective, accumulate=2))):
        assert line["dense_points"] == 16 and math.isfinite(line["global_loss"])


def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path, sigterm_after):
    whole, stopped = (recipe(steps=4, model=MODEL, dense=DENSE, out=str(tmp_path / name)) for name in ("whole", "stopped"))
    pretrain(whole)
    sigterm_after(2)
    with pytest.raises(Stopped):
        pretrain(stopped)
    pretrain(stopped.model_copy(update={"resume": True}))
    assert metrics_of(stopped.out) == metrics_of(whole.out)
    for name in ("config.json", "model.safetensors", DECODER):
        assert (stopped.out / "model" / name).read_bytes() == (whole.out / "model" / name).read_bytes()


def test_a_checkpoint_of_another_version_is_refused_by_its_tensors(recipe, sigterm_after):
    ours = recipe(steps=4, dense=DENSE, model=MODEL)
    sigterm_after(2)
    with pytest.raises(Stopped):
        pretrain(ours)
    path = ours.out / "checkpoints" / "step-2" / "state.pt"
    state = torch.load(path, weights_only=True)
    state["network"] = {name.replace("decoder.", "dense.decoder."): tensor for name, tensor in state["network"].items()}
    torch.save(state, path)
    with pytest.raises(
        InputError, match=r"(?s)last checkpoint's network: .*missing.*decoder\.blocks.*unexpected.*dense\.decoder"
    ):
        pretrain(ours.model_copy(update={"resume": True}))
