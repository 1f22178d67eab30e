"""`resunet pretrain RECIPE --plan`: what the archive is, what the run will cost, and what to think of before it starts."""

import time
from dataclasses import dataclass

from pretrain.archive import Archive, read_archive
from pretrain.planning.alone import before_training
from pretrain.planning.cautions import cautions_of
from pretrain.planning.facts import ArchiveFacts, archive_facts
from pretrain.planning.timing import Cost, measure_cost
from pretrain.probe.probe import Probe
from pretrain.recipe import PretrainRecipe
from pretrain.refusals import refuse_impossible
from resunet.doctor import fastest_precision
from resunet.light_settings import LIGHT


@dataclass(frozen=True)
class Plan:
    """All that the page says."""

    recipe: PretrainRecipe
    archive: Archive
    facts: ArchiveFacts
    cost: Cost
    cautions: tuple[str, ...]
    read_seconds: float
    looks: int  # of the probe

    @property
    def seconds(self) -> float:
        """What the whole run will take."""
        return self.read_seconds + self.cost.step * self.recipe.steps + self.cost.look * self.looks


def make_plan(recipe: PretrainRecipe) -> Plan:
    """Read the archive as the run would, and measure a few steps of a rank. Nothing is written but the store of decoded scans,
    which the run finds filled; `out` may exist.

    Raises:
        ResUNetError: whatever would stop the run as well, but a leak, which is a caution here.
    """
    alone, accelerator = before_training(recipe, batch=max(1, recipe.batch // recipe.processes))
    started = time.perf_counter()
    archive = read_archive(alone, accelerator)
    read_seconds = time.perf_counter() - started
    refuse_impossible(recipe, archive, speaks=True)
    facts = archive_facts(recipe, archive)
    probe = Probe(alone, archive, accelerator)
    cost = measure_cost(alone, archive, accelerator, probe)
    depthwise = recipe.model.name == LIGHT and cost.device == "cpu"  # which are slower in bf16
    cautions = cautions_of(recipe, archive, facts, cost, "fp32" if depthwise else fastest_precision())
    return Plan(recipe, archive, facts, cost, tuple(cautions), read_seconds, probe.looks)
