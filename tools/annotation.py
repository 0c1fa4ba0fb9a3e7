"""What annotators' time buys: pairs, rankings, thumbs and marks at equal seconds, as food for reward models.

    python tools/annotation.py --out runs/annotation               measure what is not measured yet; resumable
    python tools/annotation.py --out runs/annotation --draw docs   the figure, its numbers and a section of studies.md

Each seed has one SFT model, whose answers are drawn once; all formats are about the same answers in the same order, by
annotators of the same liking and noise, and a budget buys the first judgements that it pays for.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from annotated import (
    ANSWERS,
    LEAST_STEPS,
    STEP_RESPONSES,
    Material,
    Panel,
    cell,
    learned,
    material,
    over_seeds,
    read,
    said,
    write,
)
from kilter import world
from kilter.data.convert import ranking_of
from kilter.records import Record
from kilter.stats import mean_interval
from kilter.world.annotators import Liking
from kilter.world.effort import Effort

COST = {"choice_seconds": 2.0, "mark_seconds": 2.0}
THUMB_SECONDS = 1.0
ONE_SCALE = {"offset_spread": 0.0, "stretch_spread": 0.0, "drift": 0.0}
ALONE = 2
"""Answers of a prompt that get marks or thumbs, each on a screen of its own."""
BUDGETS = (2000, 4000, 8000, 16000, 32000, 64000)


class Format(NamedTuple):
    """How annotators are asked, and how a reward model learns from what they say."""

    name: str
    width: int = 0
    """Answers on a screen that are put in order; 0: each is judged alone."""
    options: Mapping[str, float] = MappingProxyType({})
    stage: Mapping[str, Any] = MappingProxyType({})


MARKS: dict[str, Any] = {"loss": {"name": "regression"}, "centering": 0.0}
FORMATS = {
    "pairs": Format("pairs", 2),
    "four": Format("rankings of 4", 4),
    "nine": Format(f"rankings of up to {ANSWERS}", ANSWERS),
    "thumbs": Format("thumbs", 0, {"mark_seconds": THUMB_SECONDS}, {"loss": {"name": "thumbs"}, "centering": 0.0}),
    "marks": Format("marks, own scales that drift", 0, {}, MARKS | {"standardize": "all"}),
    "standardised": Format("the same, standardised", 0, {}, MARKS | {"standardize": "annotator"}),
    "one_scale": Format("marks, one scale", 0, ONE_SCALE, MARKS | {"standardize": "all"}),
}


def bought(form: Format, given: Material, seed: int, budget: float) -> tuple[list[Record], float]:
    """The first judgements that a budget of seconds pays for, and what they took.

    Raises:
        SystemExit: there are no more answers to judge.
    """
    panel = world.panel(seed=seed, **(COST | dict(form.options)))
    least = panel.effort.ranking(0, 1.0, form.width) if form.width else ALONE * panel.effort.marking(0, 1.0, 1)
    most = 1 + int(budget / least)  # a screen takes longer than one without words; what is judged later changes nothing
    asked = list(zip(given.prompts, given.texts, strict=True))[:most]
    judged: Sequence[Any]
    if form.width:
        judged = panel.rank([prompt for prompt, _ in asked], [row[: form.width] for _, row in asked])
    else:
        alone = [(prompt, [text]) for prompt, row in asked for text in row[:ALONE]]
        ask = panel.thumbs if form.stage["loss"]["name"] == "thumbs" else panel.ratings
        judged = ask([prompt for prompt, _ in alone], [row for _, row in alone])
    spent, records = 0.0, []
    for one in judged:
        spent += one.seconds
        if spent > budget:
            return records, spent - one.seconds
        records.append(ranking_of(one) if form.width else one)
    raise SystemExit(f"{form.name}: all answers are judged in {spent:.0f} of {budget} seconds; raise PER_KIND")


def measure(out: Path, seed: int, key: str, budget: int, given: Material) -> dict[str, Any]:
    """One format at one budget."""
    records, spent = bought(FORMATS[key], given, seed, budget)
    found = learned(out, seed, f"{key}-{budget}", given, records, **FORMATS[key].stage)
    return {"format": key, "budget": budget, "spent": spent, "judgements": len(records), **found}


SECTION = """## What annotators' time buys

