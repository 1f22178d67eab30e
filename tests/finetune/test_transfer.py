import json

import pytest
import torch

from finetune.loop import finetune
from pretrain.save import save_with_decoder
from resunet.checkpoint import read_config, read_weights
from resunet.decoder import ProgressiveDecoder
from resunet.encoder import ResidualEncoder
from resunet.errors import InputError
from resunet.fingerprint import describe_decoder, fingerprint
from resunet.transfer import DECODER, Receipt


def test_a_pretrained_decoder_comes_with_its_encoder_unless_it_is_left(recipe, encoder):
    network = ResidualEncoder(1, (4, 8, 8), units=1, norm="instance")
    decoder = ProgressiveDecoder(network, "instance", finest=1)
    network.config = read_config(encoder).model_copy(
        update={
            "architecture": network.config.architecture,
            "feature_check": fingerprint(network),
            "decoder": describe_decoder(network, decoder, squeeze_excite=False),
        }
    )
    save_with_decoder(encoder, network, decoder)
    ours = {"encoder": str(encoder), "model": {"channels": [4, 8, 8]}, "steps": 1, "optimizer": {"lr": 1e-12}}
    for transfer, state in (("both", "loaded"), ("encoder", "fresh")):
        out = finetune(recipe(**ours, transfer=transfer, name=f"run-{transfer}"))
        receipt = Receipt.model_validate_json((out / "receipt.json").read_text(encoding="utf-8"))
        weights = read_weights(out / "model" / "model.safetensors")
        inputs = json.loads((out / "run.json").read_text(encoding="utf-8"))["inputs"]
        states = {tensor.name: tensor.state for tensor in receipt.tensors if tensor.name.startswith("decoder.")}
        assert {states[f"decoder.{name}"] for name in decoder.state_dict()} == {state}
        assert {its for name, its in states.items() if name.startswith("decoder.blocks.1.")} == {"fresh"}
        assert (f"encoder/{DECODER}" in inputs) == (transfer == "both")
        kept = [torch.allclose(weights[f"decoder.{name}"], one, atol=1e-6) for name, one in decoder.named_parameters()]
        assert all(kept) == (transfer == "both")
        assert receipt.line() in (out / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")


def test_nothing_to_transfer_is_refused(recipe):
    with pytest.raises(InputError, match="transfer=both: there is nothing to transfer; name an encoder"):
        recipe(transfer="both")
