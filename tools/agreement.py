"""From annotators' agreement to the true reward reached: crowds of growing noise, and of growing carelessness.

    python tools/agreement.py --out runs/annotation               measure what is not measured yet; resumable
    python tools/agreement.py --out runs/annotation --draw docs   the figure, its numbers and a section of studies.md

OUT is that of tools/annotation.py, whose SFT models and answers it uses. At each level two crowds of the same liking
rank the same answers; their agreement is measured on both, and a reward model learns from the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from annotated import Material, Panel, cell, learned, material, over_seeds, read, said, write
from kilter import world
from kilter.data.convert import ranking_of
from kilter.records import Judgement, Sample
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.stats import agreement
from reward_models import BEST_OF

WIDTH, RANKINGS = 4, 800
LEVELS = {
    **{f"noise {noise:g}": {"noise": noise, "side_bias": 0.0} for noise in (0.0, 0.05, 0.15, 0.3, 0.55, 1.0, 1.6)},
    **{f"flips {rate:g}": {"noise": 0.05, "side_bias": 0.0, "flip_rate": rate} for rate in (0.05, 0.1, 0.2, 0.3)},
}
SERIES = {"noise": "noise in every judgement", "flips": "whole rankings turned round"}


def verdicts(judged: Sequence[Judgement], who: str) -> list[tuple[Any, str, int]]:
    """Item, rater and verdict of every two answers: 1 where the first is better, 0 for a tie, -1."""
    return [
        ((place, one, other), who, int(np.sign(row.ranks[other] - row.ranks[one])))
        for place, row in enumerate(judged)
        for one, other in combinations(range(len(row.ranks)), 2)
    ]


class Doubled(NamedTuple):
    """What two crowds say of the same answers."""

    first: list[Judgement]
    kappa: float
    alpha: float
    raw: float
    right: float
    """How often the first orders two answers as the truth does, of those that it does not call equal."""


def doubled(given: Material, seed: int, level: str) -> Doubled:
    """Two crowds' rankings and their agreement on the verdicts."""
    prompts, texts = given.prompts[:RANKINGS], [row[:WIDTH] for row in given.texts[:RANKINGS]]
    one, two = (world.panel(seed=1000 * seed + crowd, **LEVELS[level]).rank(prompts, texts) for crowd in (1, 2))
    ratings = agreement.Ratings.of(verdicts(one, "one") + verdicts(two, "two"), categories=(-1, 0, 1))
    found = agreement.cohen(ratings, "one", "two"), agreement.alpha(ratings), agreement.raw(ratings)
    kappa, alpha, raw = (float(coefficient.value()) for coefficient in found)
    truth = world.true_reward()
    right = []
    for row in one:
        true = [score.value for score in truth.score([Sample(row.prompt, text) for text in row.responses])]
        for a, b in combinations(range(len(true)), 2):
            if true[a] != true[b] and row.ranks[a] != row.ranks[b]:
                right.append(float((true[a] > true[b]) == (row.ranks[a] < row.ranks[b])))
    return Doubled(one, kappa, alpha, raw, fmean(right))


def measure(out: Path, seed: int, level: str, given: Material) -> dict[str, Any]:
    """One level: agreement, and what a reward model of the first crowd's rankings is worth."""
    both = doubled(given, seed, level)
    name = level.replace(" ", "-")
    found = learned(out, seed, name, given, [ranking_of(one) for one in both.first])
    (best,) = best_of_n_curve(given.true, given.true, ns=[BEST_OF])
    about = {"kappa": both.kappa, "alpha": both.alpha, "raw": both.raw, "label_accuracy": both.right}
    ends = {"mean_of_answers": float(np.mean(given.true)), "best_by_truth": best.proxy.mean}
    return {"level": level, **about, **found, **ends}


SECTION = """## From agreement to the true reward

`python tools/agreement.py`, then `--draw docs`: at each level two crowds of eight, alike but for their draws,
rank the same {rankings} prompts' {width} answers. Their agreement is Cohen's kappa and Krippendorff's alpha
(nominal: better, tie, worse) over every two answers; a reward model learns from the first crowd's rankings, as
in the study above. How often it orders two held-out answers as the truth does, and the true reward of the best
of {best_of} by it. {seeds} seeds; means with t intervals (95%) over seeds, not corrected for their number.

![Accuracy of the reward model and true reward of the best of {best_of}, against kappa](agreement.svg)

A mean answer is worth {mean:.3f}, and the best of {best_of} by the truth itself {best:.3f}. All these people
like flattery alike: kappa does not see what annotators have in common.
"""
COLUMNS = ("kappa", "alpha", "label_accuracy", "accuracy", "best_of_n")


def section(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was done, and a line for each level."""
    about = SECTION.format(
        rankings=RANKINGS,
        width=WIDTH,
        best_of=BEST_OF,
        seeds=len({row["seed"] for row in rows}),
        mean=fmean(row["mean_of_answers"] for row in rows),
        best=fmean(row["best_by_truth"] for row in rows),
    )
    lines = [
        "| annotators | kappa | alpha | labels as in truth | reward model as in truth | true reward, best of "
        f"{BEST_OF} |",
        "|---|---|---|---|---|---|",
    ]
    for level, own in by_level(rows).items():
        lines.append(f"| {level} | {' | '.join(said(over_seeds(own, name)) for name in COLUMNS)} |")
    return "\n".join([about, *lines])


def by_level(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each level that was measured."""
    held = {level: [row for row in rows if row["level"] == level] for level in LEVELS}
    return {level: own for level, own in held.items() if own}


def panel_of(rows: Sequence[dict[str, Any]], figure: str, title: str, **level: float) -> Panel:
    """A figure against kappa, a line for noise and one for flips."""
    series = {}
    for kind, name in SERIES.items():
        own = [found for level, found in by_level(rows).items() if level.startswith(kind)]
        points = sorted((fmean(row["kappa"] for row in found), over_seeds(found, figure)) for found in own)
        if points:
            series[name] = points
    return Panel(title, "Cohen's kappa of two crowds", series, level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/annotation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--draw", type=Path, help="write agreement.svg, agreement.json and the section of studies.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.draw is not None:
        rows = read(options.out, "agreement")
        mean = fmean(row["mean_of_answers"] for row in rows)
        panels = [
            panel_of(rows, "accuracy", "how often two answers are ordered as in truth"),
            panel_of(rows, "best_of_n", f"true reward of the best of {BEST_OF}", **{"a mean answer": mean}),
        ]
        write(options.draw, "agreement", panels, rows, section(rows))
        return
    for seed in options.seeds:
        given = material(options.out, seed)
        for level in options.levels:
            make = partial(measure, options.out, seed, level, given)
            cell(options.out, "agreement", level.replace(" ", "-"), seed, make)


if __name__ == "__main__":
    main()
