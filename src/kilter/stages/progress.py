"""What a person sees while a run works: stage, step, tokens a second, time left, two or three figures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0  # where there is no terminal, one plain line so often


class Watch:
    """Progress of a run: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None, screen: Progress | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._bar = screen or Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=None, figures="", visible=False)
        self._once: set[str] = set()
        self._name, self._total, self._tokens = "", 0, 0
        self._began = self._said = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def beside(self) -> Watch:
        """Another bar on the same screen, for work that goes on at the same time."""
        other = Watch(self.console, self._bar)
        other._once = self._once
        return other

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, markup=False)

    def say_once(self, text: str) -> None:
        """The same, unless this run has said it."""
        if text not in self._once:
            self._once.add(text)
            self.say(text)

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """A new stage or part of one, of `total` steps."""
        self._name, self._total, self._tokens = name, total, 0
        self._began = self._said = time.monotonic()
        self._bar.reset(self._task, total=total, completed=done, description=name, figures="", visible=True)

    def step(self, done: int, figures: Mapping[str, float] | None = None, tokens: int = 0) -> None:
        """`done` steps are behind us; `figures`: the few that matter; `tokens`: since the last call."""
        self._tokens += tokens
        now = time.monotonic()
        shown = [f"{name} {value:.3g}" for name, value in (figures or {}).items()]
        if self._tokens:
            shown.append(f"{self._tokens / max(now - self._began, 1e-9):,.0f} tokens/s")
        self._bar.update(self._task, completed=done, figures="  ".join(shown))
        if not self._live and now - self._said >= QUIET_SECONDS:
            self._said = now
            self.say(f"  {self._name} {done}/{self._total}  {'  '.join(shown)}")
