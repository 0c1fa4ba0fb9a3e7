"""Why a run went as it did, in plain words, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kilter.errors import RunError, one_line, visible
from kilter.guard.causes import Course, Named, causes
from kilter.guard.rows import rows_of
from kilter.guard.symptoms import Rows
from kilter.guard.watch import ALARMS, looked_back
from kilter.rundir import StageDir, ToldSpike, furthest, read_jsonl, spikes_in

Z95 = 1.96
TEXT_TOLD = 70
"""Characters of a row's text that are said."""


@dataclass(frozen=True, slots=True)
class StageFound:
    """What one stage that trained showed."""

    stage: str
    """Its folder's name."""
    rollouts: int
    kl: tuple[float, float] | None
    """From the reference to the policy that drew the last rollout, nats an answer, and half of its 95% interval."""
    alarms: Sequence[Mapping[str, Any]]
    """As in guard.jsonl, in the order in which they showed."""
    failures: Sequence[str] = ()
    """Folders of steps that were not finite."""
    causes: Sequence[Named] = ()
    """Numbers of the recipe that its figures speak against, the likeliest first."""
    spikes: Sequence[ToldSpike] = ()
    """Steps with an unusual gradient, and the rows behind each."""


def why(run: Path) -> list[StageFound]:
    """Of each stage of a run that trained: the symptoms that its guard told of, or would have told of, and the numbers
    of its recipe that are likely to be wrong. Stages that show nothing and did not sample are left out.

    Raises:
        RunError: no run is in the folder, or its files are damaged.
    """
    found, stages = [], _stages(run / "recipe.yaml")
    for metrics in sorted(run.glob("stages/*/metrics.jsonl")):
        folder, steps = metrics.parent, read_jsonl(metrics)
        rows = rows_of(steps)
        said: Sequence[Mapping[str, Any]] = read_jsonl(folder / ALARMS)
        if not said:
            said = [alarm.to_dict() for alarm in looked_back(rows)]
        failures = sorted(str(path) for path in folder.glob("failures/*"))
        options = stages.get(folder.name.partition("-")[2], {})
        named = causes(Course(options, rows, steps, ended=(folder / "done.json").exists()))
        spikes = spikes_in(read_jsonl(StageDir(folder).spikes))
        if rows or failures or named or spikes:
            found.append(StageFound(folder.name, len(rows), _kl(rows), said, failures, named, spikes))
    if not found and not (run / "recipe.yaml").exists():
        raise RunError(f"{run}: no run is in it (no recipe.yaml, no stages); give a directory under runs/")
    return found


def _kl(rows: Rows) -> tuple[float, float] | None:
    """By the exact estimator where it was measured, else by k1; None where there is neither, or one answer alone."""
    for name in ("rollout/kl_exact", "rollout/kl_k1"):
        if rows and name in rows[-1] and f"{name}_sem" in rows[-1]:
            return rows[-1][name], Z95 * rows[-1][f"{name}_sem"]
    return None


def _stages(recipe: Path) -> dict[str, Any]:
    """The stages of a resolved recipe; none where there is no such file, or one that was damaged."""
    try:
        read = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    stages = read.get("stages") if isinstance(read, dict) else None
    return stages if isinstance(stages, dict) else {}


def in_words(found: Sequence[StageFound]) -> str:
    """A paragraph for each stage."""
    if not found:
        return "No stage of this run sampled from a policy, no step failed, and no number stands out."
    return visible("\n\n".join(map(_paragraph, found)))


def _paragraph(stage: StageFound) -> str:
    sampled = f", {stage.rollouts} rollouts" if stage.rollouts else ""
    if stage.kl is not None:
        sampled += f", at the last one {stage.kl[0]:.3g} ± {stage.kl[1]:.2g} nats an answer from the reference"
    lines = [f"{stage.stage}{sampled}:"]
    first: dict[str, Mapping[str, Any]] = {}
    for alarm in stage.alarms:
        first.setdefault(alarm["symptom"], alarm)
    for symptom, alarm in first.items():
        again = [str(other["rollout"]) for other in stage.alarms if other["symptom"] == symptom][1:]
        since = f"  from rollout {alarm['rollout']}" + (f", again from {', '.join(again)}" if again else "")
        lines += [
            f"{since}: {symptom}: {alarm['says']}",
            f"    likely: {'; '.join(alarm['causes'])}",
            f"    try: {'; '.join(alarm['remedies'])}",
        ]
    for place, one in enumerate(stage.causes):
        likely = "most likely wrong" if not place else "also"
        lines += [f"  {likely}: {one.cause} ({one.times:.1f} times beyond what is usual): {one.says}"]
        lines += [f"    try: {one.remedy}"]
    lines += _spiked(stage.spikes)
    lines += [f"  a step was not finite; its batch and weights are kept in {folder}" for folder in stage.failures]
    return "\n".join(lines) if len(lines) > 1 else f"{lines[0]} no symptom"


def _spiked(spikes: Sequence[ToldSpike]) -> list[str]:
    """The steps whose gradients were furthest from usual, and of each the rows that most of it came from."""
    lines = []
    worst = furthest(spikes)
    for spike in worst:
        lines.append(f"  step {spike.step}: its gradient was {spike.times:.0f} times the usual one; it came from")
        lines += [
            f"    {row['share']:.0%} {one_line(row['name'])}: {_short(row['prompt'])} -> "
            + " | ".join(map(_short, row["responses"]))
            for row in spike.rows
        ]
        if not spike.rows:
            lines[-1] += " rows that are not known: several processes trained"
    if more := len(spikes) - len(worst):
        lines.append(f"  {more} more such steps are in spikes.jsonl")
    if lines:
        lines.append("    try: look at these rows, and take out those that are wrong; lower the learning rate")
    return lines


def _short(text: str) -> str:
    """A text in a few words, on one line: its end is what an answer is about."""
    words = one_line(text)
    return words if len(words) <= TEXT_TOLD else f"...{words[3 - TEXT_TOLD :]}"
