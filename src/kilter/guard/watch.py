"""The watch on a run: which symptoms it shows, rollout by rollout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kilter.guard.symptoms import SYMPTOMS, Row, Symptom, canary_falls

ALARMS = "guard.jsonl"
"""What the watch on a stage saw, in the stage's folder: `Alarm.to_dict` and what was done, a line each."""

SUSPICION = 0.5
"""Share of the threshold above which a symptom that has to last is suspected: by the time that it shows, the policies
of the rollouts before have most of it already."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A symptom that a run began to show."""

    symptom: str
    rollout: int
    """From 0; the policy that sampled it had learned from so many."""
    value: float
    threshold: float
    phrase: str = ""
    """That which has spread; of a canary, its name."""

    @property
    def of(self) -> Symptom:
        """What it is a symptom of."""
        return SYMPTOMS[self.symptom]

    @property
    def says(self) -> str:
        """In words."""
        return self.of.says.format(value=self.value, threshold=self.threshold, phrase=self.phrase)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the words."""
        return {**asdict(self), "says": self.says, "causes": self.of.causes, "remedies": self.of.remedies}


class Watch:
    """Looks at the rows of a run as they come.

    Args:
        thresholds: by symptom, in place of the table's.
        without: symptoms that are not looked for.
    """

    def __init__(self, thresholds: Mapping[str, float] | None = None, *, without: Iterable[str] = ()) -> None:
        given, left_out = dict(thresholds or {}), set(without)
        self._thresholds = {
            name: given.get(name, one.threshold) for name, one in SYMPTOMS.items() if name not in left_out
        }
        self.rows: list[dict[str, float]] = []
        self._above: dict[str, int] = {}
        self._suspected: list[str] = []

    @property
    def shown(self) -> list[str]:
        """The symptoms of the last row: all whose statistic has been above its threshold for long enough."""
        return [name for name, times in self._above.items() if times >= SYMPTOMS[name].lasting]

    @property
    def suspected(self) -> list[str]:
        """The symptoms that are above their threshold in the last row, for however short a time, or above half of it
        where they have to last."""
        return list(self._suspected)

    def look(self, row: Row, *, phrase: str = "") -> list[Alarm]:
        """Takes a rollout in; returns the symptoms that it begins to show."""
        self.rows.append(dict(row))
        found, above, suspected = [], {}, []
        for name, threshold in self._thresholds.items():
            one = SYMPTOMS[name]
            if one.start and len(self.rows) > 1:
                continue
            value = one.statistic(self.rows)
            if value is None:
                continue
            if value > (SUSPICION if one.lasting > 1 else 1.0) * threshold:
                suspected.append(name)
            if not value > threshold:
                continue
            above[name] = self._above.get(name, 0) + 1
            if above[name] == one.lasting:
                about = phrase if name == "phrase" else self._worst() if name == "canary" else ""
                found.append(Alarm(name, len(self.rows) - 1, value, threshold, about))
        self._above, self._suspected = above, suspected
        return found

    def _worst(self) -> str:
        """The canary that has fallen most."""
        falls = canary_falls(self.rows)
        return max(falls, key=falls.__getitem__)

    def forget(self, count: int) -> None:
        """The last rows were of a policy that is gone."""
        self.rows = self.rows[: len(self.rows) - count]
        self._above, self._suspected = {}, []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows], "above": dict(self._above), "suspected": self.suspected}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.rows = [dict(row) for row in state["rows"]]
        self._above, self._suspected = dict(state["above"]), list(state["suspected"])


def looked_back(rows: Iterable[Row], thresholds: Mapping[str, float] | None = None) -> list[Alarm]:
    """All alarms of a run that has ended, from its rows: those that its watch gave, had it none to obey."""
    watch = Watch(thresholds)
    return [alarm for row in rows for alarm in watch.look(row)]