`python tools/annotation.py`, then `--draw docs`: reward models that learned from what the same simulated people
say in the same seconds, about the same answers; how often they order two answers to a held-out prompt as the
truth does.

![Accuracy of reward models against annotators' seconds, a line for each format](annotation.svg)

The cost model (`kilter.world.effort`), of which only the speed of reading is a published figure: {start:g} s to
open a screen and read its prompt, {word:g} s a word of the answers on it, longer where the item is hard;
{choice:g} s to choose between two, and log2 k! such choices to put k in order; {mark:g} s to give a mark from 1
to 5, {thumb:g} s a thumb. Marks and thumbs are given to {alone} answers of a prompt, each on a screen of its
own, by whom it falls to. Eight annotators; their thumbs go up against one bar for all, their marks by scales of
their own that drift (standard deviations of {offset:g} marks between people, {drift:g} over time). Every reward
model is the demo's, on about {responses} responses a step, two passes and at least {steps} steps. {seeds}
seeds, each with its own SFT model, answers and people; t intervals (95%) over seeds, one for each cell, not
corrected for their number.
"""


def section(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was done, accuracy by format and seconds, and each format against pairs, by seed."""
    budgets = sorted({row["budget"] for row in rows})
    effort, liking = Effort(), Liking()
    about = SECTION.format(
        start=effort.start_seconds,
        word=effort.word_seconds,
        choice=COST["choice_seconds"],
        mark=COST["mark_seconds"],
        thumb=THUMB_SECONDS,
        alone=ALONE,
        offset=liking.offset_spread,
        drift=liking.drift,
        responses=STEP_RESPONSES,
        steps=LEAST_STEPS,
        seeds=len({row["seed"] for row in rows}),
    )
    columns = " | ".join(f"{budget:,} s" for budget in budgets)
    rule = "---|" * len(budgets)
    lines = [f"| format | s each | {columns} |", f"|---|---|{rule}"]
    gaps = ["", f"| over pairs, by seed | {columns} |", f"|---|{rule}"]
    for key, form in FORMATS.items():
        own = [row for row in rows if row["format"] == key]
        if not own:
            continue
        each = sum(row["spent"] for row in own) / sum(row["judgements"] for row in own)
        cells = [_cell(own, budget, "accuracy") for budget in budgets]
        lines.append(f"| {form.name} | {each:.1f} | {' | '.join(cells)} |")
        if key != "pairs":
            gaps.append(f"| {form.name} | {' | '.join(_over_pairs(own, rows, budget) for budget in budgets)} |")
    return "\n".join([about, *lines, *gaps])


def _cell(own: Sequence[dict[str, Any]], budget: int, figure: str) -> str:
    values = [row[figure] for row in own if row["budget"] == budget]
    return said(mean_interval(values)) if values else "not measured"


def _over_pairs(own: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], budget: int) -> str:
    base = {row["seed"]: row["accuracy"] for row in rows if (row["format"], row["budget"]) == ("pairs", budget)}
    gaps = [row["accuracy"] - base[row["seed"]] for row in own if row["budget"] == budget and row["seed"] in base]
    return said(mean_interval(gaps), "+") if gaps else "not measured"


def panel_of(rows: Sequence[dict[str, Any]]) -> Panel:
    """Accuracy against seconds."""
    series = {}
    for key, form in FORMATS.items():
        own = [row for row in rows if row["format"] == key]
        budgets = sorted({row["budget"] for row in own})
        if own:
            cells = [[row for row in own if row["budget"] == budget] for budget in budgets]
            series[form.name] = [
                (float(budget), over_seeds(cell, "accuracy")) for budget, cell in zip(budgets, cells, strict=True)
            ]
    return Panel("how often two answers are ordered as in truth", "annotators' seconds", series, doubling=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/annotation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="annotators' seconds")
    parser.add_argument("--draw", type=Path, help="write annotation.svg, annotation.json and the section of studies.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.draw is not None:
        rows = read(options.out, "annotation")
        write(options.draw, "annotation", [panel_of(rows)], rows, section(rows))
        return
    for seed in options.seeds:
        given = material(options.out, seed)
        for budget in options.budgets:
            for key in options.formats:
                make = partial(measure, options.out, seed, key, budget, given)
                cell(options.out, "annotation", f"{key}-{budget}", seed, make)


if __name__ == "__main__":
    main()
