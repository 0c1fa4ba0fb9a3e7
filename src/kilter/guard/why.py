"""Why a run went as it did, in plain words, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kilter.errors import RunError
from kilter.guard.causes import Course, Named, causes
from kilter.guard.rows import rows_of
from kilter.guard.watch import ALARMS, looked_back
from kilter.rundir import read_jsonl


@dataclass(frozen=True, slots=True)
class StageFound:
    """What one stage that trained showed."""

    stage: str
    """Its folder's name."""
    rollouts: int
    alarms: Sequence[Mapping[str, Any]]
    """As in guard.jsonl, in the order in which they showed."""
    failures: Sequence[str] = ()
    """Folders of steps that were not finite."""
    causes: Sequence[Named] = ()
    """Numbers of the recipe that its figures speak against, the likeliest first."""


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
        if rows or failures or named:
            found.append(StageFound(folder.name, len(rows), said, failures, named))
    if not found and not (run / "recipe.yaml").exists():
        raise RunError(f"{run}: no run is in it (no recipe.yaml, no stages); give a directory under runs/")
    return found


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
    return "\n\n".join(map(_paragraph, found))


def _paragraph(stage: StageFound) -> str:
    lines = [f"{stage.stage}, {stage.rollouts} rollouts:" if stage.rollouts else f"{stage.stage}:"]
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
    lines += [f"  a step was not finite; its batch and weights are kept in {folder}" for folder in stage.failures]
    return "\n".join(lines) if len(lines) > 1 else f"{lines[0]} no symptom"
