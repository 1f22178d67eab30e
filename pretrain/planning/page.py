"""A plan as text for the terminal."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pretrain.planning.facts import ScanFacts
from pretrain.planning.plan import Plan
from resunet.measuring import BUSY, GIB
from resunet.plain import blocks, bullet, duration, number_of, times, value_range

_REASONS = 5


def page(plan: Plan) -> str:
    """The plan as text."""
    parts = [
        ("Archive", "\n".join(_archive(plan))),
        ("Sizes and spacing", "\n".join(_sizes(plan))),
        ("Held out", "\n".join(_held_out(plan))),
        ("Time and memory", "\n".join(_cost(plan))),
        ("Cautions", "\n".join(bullet("!", one) for one in plan.cautions) or "None."),
    ]
    if plan.archive.notes:
        parts.append(("Notes", "\n".join(bullet("-", one) for one in plan.archive.notes)))
    return blocks(parts)


def _archive(plan: Plan) -> list[str]:
    scans, facts = plan.archive.scans, plan.facts
    lines = [
        f"{number_of(len(scans.cases), 'scan')} of {number_of(plan.archive.num_groups, 'group')}, "
        f"{scans.num_items:,} {scans.items} with contrast"
    ]
    if scans.spatial_dims == 2 and facts.complete:
        without = sum(one.slices for one in facts.scans) - scans.num_items
        lines[0] += f", {without:,} without, which are left out"
    if facts.rejects is not None:
        lines.append(f"{number_of(sum(count for _, count in facts.rejects), 'file')} rejected when it was indexed")
        lines += [f"  {count:,} × {reason}" for reason, count in facts.rejects[:_REASONS]]
    return lines


def _sizes(plan: Plan) -> list[str]:
    facts, views, dims = plan.facts, plan.recipe.views, plan.recipe.model.spatial_dims
    lines = [] if facts.complete else [f"of {len(facts.scans):,} scans drawn at random:"]
    for dimensions, axes in ((2, "y × x"), (3, "z × y × x")):
        its = [one for one in facts.scans if len(one.size) == dimensions]
        if its:
            lines += _sizes_of(its, axes)
    channels = Counter(one.channels for one in facts.scans)
    counted = ", ".join(f"{number} ({count:,})" for number, count in sorted(channels.items()))
    lines.append(f"channels: {counted}; trained on as data.channels={plan.recipe.data.channels}")
    window, side = views.sides_of_window(dims), views.sides(dims)
    sizes = [one.size if dims == 3 else one.plane for one in facts.scans if dims == 2 or len(one.size) == 3]
    larger = sum(any(n > most for n, most in zip(size, window, strict=True)) for size in sizes)
    smaller = sum(any(n < least for n, least in zip(size, side, strict=True)) for size in sizes)
    lines.append(f"{larger:,} of {len(sizes):,} larger than views.window ({times(window)}), read around content")
    lines.append(f"{smaller:,} of {len(sizes):,} smaller than a view ({times(side)}), which magnifies them")
    return lines


def _sizes_of(scans: Sequence[ScanFacts], axes: str) -> list[str]:
    sizes = np.array([one.size for one in scans])
    lines = [f"{len(scans):,} of {axes}: median {times(np.median(sizes, axis=0))} pixels{value_range(sizes)}"]
    spacing = np.array([one.spacing for one in scans])
    if (spacing != 1).any():
        lines.append(f"  spacing: median {times(np.median(spacing, axis=0))} mm{value_range(spacing)}")
    return lines


def _held_out(plan: Plan) -> list[str]:
    compared = (
        "the source's own val and test" if plan.recipe.data.held_out is None else "the source's val and test, and data.held_out"
    )
    if any(one.startswith("leak") for one in plan.archive.allowed):
        return [f"compared with {compared}: there are images of theirs in the archive, see the cautions"]
    return [f"compared with {compared}: none of theirs is in the archive, by patient, file, pixels or look"]


def _cost(plan: Plan) -> list[str]:
    recipe, cost, scans = plan.recipe, plan.cost, plan.archive.scans
    a_step = recipe.batch * recipe.accumulate
    encoder, rest = cost.parameters
    memory = f"{cost.memory / GIB:.2g} GiB " + ("on the GPU" if cost.device == "cuda" else "of the process at its peak")
    if cost.worker_memory:
        memory += (
            f", and up to {cost.worker_memory / GIB:.2g} GiB for each of {recipe.data.workers} that read, most of it shared"
        )
    saved = cost.checkpoint / 2**20
    lines = [
        f"{cost.step:.3g} s a step (median of {cost.steps_measured} on this machine's {cost.device}, {cost.waited / cost.step:.0%} "
        f"of it waiting for scans), {a_step / cost.step:,.0f} scans a second",
        f"{duration(plan.seconds)} for {recipe.steps:,} steps, {duration(plan.read_seconds)} of it reading the archive",
        f"{recipe.steps * a_step / scans.num_items:.3g} epochs: so often each of {scans.num_items:,} {scans.items} is shown"
        ", twice",
        memory,
        f"{encoder / 1e6:.2f} M parameters of the encoder, {rest / 1e6:.2f} M of "
        + ("the decoder and the heads" if recipe.dense is not None else "the head"),
        f"{saved:,.0f} MiB a checkpoint, {saved * (recipe.keep_checkpoints + 1):,.0f} MiB of disk while the latest "
        f"{recipe.keep_checkpoints} are kept and the next is written",
    ]
    if plan.looks:
        lines.insert(2, f"{plan.looks} looks of the probe, {cost.look:.2g} s each, {duration(plan.looks * cost.look)} of it")
    if cost.device == "cpu" and cost.busy > BUSY:
        lines.append(f"other work ran beside it (load {cost.busy:.1f} for each core): alone it is faster")
    if recipe.processes > 1:
        lines.append(
            f"measured in one process with a rank's share of the batch, {recipe.batch // recipe.processes}; {recipe.processes} "
            "ranks add the time to exchange what the loss and the optimiser need"
        )
    return lines
