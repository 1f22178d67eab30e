"""What a compression came to: the model, test read once for both networks, compress.json, and the same in W&B."""

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.comparison.cost import costs_of, record_of
from finetune.compression.gate import Scores, difference_of, judge, scores_of
from finetune.compression.int8 import NAME, ROUNDING, Quantised, keep_quantised, measure_int8, record_of_int8
from finetune.compression.steps import Outcome, Step
from finetune.compression.subject import Subject
from finetune.evaluation.unseen import refuse_seen
from finetune.labelled import read_labelled
from finetune.loop import write_test_evaluation
from resunet.checkpoint import WEIGHTS, model_folder, read_config
from resunet.data.cases import source_digest
from resunet.files import folder_aside, sha256, write_text
from resunet.mirror import start_mirror, without_paths
from resunet.model import load_model
from resunet.progress import say

SCHEMA_VERSION = 1
START, END = "before", "after"

Record = dict[str, Any]


def finish(subject: Subject, outcome: Outcome, quantised: Sequence[Quantised], start: Scores) -> Record:
    """model/, quantised/ and evaluation/ of what was accepted; what compress.json holds, which is written last.

    Test is read only if something was accepted.
    """
    settings, out, accepted = subject.settings, subject.settings.out, outcome.accepted
    int8 = next((one for one in quantised if one.verdict.accepted), None)
    test, cost = None, None
    if accepted is not None or int8 is not None:
        with folder_aside(out / "model") as aside:
            shutil.copytree(model_folder(settings.run if accepted is None else accepted.run), aside, dirs_exist_ok=True)
        if int8 is not None:
            keep_quantised(int8, out)
        test = _on_test(subject, int8) if settings.evaluate_test else None
        cost = record_of(costs_of({START: settings.run, END: out}))
    return {
        "schema_version": SCHEMA_VERSION,
        "accepted": None if accepted is None else accepted.name,
        "weights_sha256": {"run": sha256(model_folder(settings.run) / WEIGHTS)}
        | ({} if cost is None else {"model": sha256(out / "model" / WEIGHTS)}),
        "gate": settings.gate.model_dump(),
        "start": asdict(outcome.size) | judge(start, start, settings.gate).model_dump(exclude={"reasons", "fall"}),
        "steps": [_of_step(step, outcome) for step in outcome.steps],
        "quantised_steps": (tried := [record_of_int8(one) for one in quantised]),
        "quantised": tried[-1] if tried else None,
        "sensitivity": None if outcome.sensitivity is None else outcome.sensitivity.model_dump(mode="json"),
        "rounding": _if_there(out / ROUNDING),
        "test": test,
        "cost": cost,
    }


def _if_there(path: Path) -> Record | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_record(record: Record, out: Path) -> None:
    """compress.json."""
    write_text(out / "compress.json", json.dumps(record, indent=2) + "\n")


def mirror(subject: Subject, record: Record) -> None:
    """A run of job type `compress`: a line a step, the figures in the end, and the model."""
    settings, out = subject.settings, subject.settings.out
    values = without_paths(json.loads(settings.model_dump_json(exclude={"run"}))) | {"inputs": record["weights_sha256"]}
    its = start_mirror(settings.wandb, "compress", uuid.uuid4().hex[:8], out, values)
    if its is None:
        return
    for number, step in enumerate(record["steps"], 1):
        figures = {key: float(step[key]) for key in ("parameters", "macs", "fall", "accepted", "goal")}
        its.log(number, figures | {"val_dice": step["dice"]["mean"]})
    accepted = next((step for step in record["steps"] if step["name"] == record["accepted"]), None)
    if accepted is not None:
        its.summarise({key: accepted[key] for key in ("parameters_share", "macs_share", "fall")})
    if record["quantised"] is not None:
        its.summarise({f"int8/{key}": record["quantised"][key] for key in ("method", "fall", "bytes", "accepted")})
    if record["accepted"] is not None:
        facts = {"sha256": record["weights_sha256"]["model"]}
        facts["architecture"] = read_config(out / "model").architecture.model_dump(mode="json")
        its.model("segmenter", out / "model", facts, {"segmenter": record["weights_sha256"]["run"]})
    if record["test"] is not None:
        its.summarise({f"test/{name}": one["dice"]["mean"] for name, one in record["test"]["networks"].items()})
    its.finish(succeeded="model" in record["weights_sha256"])


def _of_step(step: Step, outcome: Outcome) -> Record:
    return asdict(step.size) | {
        "name": step.name,
        "goal": step.goal,
        "parameters_share": step.size.parameters / outcome.size.parameters,
        "macs_share": step.size.macs / outcome.size.macs,
        "accepted": step.verdict.accepted,
        **step.verdict.model_dump(mode="json"),
        "hurt": list(step.hurt),
        "lost": step.lost,
        "seconds": step.seconds,
    }


def _on_test(subject: Subject, int8: Quantised | None) -> Record | None:
    """All networks on test, and their differences from the run's, paired by group; None without test cases.

    Writes evaluation/ of the float network, and test.json, so that nothing that happens later lets test be read again.
    """
    out = subject.settings.out
    if (kept := _if_there(out / "test.json")) is not None:
        return kept
    recipe = subject.recipe.model_copy(update={"evaluate_test": True})
    data = read_labelled(recipe, quiet=False)
    if not data.test:
        say("compress: there are no test cases")
        return None
    folder = model_folder(subject.settings.run)
    seen = refuse_seen(  # whatever its network began with, which its recipe here no longer says
        folder,
        read_config(folder),
        data.test,
        data.source.salt_fingerprint,
        "test",
        allowed="leak" in recipe.allow,
        by="allow=[leak] in the run's own recipe, and train it again",
    )
    data = replace(data, allowed=list(dict.fromkeys([*data.allowed, *seen])))
    measured = {START: subject.measure(load_model(subject.settings.run), data.test, quiet=False)}
    network = load_model(out)
    measured[END] = subject.measure(network, data.test, quiet=False)
    write_test_evaluation(out, network, measured[END], data, recipe)
    if int8 is not None:
        measured[NAME] = measure_int8(subject, int8.folder, int8.run, data.test)
    scores = {name: scores_of([one.row() for one in its]) for name, its in measured.items()}
    found = {name: difference_of(scores[START], its) for name, its in scores.items()}
    made = {
        "cases": source_digest(data.test),
        "networks": {name: its.model_dump(mode="json", exclude={"reasons"}) for name, its in found.items()},
    }
    write_text(out / "test.json", json.dumps(made, indent=2) + "\n")
    return made
