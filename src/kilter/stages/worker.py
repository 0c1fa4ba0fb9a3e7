"""A worker of `kilter.stages.workers`: reads tasks from its input, does them, and reports on its output."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from kilter.config import EvalStage, Recipe, load
from kilter.errors import KilterError
from kilter.rundir import RunDir
from kilter.stages.context import Context
from kilter.stages.curve import measure_path
from kilter.stages.evaluate import Evaluation
from kilter.stages.progress import Watch
from kilter.stages.run import prepare, run_stage


class Relay(Watch):
    """What a person should see, as lines to the parent, who has the screen."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def send(self, **event: Any) -> None:
        """One event."""
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()

    def say(self, text: str) -> None:
        self.send(say=text)

    def say_once(self, text: str) -> None:
        self.send(say_once=text)

    def begin(self, name: str, total: int, done: int = 0) -> None:
        self.send(begin={"name": name, "total": total, "done": done})

    def step(self, done: int, figures: Mapping[str, float] | None = None, tokens: int = 0) -> None:
        self.send(step={"done": done, "figures": dict(figures or {}), "tokens": tokens})


def work(recipe: Recipe, run: RunDir, watch: Relay, stage: str, model: str | None) -> None:
    """One task."""
    context = Context(recipe, run, stage, watch)
    # The worker of a run that was killed may still be on its last step; two must not write in one folder.
    with (context.folder.path / f".{model or 'stage'}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if model is None:
            run_stage(context)
            return
        assert isinstance(context.stage, EvalStage)
        evaluation = Evaluation(context, context.stage)
        evaluation.model(model, context.stage.models[model])
        measure_path(evaluation, model, context.stage.models[model])


def main(path: Path) -> None:
    """Do tasks until the input closes."""
    watch = Relay(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # whatever else prints must not stand among the reports
    tasks: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(1)  # the parent has gone, and with it the right to write into the run

    threading.Thread(target=listen, daemon=True).start()
    recipe = load(path / "recipe.yaml")
    prepare(recipe)
    while True:
        task = json.loads(tasks.get())
        begun = time.monotonic()
        try:
            work(recipe, RunDir(path), watch, **task)
        except KilterError as err:
            watch.send(error={"type": type(err).__name__, "text": str(err)})
        else:
            watch.send(ended=time.monotonic() - begun)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
