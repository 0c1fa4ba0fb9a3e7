"""What the studies of annotators share: a seed's answers, reward models held against truth, a figure, a section."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from frontier import DEMO, run
from kilter import data, world
from kilter.records import Prompt, Sample, UnpairedFeedback
from kilter.report.panels import line, words
from kilter.report.svg import axis_over, el
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.rundir import write_json
from kilter.scorers import load_reward_scorer
from kilter.stats import Interval, mean_interval
from reward_models import BEST_OF, answers, ordered, reward, rows_of

ANSWERS = 9
PER_KIND, HELD_OUT = 640, 15
"""Prompts of each kind to judge, and to be measured on."""
STEP_RESPONSES, LEAST_STEPS = 96, 40
"""Responses that a step learns from, and how many steps there are at least: few judgements are gone over more often."""


class Material(NamedTuple):
    """What all judgements of a seed are about, and what all its reward models are measured on."""

    sft: str
    prompts: list[Prompt]
    """In the order of work; each has two different answers or more."""
    texts: list[list[str]]
    """The different ones of a prompt's `ANSWERS` answers."""
    samples: list[Sample]
    """Held-out prompts' answers, `DRAWN` each."""
    true: list[list[float]]


def material(out: Path, seed: int) -> Material:
    """The demo's SFT model of a seed and its answers, drawn once."""
    base = run(out, "base", seed, {"sft": DEMO["sft"]})
    sft = str(base.stage(1, "sft").result.resolve())
    rows = []
    for split, per_kind, drawn in (("train", PER_KIND, {"drawn": ANSWERS}), ("held_out", HELD_OUT, {})):
        file = out / f"seed-{seed}" / f"{split}-{per_kind}.json"
        prompts = world.prompts(split=split, per_kind=per_kind, seed=seed)
        if not file.exists():
            write_json(file, answers(sft, seed, per_kind, split=split, **drawn)[1])
        rows.append((prompts, json.loads(file.read_text())))
    (asked, texts), (judged, held) = rows
    unique = [list(dict.fromkeys(text for text in row if text.strip())) for row in texts]
    order = [at for at in np.random.default_rng(seed).permutation(len(asked)).tolist() if len(unique[at]) > 1]
    samples = [Sample(prompt.prompt, text) for prompt, row in zip(judged, held, strict=True) for text in row]
    true = rows_of(world.true_reward().score(samples))
    return Material(sft, [asked[at] for at in order], [unique[at] for at in order], samples, true)


def learned(out: Path, seed: int, name: str, given: Material, records: Sequence[Any], **more: Any) -> dict[str, Any]:
    """What a reward model of these records is worth: how often it orders two answers as the truth does, and the true
    reward of the best of `BEST_OF` by it. The model itself is not kept."""
    path = out / f"seed-{seed}" / f"{name}.jsonl"
    data.write(path, records)
    thumbs = [record.prompt for record in records if isinstance(record, UnpairedFeedback)]  # together by prompt
    responses = len(thumbs) or sum(len(record.responses) for record in records)
    groups = len(set(thumbs)) or len(records)
    batch = max(1, round(STEP_RESPONSES * groups / responses))
    epochs = max(DEMO["reward"]["epochs"], LEAST_STEPS * batch / groups)
    stage = reward(model=given.sft, data=str(path.resolve()), held_out=0.0, epochs=epochs, optim={"batch_size": batch})
    done = run(out, name, seed, {"reward": stage | more})
    scores = rows_of(load_reward_scorer(str(done.stage(1, "reward").result)).score(given.samples))
    shutil.rmtree(done.path)
    path.unlink()
    hits = [ordered(row, true) for row, true in zip(scores, given.true, strict=True)]
    (point,) = best_of_n_curve(scores, given.true, ns=[BEST_OF])
    assert point.gold is not None
    right = [hit for row in hits for hit in row]
    return {"accuracy": fmean(right), "pairs": len(right), "best_of_n": point.gold.mean, "responses": responses}


