"""Bite after bite: from the last accepted network to the target, back a step and by half a bite where the gate refuses."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune.compression.gate import Scores, Verdict, failed, judge
from finetune.compression.groups import Size
from finetune.compression.prune import Prunable, fewest_channels, lost_channels, prunable, take_bite, write_pruned
from finetune.compression.recipe import PruneSettings
from finetune.compression.selection import Bounds, Harm
from finetune.compression.sensitivity import Sensitivity, measure_sensitivity
from finetune.compression.subject import Subject
from finetune.loop import finetune
from resunet.config import Frozen
from resunet.errors import CheckFailed
from resunet.files import write_text
from resunet.model import Segmenter, load_model
from resunet.progress import say
from resunet.runs import is_done

F = TypeVar("F", bound=Frozen)


@dataclass(frozen=True)
class Step:
    """One bite. goal: how much of the way to the target, 1 all. lost: of every group of channels the share that went."""

    name: str
    run: Path
    goal: float
    size: Size
    lost: dict[str, float]
    verdict: Verdict
    seconds: float
    hurt: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """accepted: the last step that passed the gate; None if none did."""

    size: Size
    steps: tuple[Step, ...]
    sensitivity: Sensitivity | None

    @property
    def accepted(self) -> Step | None:
        return next((step for step in reversed(self.steps) if step.verdict.accepted), None)


def kept(path: Path, kind: type[F], make: Callable[[], F]) -> F:
    """What a file of this compression holds; made and written where there is none."""
    if path.is_file():
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, made.model_dump_json(indent=2) + "\n")
    return made


def prune_steps(subject: Subject, start: Scores) -> Outcome:
    """Prune and train until the target is met, or the smallest bite is refused; without `prune` nothing.

    The way to the target is geometric: bite k of n leaves target^(k/n) of what came in.

    Raises:
        InputError: the target cannot be met, whatever Dice says.
        Stopped: SIGTERM; what is finished stays.
    """
    origin, settings = load_model(subject.settings.run), subject.settings.prune
    whole = prunable(origin)
    if settings is None:
        return Outcome(whole.size, (), None)
    scores = subject.importance(whole, settings)
    final = _bounds(settings, whole.size, 1.0)
    take_bite(whole, scores, _harms(whole, origin, None), final, settings.round_to, _least(whole, origin, settings))
    sensitivity = None
    if settings.sensitivity:
        path = subject.settings.out / "sensitivity.json"
        sensitivity = kept(
            path, Sensitivity, lambda: measure_sensitivity(whole, scores, settings, subject.data.val, subject.dice)
        )
    steps: list[Step] = []
    parent, reached, bite, refusals = subject.settings.run, 0.0, 1 / settings.bites, 0
    while reached < 1 and refusals <= settings.retries:
        goal = 1.0 if reached + bite > 1 - 1e-9 else reached + bite
        before = prunable(load_model(parent))
        bounds = _bounds(settings, whole.size, goal)
        if bounds.hold(before.size):  # rounding took more than the bite before was to
            reached = goal
            continue
        step = _step(subject, settings, before, parent, origin, bounds, goal, len(steps) + 1, start, sensitivity)
        steps.append(step)
        if step.verdict.accepted:
            parent, reached = step.run, goal
        else:
            refusals, bite = refusals + 1, bite / 2
    return Outcome(whole.size, tuple(steps), sensitivity)


def _step(
    subject: Subject,
    settings: PruneSettings,
    before: Prunable,
    parent: Path,
    origin: Segmenter,
    bounds: Bounds,
    goal: float,
    number: int,
    start: Scores,
    sensitivity: Sensitivity | None,
) -> Step:
    """Prune, train and judge; each of the three only if it has not been done."""
    out, name = subject.settings.out, f"{number:02}"
    pruned, run = out / "pruned" / name, out / "steps" / name
    if not pruned.is_dir():
        scores = subject.importance(before, settings)
        harms, least = _harms(before, origin, sensitivity), _least(before, origin, settings)
        made = take_bite(before, scores, harms, bounds, settings.round_to, least)
        write_pruned(made, parent, pruned)
    network = load_model(pruned)
    size, lost = prunable(network).size, lost_channels(before.network, network, before.groups)
    say(f"compress {name}: {size.parameters:,} parameters and {size.macs / 1e9:.3g} G multiply-adds, training")
    last = _bounds(settings, prunable(origin).size, 1.0).hold(size)
    steps = settings.last_steps if last and settings.last_steps is not None else settings.steps
    try:
        if not is_done(run):
            finetune(subject.training(settings, pruned, run, steps, number))
        verdict = judge(
            start,
            kept(out / "val" / f"{name}.json", Scores, lambda: subject.scores(run)),
            subject.settings.gate,
            subject.targets.names,
        )
    except CheckFailed as error:  # a loss that is not finite: what was accepted before stands
        verdict = failed(str(error))
    hurt = tuple(sensitivity.worst(lost)) if sensitivity is not None and not verdict.accepted else ()
    seconds = json.loads((run / "run.json").read_text(encoding="utf-8")).get("seconds", 0.0)
    say(f"compress {name}: {'accepted' if verdict.accepted else 'refused: ' + '; '.join(verdict.reasons)}")
    if hurt:
        say(f"compress {name}: layers that hurt most by themselves: {'; '.join(hurt)}")
    return Step(name, run, goal, size, lost, verdict, seconds, hurt)


def _bounds(settings: PruneSettings, whole: Size, goal: float) -> Bounds:
    return Bounds(
        None if settings.parameters is None else whole.parameters * settings.parameters**goal,
        None if settings.macs is None else whole.macs * settings.macs**goal,
    )


def _harms(subject: Prunable, origin: Segmenter, sensitivity: Sensitivity | None) -> list[Harm]:
    """By measured sensitivity; without it all groups are alike."""
    weights = {} if sensitivity is None else sensitivity.weights()
    lost = lost_channels(origin, subject.network, subject.groups)
    return [Harm(weights.get(group.name, 1.0), lost[group.name]) for group in subject.groups]


def _least(subject: Prunable, origin: Segmenter, settings: PruneSettings) -> list[int]:
    return fewest_channels(subject, origin, settings.least, settings.round_to)
