"""Which groups a labelled draw has where they are not drawn at random: those that cover the pool's embeddings.

As `resunet suggest` would choose with nothing labelled, so that its choices can be measured against random ones: every budget is
the beginning of one order of the pool's groups (`resunet.embedding.coverage.nested_order`), and `data.draw` its seed.
Only the pool is embedded. Val is drawn at random all the same, with the same groups for every way to draw.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from platformdirs import user_cache_path

from finetune.settings import LabelledSettings
from resunet.checkpoint import WEIGHTS, model_folder
from resunet.data.cases import Case
from resunet.data.source import Source
from resunet.data.splits import shuffled
from resunet.embedding.coverage import nested_order
from resunet.embedding.embed import EmbedRequest, write_embeddings
from resunet.embedding.features import Embedder
from resunet.embedding.groups import Groups, groups_of
from resunet.embedding.table import Embeddings, read_embeddings
from resunet.errors import InputError
from resunet.feature_extractor import load_encoder
from resunet.files import file_aside
from resunet.files import sha256 as file_sha256


def suggested_order(settings: LabelledSettings, source: Source) -> list[str] | None:
    """The pool's groups, as the source names them, in the order in which they are labelled; None for a random one.

    Groups without any content, which have no place among the embeddings, come last.

    Raises:
        InputError: no such encoder, a scan of the pool that it does not take, or one that is gone.
    """
    if settings.draw_by == "random" or settings.labelled is None:
        return None
    assert settings.draw_encoder is not None
    name_of = {case.group_hmac: case.group_name for case in source.part("pool")}
    groups = pool_groups(settings.draw_encoder, source)
    places = nested_order(settings.draw_by, groups.points, settings.draw) if groups.names else []
    order = [name_of[groups.names[place]] for place in places]
    return order + shuffled(set(name_of.values()) - set(order), settings.draw)


def pool_groups(model: Path, source: Source) -> Groups:
    """The pool's groups as points in an encoder's embedding.

    Raises:
        InputError: no such encoder, a scan of the pool that it does not take, or one that is gone.
    """
    return groups_of(_embeddings(model, source, source.part("pool")), masked=set(), held_out=set())


def _embeddings(model: Path, source: Source, pool: Sequence[Case]) -> Embeddings:
    """Of the pool's scans, kept in the user's cache: a label curve's cells draw from the same ones, and compute them once."""
    weights = model_folder(model) / WEIGHTS
    if not weights.is_file():
        raise InputError(f"data.draw_encoder={model}: no model there. Give a pretraining run, or the model/ folder of one.")
    folder = user_cache_path("resunet") / "draws"
    with suppress(OSError):  # it is said where the file is written
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{_key(file_sha256(weights), source.salt_fingerprint, pool)}.parquet"
    if not path.is_file():
        request = EmbedRequest(source=model)
        of_pool = replace(source, cases=pool)
        with file_aside(path) as aside:  # without its groups of a moment's bad disk, it would give other draws for good
            made = write_embeddings(model, Embedder(*load_encoder(model), request), of_pool, aside, request)
            if made.faults:
                raise InputError(
                    f"data.draw_by: {len(made.faults)} scans of the pool cannot be embedded; the first: {made.faults[0]}"
                )
    return read_embeddings(path)


def _key(weights: str, salt_fingerprint: str, pool: Sequence[Case]) -> str:
    """Another one for other weights, another salt, and other scans, or scans that have changed."""
    scans = [[case.id, case.group_hmac, [_stamp(path) for path in case.files]] for case in pool]
    return sha256(json.dumps([weights, salt_fingerprint, scans]).encode()).hexdigest()[:32]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    return stat.st_size, stat.st_mtime_ns