def cell(out: Path, study: str, name: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
    """Measures one cell of a study, unless it is there: OUT/STUDY/seed-S/NAME.json."""
    file = out / study / f"seed-{seed}" / f"{name}.json"
    if not file.exists():
        write_json(file, {"seed": seed, **make()})
        print(f"seed {seed}, {name}: {file.read_text().strip()}", flush=True)


def read(out: Path, study: str) -> list[dict[str, Any]]:
    """Every cell that is measured."""
    return [json.loads(file.read_text()) for file in sorted(out.glob(f"{study}/seed-*/*.json"))]


# The page ------------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A picture of several lines, each of points with an interval."""

    title: str
    below: str
    series: Mapping[str, Sequence[tuple[float, Interval]]]
    level: Mapping[str, float] = {}
    """Name -> height of a dashed line."""
    doubling: bool = False
    """The axis below goes by doublings."""


SIZE, LEGEND, MARGIN = (470.0, 340.0), 230.0, 46.0
COLOURS = ("#1b6ca8", "#c2410c", "#15803d", "#7c3aed", "#eab308", "#4b5563", "#db2777", "#0891b2")
ASIDE = 3.0
"""Pixels between the intervals of lines that are measured at the same places."""


def draw(panels: Sequence[Panel]) -> str:
    """An SVG of panels side by side, the names of the lines on the right. What leaves a panel of an interval is cut."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = dict(zip(names, COLOURS, strict=False))
    width, height = SIZE
    whole = (len(panels) * width + LEGEND, height)
    shapes = [el("rect", width=whole[0], height=whole[1], fill="#ffffff")]
    for at, panel in enumerate(panels):
        shapes += _panel(panel, at * width, colours)
    for at, name in enumerate(names):
        y = 40.0 + 20 * at
        shapes.append(line([(whole[0] - LEGEND, y), (whole[0] - LEGEND + 22, y)], colours[name], 2.4))
        shapes.append(words(name, whole[0] - LEGEND + 28, y + 4, "start", "#374151"))
    box = {"viewBox": f"0 0 {whole[0]:g} {whole[1]:g}", "xmlns": "http://www.w3.org/2000/svg"}
    return str(el("svg", *shapes, **box, font_family="system-ui, sans-serif", font_size=12.0)) + "\n"


def _panel(panel: Panel, left: float, colours: Mapping[str, str]) -> list[Markup]:
    points = [(x, one) for series in panel.series.values() for x, one in series]
    scale = math.log2 if panel.doubling else float
    across = axis_over([scale(x) for x, _ in points], left + MARGIN, left + SIZE[0] - 16, pad=0.04)
    up = axis_over([*(one.mean for _, one in points), *panel.level.values()], SIZE[1] - 52, 32, pad=0.08)
    shapes = []
    for tick, said in up.labelled_ticks(6):
        shapes.append(line([(across.start, up(tick)), (across.end, up(tick))], "#e5e7eb", 1))
        shapes.append(words(said, across.start - 6, up(tick) + 4, "end", "#6b7280"))
    ticks = [(scale(x), f"{x:,.0f}") for x in sorted({x for x, _ in points})] if panel.doubling else None
    for tick, said in ticks or across.labelled_ticks(6):
        shapes.append(words(said, across(tick), up.start + 16, "middle", "#6b7280"))
    for name, height in panel.level.items():
        dashed = {"stroke": "#9ca3af", "stroke_dasharray": "4 4"}
        shapes.append(el("path", d=f"M{across.start:.1f},{up(height):.1f}L{across.end:.1f},{up(height):.1f}", **dashed))
        shapes.append(words(name, across.end, up(height) - 4, "end", "#6b7280"))
    for at, (name, series) in enumerate(panel.series.items()):
        aside = ASIDE * (at - (len(panel.series) - 1) / 2) if panel.doubling else 0.0
        places = [(across(scale(x)) + aside, up(one.mean)) for x, one in series]
        shapes.append(line(places, colours[name], 2.4))
        for (x, y), (_, one) in zip(places, series, strict=True):
            ends = [min(max(up(value), up.end), up.start) for value in (one.low, one.high)]
            shapes.append(line([(x, ends[0]), (x, ends[1])], colours[name], 1))
            shapes.append(el("circle", cx=x, cy=y, r=3.0, fill=colours[name]))
    shapes.append(words(panel.title, across.start, 20, "start", "#111827", bold=True))
    shapes.append(words(panel.below, (across.start + across.end) / 2, SIZE[1] - 14, "middle", "#374151"))
    return shapes


def over_seeds(rows: Sequence[Mapping[str, Any]], figure: str) -> Interval:
    """The mean over seeds; of one seed nothing is known of the rest."""
    return mean_interval([row[figure] for row in rows])


def said(found: Interval, sign: str = "") -> str:
    """A mean with its interval, as tables show it."""
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def write(docs: Path, name: str, panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]], section: str) -> None:
    """NAME.svg and NAME.json, and the section of studies.md between the marks of its name, new at its end."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.svg").write_text(draw(panels), encoding="utf-8")
    (docs / f"{name}.json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    put(docs / "studies.md", name, section)


def put(page: Path, name: str, section: str) -> None:
    """A section between the marks of its name, new at the page's end."""
    begin, end = f"<!-- {name}: made by tools/{name}.py -->\n", f"<!-- end of {name} -->\n"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    head, found, rest = before.partition(begin)
    after = rest.partition(end)[2] if found else ""
    page.write_text((head if found else head.rstrip("\n") + "\n\n") + begin + section.rstrip("\n") + "\n" + end + after)
