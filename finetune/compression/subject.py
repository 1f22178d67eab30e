"""The run that is compressed: its recipe, its cases, and how networks are measured on them and trained again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from finetune.compression.gate import Scores, scores_of
from finetune.compression.importance import Scores as ChannelScores
from finetune.compression.importance import taylor_importance, weight_importance
from finetune.compression.prune import Prunable
from finetune.compression.recipe import CompressRecipe, PruneSettings
from finetune.evaluation.evaluate import mean_dice, measure_cases
from finetune.evaluation.outputs import Measured
from finetune.evaluation.targets import Targets, targets_of
from finetune.finished import recipe_of
from finetune.labelled import LabelledData, read_labelled
from finetune.recipe import FinetuneRecipe
from finetune.training.patches import PatchSampler
from resunet.checkpoint import model_folder
from resunet.config import validate
from resunet.data.cases import LoadedCase
from resunet.ensemble import Ensemble
from resunet.errors import InputError
from resunet.inference.window import Scorer
from resunet.layout import place
from resunet.model import Segmenter, load_finetuned, load_model
from resunet.runtime import ObjectRule
from resunet.training import start_ranks


@dataclass(frozen=True)
class Subject:
    """data: without test."""

    settings: CompressRecipe
    recipe: FinetuneRecipe
    data: LabelledData
    accelerator: Accelerator

    @property
    def targets(self) -> Targets:
        return targets_of(self.recipe.data.classes, self.recipe.data.regions)

    def measure(self, network: Segmenter, cases: Sequence[LoadedCase], quiet: bool = True) -> list[Measured]:
        """Whole cases, after the network's own post-processing."""
        device, rules = self.accelerator.device, network.config.object_rules()
        return measure_cases(
            place(network, device),
            cases,
            self.targets,
            device,
            self.recipe.precision,
            quiet=quiet,
            rules=rules,
            inference=self.recipe.inference,
        )

    def scores(self, run: Path) -> Scores:
        """A model's, on val."""
        return scores_of([one.row() for one in self.measure(load_finetuned(model_folder(run))[0], self.data.val, quiet=False)])

    def dice(
        self, network: Segmenter | Scorer, cases: Sequence[LoadedCase], rules: Sequence[ObjectRule] | None = None
    ) -> float:
        """Of a network on cases, or of an engine, which says by itself in which precision. rules: null: the network's own."""
        device, recipe = self.accelerator.device, self.recipe
        if isinstance(network, Segmenter):
            network, rules = place(network, device), network.config.object_rules() if rules is None else rules
        return mean_dice(network, cases, self.targets, device, recipe.precision, rules=rules or (), inference=recipe.inference)

    def sampler(self) -> PatchSampler:
        """Of the training cases."""
        return PatchSampler(self.data.train, self.recipe.patch, self.recipe.foreground, self.recipe.foreground_by == "object")

    def importance(self, subject: Prunable, settings: PruneSettings) -> ChannelScores:
        """Of the channels of every group."""
        if settings.importance != "taylor":
            return weight_importance(subject.network, subject.groups, settings.importance)
        network, batches = place(subject.network, self.accelerator.device), settings.batches
        return taylor_importance(self.recipe, network, subject.groups, self.sampler(), batches, self.accelerator)

    def training(self, settings: PruneSettings, start: Path, out: Path, steps: int, number: int) -> FinetuneRecipe:
        """The fine-tuning after a bite: the run's own recipe, from the pruned network, which continues what is there."""
        values = self.recipe.model_dump()
        own = self.settings.wandb
        group = own.group or f"compress-{self.recipe.sha256()[:8]}"
        changes = dict(
            start=start,
            out=out,
            resume=True,
            seed=self.settings.seed + number,
            steps=steps,
            evaluate_test=False,
            teacher=self.settings.run if settings.teacher else None,
            wandb=own.model_copy(update={"group": group, "name": f"{own.name or 'step'}-{number:02}"}),
        )
        values["optimizer"] |= dict(lr=settings.lr or self.recipe.optimizer.lr / 2)
        if round(values["distillation"]["unlabelled"] * self.recipe.batch) < 1:  # such a small batch has no room for them
            values["distillation"] |= dict(unlabelled=0.0)
        return validate(FinetuneRecipe, values | changes, f"the training after bite {number}")


def read_subject(settings: CompressRecipe) -> Subject:
    """A finished run with its cases.

    Raises:
        InputError: no finished run of a single network, or whatever is wrong with its source.
        CheckFailed: val cases are among the training cases.
    """
    recipe = recipe_of(settings.run)
    if isinstance(load_model(settings.run), Ensemble):
        raise InputError(
            f"run={settings.run}: is an ensemble; compress one of its members, or distil it into one network first (teacher=)."
        )
    accelerator = start_ranks(recipe, recipe.batch, "patches")
    return Subject(settings, recipe, read_labelled(recipe, quiet=False), accelerator)
