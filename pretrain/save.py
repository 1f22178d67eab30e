"""The encoder as a model directory, with what it was trained on beside it."""

from pretrain.archive import Archive
from pretrain.recipe import PretrainRecipe
from resunet.checkpoint import ModelConfig, Provenance
from resunet.data.leakage import ARCHIVE, write_archive
from resunet.encoder import ResidualEncoder
from resunet.files import folder_aside
from resunet.runs import versions
from resunet.transfer import fingerprint


def save_encoder(recipe: PretrainRecipe, encoder: ResidualEncoder, archive: Archive) -> None:
    encoder.config = ModelConfig(
        architecture=encoder.config.architecture,
        input_channels=recipe.data.channels,
        normalisation=recipe.normalisation,
        provenance=Provenance(data_sha256=archive.digest, recipe_sha256=recipe.sha256(), versions=versions()),
        feature_check=fingerprint(encoder),
        allowed=archive.allowed,
    )
    with folder_aside(recipe.out / "model") as aside:
        encoder.save_pretrained(aside)
        write_archive(aside / ARCHIVE, archive.evidence)
