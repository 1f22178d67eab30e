"""What a label curve says, in sentences; 'no difference' and 'worse' are answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.statistics import FEWEST_GROUPS
from finetune.label_curve.statistics import FEWEST_DRAWS, Labels

Record = Mapping[str, Any]


def verdicts(record: Record) -> list[str]:
    """For every arm beside the baseline, what holds at once for all budgets, and how many labels it saves."""
    return [sentence for arm in record["differences"] for sentence in _of_arm(record, arm)]


def grid_caution(record: Record) -> list[str]:
    """That the baseline might do better with more steps than the grid has, where val says so: then it was not at its best."""
    most, baseline = max(record["steps"]), record["baseline"]
    chosen = [steps for level in record["dice"][baseline] for steps in level["steps"]]
    ends = sum(steps == most for steps in chosen)
    if 2 * ends < len(chosen):
        return []
    how = "The grid has one number of steps" if len(record["steps"]) == 1 else "Val chose the most steps of the grid"
    where = "" if len(record["steps"]) == 1 else f" for {baseline} in {ends} of {len(chosen)} points"
    return [
        f"{how}, {most}{where}: {baseline} may do better with more, and what is said here is of networks that train no longer. "
        f"steps=[…, {4 * most}] would tell."
    ]


def _of_arm(record: Record, arm: str) -> list[str]:
    figures, baseline = record["differences"][arm], record["baseline"]
    if figures[0]["p_holm"] is None:
        return [f"{arm} and {baseline}: no verdict. {_too_few(record)}"]
    by_verdict: dict[str, list[str]] = {}
    for figure in figures:
        by_verdict.setdefault(figure["verdict"], []).append(_with(figure))
    said = []
    if "better" in by_verdict:
        said.append(f"{arm} is better than {baseline} with {_listed(by_verdict['better'])} labelled groups.")
    if "worse" in by_verdict:
        said.append(f"{arm} is WORSE than {baseline} with {_listed(by_verdict['worse'])} labelled groups.")
    if list(by_verdict) == ["no difference"]:
        said.append(f"No difference shown between {arm} and {baseline}, at any number of labels.")
    elif "no difference" in by_verdict:
        said.append(f"With {_listed(by_verdict['no difference'])} no difference is shown.")
    if "better" in by_verdict:
        said += [_saving(row, arm, baseline) for row, figure in _rows(record, arm) if figure["verdict"] == "better"]
    return [" ".join(said)]


def _with(figure: Record) -> str:
    shown = f" (Dice {signed(figure['mean'])})" if figure["verdict"] != "no difference" else ""
    return f"{figure['labels']}{shown}"


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def _rows(record: Record, arm: str) -> list[tuple[Record, Record]]:
    return list(zip(record["labels_saved"][arm], record["differences"][arm], strict=True))


def _saving(row: Record, arm: str, baseline: str) -> str:
    needs = row["baseline_needs"]
    if needs["bound"] == ">":
        return f"What {arm} has with {row['labels']}, {baseline} does not reach with {needs['labels']:g}."
    return f"What {arm} has with {row['labels']}, {baseline} has with {needed(row)}."


def needed(row: Record) -> str:
    """'14 [9, > 28]'."""
    number = Labels(**_arguments(row["baseline_needs"]))
    if row["ci95"] is None:
        return f"{number} (no interval)"
    low, high = (str(Labels(**_arguments(end))) for end in row["ci95"])
    return f"{number} [{low}, {high}]"


def saved(row: Record) -> str:
    """Labels that the baseline needs beyond the arm's own: '8 [3, > 22]'; below zero it needs fewer."""
    ends = [row["baseline_needs"], *(row["ci95"] or [])]
    shown = [_number(end["labels"] - row["labels"], end["bound"]) for end in ends]
    return shown[0] if row["ci95"] is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _number(number: float, bound: str) -> str:
    return {"=": "", "<=": "≤ ", ">": "> "}[bound] + f"{number:.0f}".replace("-0", "0").replace("-", "−")


def _arguments(end: Record) -> dict[str, Any]:
    return {"number": end["labels"], "bound": end["bound"]}


def _too_few(record: Record) -> str:
    if record["test_groups"] < FEWEST_GROUPS:
        return (
            f"{record['test_groups']} test groups are too few for an interval; it takes {FEWEST_GROUPS}. "
            "All values are shown below."
        )
    return f"{record['draws']} draw is too few for an interval; it takes {FEWEST_DRAWS}, better 5. All values are in cases.parquet."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
