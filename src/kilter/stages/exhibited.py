"""What the museum of failures shows: of each exhibit its claims, courses, detectors, samples, from its runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kilter.config import SHARED, Claim, Exhibit
from kilter.evals import Answer, read_answers
from kilter.guard import ALARMS, looked_back, rows_of
from kilter.report.failures import draw_failures, failures_page, markdown, seen_in
from kilter.rundir import StageDir, read_jsonl, write_json, write_text
from kilter.stages.failures import COMMON, Building, label
from kilter.stages.summary import held, values_of
from kilter.stats import mean_interval

Figures = dict[str, Any]
Rows = Sequence[Mapping[str, float]]
ROLLOUT = "rollout/"
LAST = 5
"""Rollouts of which claims about rollouts are the mean: the last ones of a run."""
SHOWN = 4
"""Prompts whose answers are shown."""


def write_museum(told: Figures, out: Path) -> Path:
    """failures.json, .svg, .md and .html in `out`. Returns the page."""
    write_json(out / "failures.json", told)
    page = out / "failures.html"
    for name, text in {".svg": f"{draw_failures(told)}\n", ".md": markdown(told), ".html": failures_page(told)}.items():
        write_text(page.with_suffix(name), text)
    return page


def figures_of(building: Building) -> Figures:
    """Every figure of the museum, for JSON: an interval is `{mean, low, high, n}`."""
    exhibits = {name: _exhibit(building, name, one) for name, one in building.exhibits.items()}
    seconds = {COMMON: _seconds(building, COMMON)} | {name: _seconds(building, name) for name in exhibits}
    return {"seed": building.shared.seed, "exhibits": exhibits, "seconds": seconds}


def _exhibit(building: Building, name: str, exhibit: Exhibit) -> Figures:
    folders = {label(run): building.stage(name, run) for run in exhibit.runs}
    rows = {run: rows_of(read_jsonl(folder.metrics)) for run, folder in folders.items()}
    measured = next(place for place, stage in exhibit.stages.items() if stage["stage"] == "eval")
    answers = {
        model: read_answers(building.out / name / "evaluation" / f"{model}.jsonl") for model in ("start", *folders)
    }
    alarms = {run: _alarms(folder, rows[run]) for run, folder in folders.items()}
    signs = {run: (folder.done or {})["signs"] for run, folder in folders.items()}
    claims = [
        *(building.stage(name, measured).done or {})["claims"],
        *(_of_rollouts(one, rows) for one in exhibit.rollouts),
        *_of_detectors(exhibit, alarms, signs),
    ]
    return {
        "title": exhibit.title,
        "about": exhibit.about,
        "fix": exhibit.fix,
        "recipe": f"{name}/recipe.yaml",
        "broken": [label(run) for run in exhibit.broken],
        "mended": label(exhibit.mended),
        "shown": all(one["held"] for one in claims),
        "claims": claims,
        "measured": {"name": exhibit.measured.name, "figures": _measured(exhibit, answers, rows)},
        "courses": {run: _course(own) for run, own in rows.items()},
        "alarms": alarms,
        "signs": signs,
        "audits": _audits(building, name, exhibit),
        "samples": _samples(exhibit, answers),
    }


def _of_rollouts(claim: Claim, rows: Mapping[str, Rows]) -> Figures:
    """A claim about the last rollouts of runs, paired by their place."""
    return held(claim, *(_last(rows, address) if address else {} for address in (claim.left, claim.right)))


def _of_detectors(exhibit: Exhibit, alarms: Mapping[str, list[Figures]], signs: Mapping[str, Any]) -> list[Figures]:
    """The claim that each run that fails is seen by one of the detectors, and the mended one by none."""
    if not exhibit.detectors:
        return []
    seen = {run: seen_in(run, alarms, signs).keys() & exhibit.detectors for run in alarms}
    shown = all(seen[label(run)] for run in exhibit.broken) and not seen[label(exhibit.mended)]
    text = f"seen by {' or '.join(exhibit.detectors)}, and not where it is mended"
    return [{"claim": text, "figure": None, "held": shown}]


def _last(rows: Mapping[str, Rows], address: str) -> dict[int, float]:
    """Place from the end -> value of `run.figure`."""
    run, _, figure = address.partition(".")
    own = [row[ROLLOUT + figure] for row in rows[run] if ROLLOUT + figure in row]
    return dict(enumerate(own[: -LAST - 1 : -1]))


def _measured(exhibit: Exhibit, answers: Mapping[str, Sequence[Answer]], rows: Mapping[str, Rows]) -> Figures:
    """Model -> the exhibit's figure; of rollouts, that of the first stands for the start."""
    metric = exhibit.measured.metric
    if metric.startswith(ROLLOUT):
        known: dict[str, list[float]] = {"start": [own[0][metric] for own in rows.values()]}
        known |= {run: list(_last(rows, f"{run}.{metric.removeprefix(ROLLOUT)}").values()) for run in rows}
    else:
        known = {model: list(values_of(answers, f"{model}.{metric}").values()) for model in answers}
    of = exhibit.measured.of
    return {
        model: mean_interval(np.array(values) if of is None else of - np.array(values)).to_dict()
        for model, values in known.items()
        if values
    }


