"""The labels behind a model beside its own: an encoder's probe used some, a teacher was trained on some. All had to be made."""

from collections.abc import Sequence

from finetune.distillation.teacher import teacher_labels
from finetune.recipe import FinetuneRecipe
from resunet.checkpoint import LabelledGroups, model_folder, read_config
from resunet.data.cases import Case
from resunet.data.source import Source
from resunet.members import join_labels


def probes_of(recipe: FinetuneRecipe) -> tuple[LabelledGroups, ...]:
    """The labels that the recipe's encoders, to begin with and to draw by, were judged by while they were pretrained."""
    models = [model for model in (recipe.encoder, recipe.data.draw_encoder) if model is not None]
    probes = [read_config(model_folder(model)).provenance.probe for model in models]
    return join_labels(probe for probe in probes if probe is not None)


def other_labels(recipe: FinetuneRecipe) -> tuple[LabelledGroups, ...]:
    """The labels behind the recipe's encoders, its start and its teacher, as far as these know."""
    models = (recipe.data.draw_encoder, recipe.start, recipe.teacher)
    return join_labels([*probes_of(recipe), *(one for model in models for one in teacher_labels(model))])


def labels_beside(others: Sequence[LabelledGroups], labelled: Sequence[Case], source: Source) -> int:
    """How many groups of `others` are not among those of `labelled`: all, where another salt made their HMACs."""
    own = {case.group_hmac for case in labelled}
    return sum(len(set(one.groups) - (own if one.salt_fingerprint == source.salt_fingerprint else set())) for one in others)


def probe_note(probes: Sequence[LabelledGroups], labelled: Sequence[Case], source: Source) -> list[str]:
    """How many labels the encoder's probe adds."""
    if not probes:
        return []
    own, beside = len({case.group_hmac for case in labelled}), labels_beside(probes, labelled, source)
    among = sum(len(one.groups) for one in probes) - beside
    told = f" ({among} more of the probe's are among them)" if among and beside else ""
    if not beside:
        return [f"{own} labelled groups; the {among} that the encoder's probe used are among them."]
    return [f"{own} labelled groups, plus {beside} that the encoder's probe used{told}: {own + beside} had to be labelled."]


def start_note(recipe: FinetuneRecipe, labelled: Sequence[Case], source: Source) -> list[str]:
    """How many labels the finished segmenter that a run goes on from adds."""
    if recipe.start is None:
        return []
    its = teacher_labels(recipe.start)
    if not its:
        return ["On how many labelled groups the start was trained is not known: they count, too."]
    own, beside = len({case.group_hmac for case in labelled}), labels_beside(its, labelled, source)
    return [
        f"{own} labelled groups, plus {beside} that the start was trained on or chosen by: {own + beside} had to be labelled."
    ]


def teacher_note(recipe: FinetuneRecipe, labelled: Sequence[Case], source: Source) -> list[str]:
    """How many labels the teacher adds, and in all."""
    if recipe.teacher is None:
        return []
    its = teacher_labels(recipe.teacher)
    if not its:
        return ["On how many labelled groups the teacher was trained is not known: they count, too."]
    count, beside = sum(len(one.groups) for one in its), labels_beside(its, labelled, source)
    own, everything = len({case.group_hmac for case in labelled}), labels_beside(other_labels(recipe), labelled, source)
    return [
        f"{own} labelled groups; the teacher was trained on or chosen by {count}, {beside} of them beside these: "
        f"{own + everything} had to be labelled."
    ]
