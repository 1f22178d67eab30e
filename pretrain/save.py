"""The encoder as a model directory, with what it was trained on beside it."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from pretrain.archive import Archive
from pretrain.probe.scans import ProbeScans
from pretrain.recipe import PretrainRecipe
from resunet.checkpoint import CONFIG, WEIGHTS, ModelConfig, Provenance, load_exactly, model_folder, read_config, write_weights
from resunet.data.leakage import ARCHIVE, merge_archives, write_archive
from resunet.data.manifest_source import ManifestCases
from resunet.decoders import AnyDecoder, AnyEncoder, decoder_of
from resunet.errors import InputError
from resunet.files import folder_aside, refuse_taken, sha256, write_text
from resunet.fingerprint import describe_decoder, fingerprint
from resunet.machine import versions
from resunet.model import NETWORKS
from resunet.runs import Run
from resunet.transfer import DECODER


def mirror_encoder(run: Run, archive: Archive) -> None:
    """The run's model/ as an artifact in W&B, below the archive that it was trained on; call it after `save_encoder`."""
    if run.mirror is None:
        return
    folder = run.folder / "model"
    facts = {"sha256": sha256(folder / WEIGHTS), "scans": len(archive.scans.cases), "groups": archive.num_groups}
    cases = archive.scans.cases
    # the whole manifest's, as the run of its index has it, and not that of the part that was trained on
    manifest = cases.manifest.digest if isinstance(cases, ManifestCases) else archive.digest
    run.mirror.model("encoder", folder, facts, {"manifest": manifest})


def save_encoder(
    recipe: PretrainRecipe,
    encoder: AnyEncoder,
    archive: Archive,
    probe: ProbeScans | None = None,
    decoder: AnyDecoder | None = None,
) -> None:
    """model/ of a run, with what was trained of a decoder; the record beside it holds the labelled scans of the probe, too."""
    labels = probe.labels if probe is not None else None
    encoder.config = ModelConfig(
        architecture=encoder.config.architecture,
        input_channels=recipe.data.channels,
        normalisation=recipe.normalisation,
        provenance=Provenance(data_sha256=archive.digest, recipe_sha256=recipe.sha256(), probe=labels, versions=versions()),
        feature_check=fingerprint(encoder),
        decoder=describe_decoder(encoder, decoder, recipe.model.squeeze_excite) if decoder is not None else None,
        allowed=archive.allowed,
    )
    with folder_aside(recipe.out / "model") as aside:
        save_with_decoder(aside, encoder, decoder)
        write_archive(aside / ARCHIVE, merge_archives(archive.evidence, probe.evidence if probe is not None else None))


def save_with_decoder(folder: Path, encoder: AnyEncoder, decoder: AnyDecoder | None) -> None:
    """A model directory, with what was trained of a decoder."""
    encoder.save_pretrained(folder)
    if decoder is not None:
        write_weights(folder / DECODER, decoder.state_dict())
        write_text(folder / CONFIG, encoder.config.model_dump_json(indent=2) + "\n")


def encoder_of_checkpoint(run: Path, step: int, out: Path) -> Path:
    """The encoder after `step` steps of a finished run, as a model directory like the run's own; `out`.

    Raises:
        InputError: `out` exists, the run has not finished, or it does not keep the checkpoint of that step (keep_checkpoints).
    """
    refuse_taken(out, "out=")
    final = model_folder(run)
    checkpoints = run / "checkpoints"
    kept = sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    if step not in kept:
        raise InputError(
            f"{checkpoints}: there is no step-{step}; kept are {', '.join(map(str, kept)) or 'none'}. Train with keep_checkpoints "
            "large enough, and checkpoint_every that divides the step."
        )
    encoder = NETWORKS[read_config(final).architecture.name].from_pretrained(final)
    assert isinstance(encoder, AnyEncoder)
    state = torch.load(checkpoints / f"step-{step}" / "state.pt", map_location="cpu", weights_only=True)["network"]
    load_exactly(encoder, _below("encoder.", state), f"step {step}")
    config = read_config(final)
    changed: dict[str, object] = {"feature_check": fingerprint(encoder)}
    decoder = None
    if (part := config.decoder) is not None:
        decoder = decoder_of(encoder, part.squeeze_excite, part.finest, part.channels)
        load_exactly(decoder, _below("decoder.", state), f"step {step}")
        changed["decoder"] = describe_decoder(encoder, decoder, part.squeeze_excite)
    encoder.config = config.model_copy(update=changed)
    with folder_aside(out) as aside:
        save_with_decoder(aside, encoder, decoder)
        shutil.copyfile(final / ARCHIVE, aside / ARCHIVE)
    return out


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