def _course(rows: Rows) -> Figures:
    """Truth and what is paid, rollout by rollout; paid: from the first rollout's mean, in its standard deviations."""
    first, spread = rows[0]["rollout/score"], rows[0]["rollout/score_std"] or 1.0
    return {
        "truth": [row.get("rollout/probe") for row in rows],
        "paid": [(row["rollout/score"] - first) / spread for row in rows],
    }


def _alarms(folder: StageDir, rows: Rows) -> list[Figures]:
    """What the guard told of, each symptom once, and whether it would have without its probe."""
    blind = {
        alarm.symptom for alarm in looked_back([{k: v for k, v in row.items() if "probe" not in k} for row in rows])
    }
    first: dict[str, Figures] = {}
    for alarm in read_jsonl(folder.path / ALARMS):
        without = {"without_probe": alarm["symptom"] in blind}
        first.setdefault(alarm["symptom"], {key: alarm[key] for key in ("symptom", "rollout", "says")} | without)
    return list(first.values())


def _audits(building: Building, name: str, exhibit: Exhibit) -> list[Figures]:
    """Of each reward model that a run of the exhibit is paid by, what its audit failed."""
    found = []
    for stage in dict.fromkeys(exhibit.stages[run]["reward"] for run in exhibit.runs if not run.startswith(SHARED)):
        own = exhibit.stages.get(stage, {}).get("stage") == "reward"
        shared = stage.startswith(SHARED)
        if own or shared:
            told = (building.stage(name, stage).done or {}).get("audit", {})
            if "passed" in told:
                found.append({"reward": label(stage), "failed": list(told["failed"])})
    return found


def _samples(exhibit: Exhibit, answers: Mapping[str, Sequence[Answer]]) -> list[Figures]:
    """The first prompts of the kinds in turn, with every model's answer."""
    start = answers["start"]
    kinds = exhibit.kinds or tuple(dict.fromkeys(one.prompt.kind for one in start))
    places = [[at for at, one in enumerate(start) if one.prompt.kind == kind] for kind in kinds]
    turns = [row[turn] for turn in range(max(map(len, places))) for row in places if turn < len(row)]
    return [
        {
            "prompt": [message._asdict() for message in start[at].prompt.prompt],
            "kind": start[at].prompt.kind,
            "answers": {
                model: {"text": own[at].text, "true_reward": own[at].true_reward} for model, own in answers.items()
            },
        }
        for at in turns[:SHOWN]
    ]


def _seconds(building: Building, name: str) -> float:
    """Of all stages of a run directory, by the clock, over all calls that they took."""
    recipe = building.shared if name == COMMON else building.recipes[name]
    prefix = SHARED if name == COMMON else ""
    return round(sum(float((building.stage(name, prefix + stage).done or {})["seconds"]) for stage in recipe.stages), 1)
