"""Stages side by side: processes that each run one task after another, told and heard over pipes, a JSON object a line.

A worker ends when the pipe to it closes, so none outlives the run that started it, however that ended.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kilter import errors
from kilter.config import EvalStage, Recipe, stage_inputs
from kilter.errors import KilterError, RunError
from kilter.rundir import RunDir
from kilter.stages.progress import Watch


@dataclass(frozen=True, slots=True)
class Task:
    """A stage, or one model of an evaluation."""

    stage: str
    model: str | None
    """Which model of the evaluation's; None: the whole stage."""
    needs: frozenset[str]
    """Stages that must have ended."""

    @property
    def name(self) -> str:
        """As people see it."""
        return self.stage if self.model is None else f"{self.stage} of {self.model}"


def tasks_of(recipe: Recipe) -> list[Task]:
    """What can be done apart: every stage but the evaluations, and of each of these the models one by one.

    An evaluation itself remains: it gathers what its models gave.
    """
    found = []
    for name, stage in recipe.stages.items():
        inputs = [(place, value) for place, value in stage_inputs(stage) if value in recipe.stages]
        if not isinstance(stage, EvalStage):
            found.append(Task(name, None, frozenset(value for _, value in inputs)))
            continue
        for model in stage.models:
            needs = {value for place, value in inputs if not place.startswith("models.") or place == f"models.{model}"}
            found.append(Task(name, model, frozenset(needs)))
    return found


def side_by_side(recipe: Recipe, run: RunDir, watch: Watch) -> dict[str, float]:
    """Do all tasks of `recipe` in `recipe.jobs` processes; each starts when the stages it needs have ended.

    Returns:
        Seconds of work by stage, of the tasks done in this call.
    Raises:
        KilterError: the first that a task raised; the other tasks are ended, and go on with the next call.
    """
    ended = {name for at, name in enumerate(recipe.stages, 1) if run.stage(at, name).done is not None}
    waiting = [task for task in tasks_of(recipe) if task.stage not in ended]
    seconds: dict[str, float] = defaultdict(float)
    heard: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
    idle = [_Worker(run, heard, watch.beside()) for _ in range(min(recipe.jobs, len(waiting)))]
    workers = list(idle)
    try:
        while waiting or len(idle) < len(workers):
            for ready in [task for task in waiting if task.needs <= ended][: len(idle)]:
                waiting.remove(ready)
                idle.pop(0).start(ready)
            worker, event = heard.get()
            task, spent = worker.task, worker.take(event)
            if task is not None and spent is not None:
                seconds[task.stage] += spent
                ended |= set() if task.model else {task.stage}
                idle.append(worker)
    finally:
        for worker in workers:
            worker.end()
    return seconds


class _Worker:
    """One process, from the parent's side."""

    def __init__(self, run: RunDir, heard: queue.Queue[Any], watch: Watch) -> None:
        self.task: Task | None = None
        self._watch = watch
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kilter.stages.worker", str(run.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # a recipe's functions are found as here
            start_new_session=True,  # Ctrl-C reaches the parent, which ends its workers
        )
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: queue.Queue[Any]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard.put((self, json.loads(line)))
        heard.put((self, None))

    def start(self, task: Task) -> None:
        """Give it a task."""
        assert self._process.stdin is not None
        self.task = task
        try:
            self._process.stdin.write(json.dumps({"stage": task.stage, "model": task.model}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; the end of its output says so

    def take(self, event: Mapping[str, Any] | None) -> float | None:
        """Show what it reports. Returns the seconds of work when its task has ended."""
        name = self.task.name if self.task else "a worker"
        if event is None:
            code = self._process.wait()
            raise RunError(
                f"{name}: its process ended with code {code} before its work did: too little memory, or the error "
                "above; the same command goes on from the last checkpoint"
            )
        [(kind, value)] = event.items()
        if kind == "error":
            raise _error(value["type"])(value["text"])
        if kind == "ended":
            self.task = None
            return float(value)
        if kind == "say":
            self._watch.say(f"{name}: {value.lstrip()}")
        elif kind == "say_once":
            self._watch.say_once(value)  # without the stage: another says the same
        elif kind == "begin":
            self._watch.begin(**value)
        else:
            self._watch.step(**value)
        return None

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()


def _error(name: str) -> type[KilterError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, KilterError) else RunError
