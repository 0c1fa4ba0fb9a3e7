"""What `kilter world failures` is told: a museum of failures, each exhibit a recipe with its fix beside it."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from kilter.config.fields import Model, Name
from kilter.config.stages import Claim

SHARED, SHEETS = "shared.", "sheets."
"""Beginnings of what a stage of an exhibit names: a stage that all exhibits share, and a rule sheet of its own."""


class Measured(Model):
    """The figure that an exhibit is about."""

    metric: str
    """A figure of an answer: `true_reward`, `tokens`, or a flag of the evaluation's `measure`."""
    name: str
    """What it is called."""
    of: float | None = None
    """What is shown is this, less the figure: of 10 rules kept, those that are broken."""


class Exhibit(Model):
    """One failure: what pays for it, what becomes of it, and the same with the fault mended."""

    title: str
    about: str
    """What is wrong with the reward or the numbers, and what follows."""
    fix: str
    """What the mended run does otherwise."""
    sheets: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Rule sheets, which stages name as `sheets.NAME`."""
    stages: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Stages of a recipe; `shared.NAME` is a stage that all exhibits share. One is an evaluation, whose claims say what
    the exhibit should show; its models are called as their runs."""
    broken: Annotated[tuple[str, ...], Field(min_length=1)]
    """The runs that fail: stages of kind `rl`."""
    mended: str
    """The run with the fix, `shared.NAME` among them."""
    measured: Measured
    detectors: tuple[str, ...] = ()
    """What sees it: symptoms of the guard, or `signs`. Each run that fails shows one of them, and the mended none."""
    rollouts: tuple[Claim, ...] = ()
    """Claims about the last rollouts: `RUN.FIGURE`, a figure of metrics.jsonl without its `rollout/`."""
    kinds: tuple[str, ...] = ()
    """Answers to the first prompts of these kinds are shown; none given: of all kinds, until there are enough."""

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that fail, and the mended one."""
        return (*self.broken, self.mended)

    @model_validator(mode="after")
    def _names_its_runs(self) -> Self:
        for run in self.runs:
            if not run.startswith(SHARED) and self.stages.get(run, {}).get("stage") != "rl":
                raise ValueError(f"{run!r} is among the runs of {self.title!r} and is no stage of kind rl of it")
        if sum(stage.get("stage") == "eval" for stage in self.stages.values()) != 1:
            raise ValueError(f"{self.title!r} needs one stage of kind eval, which measures start and runs")
        return self


class Museum(Model):
    """All exhibits, and what they share."""

    parts: dict[str, Any] = Field(default_factory=dict)
    """For YAML's anchors: what is written once and stands in several stages. It is not read."""
    shared: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Stages of the run that comes first: the policy at the start, a sound reward, a clean run."""
    start: str
    """Which of them is the policy that all runs start from."""
    exhibits: Annotated[dict[Name, Exhibit], Field(min_length=1)]
