"""`resunet compress RUN`: prune a little, train, pass the gate, and again, until the target; then read test once.

    OUT/config.json        the recipe
    OUT/run.json           status, versions, machine, sha256 of the weights that came in
    OUT/sensitivity.json   val Dice after every layer alone has lost channels
    OUT/pruned/NN/         a bite: the network that was taken from the last accepted one, untrained
    OUT/steps/NN/          its training, an ordinary fine-tuning run
    OUT/val/NN.json        what the gate saw of it; 00 is the run that came in
    OUT/steps/int8/        the last accepted network in INT8, if the recipe quantises; int8-2, … what was tried after a refusal
    OUT/rounding.json      after a refusal, val Dice with every layer alone in INT8
    OUT/model/             the last accepted network, which export, predict and evaluate take
    OUT/quantised/         its INT8 graph, if the gate let that pass, which export takes too
    OUT/evaluation/        that on test
    OUT/test.json          all networks on test
    OUT/compress.json  OUT/report.html

What is finished stays: after a kill, the same command with resume=true goes on.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from finetune.compression.gate import Scores, judge
from finetune.compression.int8 import Quantised, quantise_steps
from finetune.compression.page import write_report
from finetune.compression.recipe import CompressRecipe
from finetune.compression.result import Record, finish, mirror, write_record
from finetune.compression.steps import kept, prune_steps
from finetune.compression.subject import Subject, read_subject
from finetune.quantisation.quantise import refuse_missing, refuse_unfit
from resunet.checkpoint import WEIGHTS, model_folder
from resunet.data.cases import source_digest
from resunet.errors import CheckFailed, InputError, Stopped
from resunet.files import folder_aside, refuse_taken, sha256, write_text
from resunet.model import load_finetuned
from resunet.progress import say
from resunet.runs import Status, note_work

_WEIGHTS = "run/model.safetensors"  # of run.json's inputs
_FREE_ON_RESUME = {"resume", "out", "wandb", "run"}  # of a run its weights and cases are compared


def compress(recipe: CompressRecipe) -> Path:
    """Compress a finished run; the folder.

    Raises:
        ResUNetError: input, environment, or SIGTERM; finished steps stay.
        CheckFailed: no step passed the gate; the report says what each would have cost.
    """
    recipe = recipe.model_copy(update={"out": recipe.out.absolute()})  # the trainings between bites note where they began
    out = recipe.out
    if recipe.quantise is not None:
        refuse_missing(recipe.quantise)
        refuse_unfit(recipe.run, load_finetuned(model_folder(recipe.run))[0], recipe.quantise)
    weights = {_WEIGHTS: sha256(model_folder(recipe.run) / WEIGHTS)}
    noted = _noted(recipe, weights)
    if noted is not None and (out / "compress.json").is_file():
        record = json.loads((out / "compress.json").read_text(encoding="utf-8"))
        note_work(out, "compress", recipe.seed, "done", noted)  # whatever happened after it was written
        _refuse_nothing(record, out)
        return out
    subject = read_subject(recipe)
    inputs = weights | {"train": source_digest(subject.data.train), "val": source_digest(subject.data.val)}
    if noted is None:
        tell_changed(recipe.run, inputs)
        with folder_aside(out) as aside:
            write_text(aside / "config.json", recipe.model_dump_json(indent=2, exclude={"resume"}) + "\n")
            note_work(aside, "compress", recipe.seed, "running", inputs)
    else:
        if changed := [name for name, digest in inputs.items() if noted.get(name, digest) != digest]:
            raise InputError(
                f"out={out}: cannot be resumed, its inputs have changed since it was started: {', '.join(changed)}. Restore "
                "images and masks, or name another out."
            )
        note_work(out, "compress", recipe.seed, "running", inputs)
    status: Status = "failed"
    try:
        record = _compress(subject)
        status = "done"
    except Stopped:
        status = "stopped"
        raise
    finally:
        note_work(out, "compress", recipe.seed, status, inputs)
    _refuse_nothing(record, out)
    return out


def _compress(subject: Subject) -> Record:
    recipe, out = subject.settings, subject.settings.out
    if recipe.prune is not None:  # what a training between bites would refuse is told before anything is measured
        subject.training(recipe.prune, recipe.run, out / "steps" / "01", recipe.prune.steps, 1)
    start = kept(out / "val" / "00.json", Scores, lambda: subject.scores(recipe.run))
    judge(start, start, recipe.gate, subject.targets.names)  # a network that finds nothing is told before anything is trained
    outcome = prune_steps(subject, start)
    quantised: tuple[Quantised, ...] = ()
    if recipe.quantise is not None:
        quantised = quantise_steps(subject, recipe.quantise, outcome.accepted.run if outcome.accepted else recipe.run, start)
    record = finish(subject, outcome, quantised, start)
    write_report(record, out)
    write_record(record, out)
    mirror(subject, record)
    return record


def tell_changed(run: Path, inputs: Mapping[str, str]) -> None:
    """What the gate compares is measured on the labels as they are now; the run's own figures may be of others."""
    before = json.loads((run / "run.json").read_text(encoding="utf-8")).get("inputs", {})
    if changed := [name for name in ("train", "val") if before.get(name, inputs[name]) != inputs[name]]:
        say(
            f"run={run}: images or masks of {' and '.join(changed)} are not those that it was trained with. The network before and "
            "after is measured on those of now."
        )


def _noted(recipe: CompressRecipe, weights: Mapping[str, str]) -> dict[str, str] | None:
    """The inputs of the compression by the same recipe that the folder holds and that is to be continued; None: there is none.

    Raises:
        InputError: it exists, and is not to be continued, is no compression or one by another recipe.
    """
    out = recipe.out
    if not recipe.resume or not out.exists():
        refuse_taken(out, "out=", otherwise="continue it with resume=true, or delete it")
        return None
    try:
        before = CompressRecipe.model_validate_json((out / "config.json").read_text(encoding="utf-8"))
        noted: dict[str, str] = json.loads((out / "run.json").read_text(encoding="utf-8"))["inputs"]
    except (OSError, ValueError) as error:
        raise InputError(f"out={out}: cannot be continued, it is no compression: {error}") from error
    then, now = before.model_dump(exclude=_FREE_ON_RESUME), recipe.model_dump(exclude=_FREE_ON_RESUME)
    if differing := [key for key in now if then[key] != now[key]]:
        lines = "\n".join(f"  {key}: {then[key]} then, {now[key]} now" for key in differing)
        raise InputError(f"out={out}: was started with another recipe:\n{lines}\nName another out.")
    if any(noted.get(name) != digest for name, digest in weights.items()):
        raise InputError(f"out={out}: was started with other weights than {recipe.run} holds now. Name another out.")
    return noted


def _refuse_nothing(record: Record, out: Path) -> None:
    """Raises CheckFailed if no step was accepted."""
    int8 = [record["quantised"]] if record["quantised"] is not None else []  # all that an earlier version wrote of it
    tried_all = [*record["steps"], *record.get("quantised_steps", int8)]
    if not any(one["accepted"] for one in tried_all):
        tried = "\n".join(f"  step {one['name']}: {'; '.join(one['reasons'])}" for one in tried_all)
        raise CheckFailed(f"{out}: no step passed the gate on val, so that nothing is compressed (report.html):\n{tried}")
