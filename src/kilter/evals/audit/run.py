"""The audit of a scorer: what its gaps are worth, what it likes that is no quality, and what fails."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kilter.config import LEAST_PROMPTS
from kilter.errors import DataError
from kilter.evals.audit import edits
from kilter.evals.audit.cases import Material
from kilter.evals.audit.detectors import (
    DETECTORS,
    OFF_ASKS,
    OFF_DISTRIBUTION,
    OFF_THRESHOLD,
    Case,
    Contrast,
    Direction,
)
from kilter.evals.audit.effects import Effect, Spread, holm, ratio, slope, spread_of, within
from kilter.evals.audit.longer import Figures, longer, longer_by_kind
from kilter.records import Sample, Scorer
from kilter.stats import Interval, clustered_share
from kilter.stats.calibration import Calibration, calibration
from kilter.stats.intervals import Floats, numbered

LEVEL = 0.05
"""How often, at most, any detector alarms of a reward that has no effect above its thresholds."""
ACCURACY = "accuracy"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a detector found."""

    name: str
    asks: str
    direction: Direction
    threshold: float
    effect: Effect | None
    """None: too few prompts have what it asks about."""
    p: float | None
    """Of an effect no larger than the threshold, Holm's over all detectors that were measured."""
    unscored: int
    """Edits left out because the reward could not score one of their texts."""

    @property
    def failed(self) -> bool:
        """Whether the effect is surely beyond the threshold."""
        return self.p is not None and self.p <= LEVEL

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        verdict = "not measured" if self.effect is None else "failed" if self.failed else "passed"
        return {
            "name": self.name,
            "asks": self.asks,
            "direction": self.direction,
            "threshold": self.threshold,
            "effect": None if self.effect is None else self.effect.interval.to_dict(),
            "p": self.p,
            "unscored": self.unscored,
            "verdict": verdict,
        }


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything that was measured."""

    calibration: Calibration
    by_kind: Mapping[str, Interval]
    """Accuracy."""
    by_annotator: Mapping[str, Interval]
    findings: tuple[Finding, ...]
    length: Mapping[str, Interval]
    """Slope on log2 words within a prompt, in standard deviations: `raw`, and `partial` beside the verdicts; where
    lengths differ. Neither can fail: good answers may be the longer ones."""
    longer: Figures
    """How often the longer response is the better, and how often the reward prefers it: see `longer`."""
    longer_by_kind: Mapping[str, Figures]
    paraphrase: Interval | None
    """Root mean square of what a paraphrase changes, in standard deviations; it cannot fail."""
    spread: float
    """The standard deviation of rewards of responses to one prompt, in the reward's own unit."""
    prompts: int
    left_out: int
    unscored: int
    """Comparisons left out because the reward could not score a response."""

    @property
    def failed(self) -> tuple[str, ...]:
        """What failed, by name."""
        right = (ACCURACY,) if self.calibration.accuracy.low <= 0.5 else ()
        return *right, *(one.name for one in self.findings if one.failed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": not self.failed,
            "failed": list(self.failed),
            "level": LEVEL,
            "prompts": self.prompts,
            "left_out": self.left_out,
            "unscored": self.unscored,
            "spread": self.spread,
            "calibration": self.calibration.to_dict(),
            "by_kind": {name: one.to_dict() for name, one in self.by_kind.items()},
            "by_annotator": {name: one.to_dict() for name, one in self.by_annotator.items()},
            "detectors": [finding.to_dict() for finding in self.findings],
            "length": {name: one.to_dict() for name, one in self.length.items()},
            "longer": {name: one.to_dict() for name, one in self.longer.items()},
            "longer_by_kind": {
                kind: {name: one.to_dict() for name, one in row.items()} for kind, row in self.longer_by_kind.items()
            },
            "paraphrase": None if self.paraphrase is None else self.paraphrase.to_dict(),
            "not_applicable": {"position": "each response is scored by itself: there is no first and no second place"},
        }


class Rewards:
    """What a scorer says of samples, each asked for once."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._known: dict[Hashable, float | None] = {}

    def ask(self, samples: Iterable[Sample]) -> None:
        """Score what is not known yet, all at once."""
        new = {key: sample for sample in samples if (key := _key(sample)) not in self._known}
        scores = self._scorer.score(list(new.values()))
        self._known |= {key: score.value for key, score in zip(new, scores, strict=True)}

    def __call__(self, sample: Sample) -> float | None:
        return self._known[_key(sample)]


def _key(sample: Sample) -> Hashable:
    return sample.messages, sample.text


def audit(
    scorer: Scorer,
    found: Material,
    *,
    rewards: Rewards | None = None,
    detectors: Sequence[str] = (*DETECTORS, OFF_DISTRIBUTION),
) -> Audit:
    """Ask a scorer about everything.

    A detector fails when its effect is surely beyond its threshold: p of an effect no larger, by Holm's method over
    all that were measured, at most LEVEL. So noise alone lets a reward without faults fail with that probability at
    most, however many detectors there are.

    Args:
        rewards: of the same scorer, for who wants to ask for more than the audit does.
        detectors: which; the family that Holm's method is over.
    Raises:
        DataError: fewer than LEAST_PROMPTS prompts could be scored, or all responses to every prompt have one reward.
    """
    rewards = rewards or Rewards(scorer)
    contrasts = {name: [list(DETECTORS[name].contrasts(case)) for case in found.cases] for name in _of(detectors)}
    rewards.ask(_samples(found, contrasts))
    own = [
        [(text, value) for text in texts if (value := rewards(Sample(case.prompt, text))) is not None]
        for case, texts in zip(found.cases, found.responses, strict=True)
    ]
    values = [np.array([value for _, value in row]) for row in own]
    spread = spread_of(values)
    if int((spread.freedom > 0).sum()) < LEAST_PROMPTS:
        raise DataError(
            f"the reward could score two responses of fewer than {LEAST_PROMPTS} of {len(found.cases)} prompts; are "
            "they too long for it?"
        )
    if not spread.squares.any():
        raise DataError("the reward gives all responses to a prompt the same number: there is nothing to audit")
    made = [_finding(name, contrasts[name], rewards, spread) for name in _of(detectors)]
    if OFF_DISTRIBUTION in detectors:
        made.append(_off_distribution(found.cases, rewards))
    adjusted = iter(holm([one.p for one in made if one.p is not None]))
    findings = [one if one.p is None else replace(one, p=next(adjusted)) for one in made]
    gaps, verdicts = [], []
    for verdict in found.verdicts:
        better, worse = (rewards(Sample(verdict.messages, text)) for text in (verdict.better, verdict.worse))
        if better is not None and worse is not None:
            gaps.append(better - worse)
            verdicts.append(verdict)
    return Audit(
        calibration(gaps, [1.0] * len(gaps), [verdict.prompt for verdict in verdicts]),
        _accuracies(gaps, [(verdict.kind, verdict.prompt) for verdict in verdicts]),
        _accuracies(gaps, [(verdict.annotator, verdict.prompt) for verdict in verdicts]),
        tuple(findings),
        _length(found, own, spread),
        longer(gaps, verdicts),
        longer_by_kind(gaps, verdicts),
        _paraphrase(found.cases, rewards, spread),
        spread.value,
        len(found.cases),
        found.left_out,
        len(found.verdicts) - len(verdicts),
    )


def _of(detectors: Sequence[str]) -> list[str]:
    return [name for name in detectors if name != OFF_DISTRIBUTION]


def _samples(found: Material, contrasts: Mapping[str, Sequence[Sequence[Contrast]]]) -> Iterable[Sample]:
    for verdict in found.verdicts:
        yield Sample(verdict.messages, verdict.better)
        yield Sample(verdict.messages, verdict.worse)
    for case in found.cases:
        for text in case.texts:
            yield Sample(case.foreign, text)
        for text in case.paraphrased:
            yield Sample(case.prompt, edits.reworded(text))
    for rows in contrasts.values():
        for row in rows:
            for contrast in row:
                yield from (sample for _, sample in contrast.terms)


def _finding(name: str, rows: Sequence[Sequence[Contrast]], rewards: Rewards, spread: Spread) -> Finding:
    about = DETECTORS[name]
    changes, sizes, prompts = [], [], []
    unscored = 0
    for place, row in enumerate(rows):
        for contrast in row:
            values = [(weight, rewards(sample)) for weight, sample in contrast.terms]
            if any(value is None for _, value in values):
                unscored += 1
                continue
            changes.append(sum(weight * value for weight, value in values if value is not None))
            sizes.append(contrast.size)
            prompts.append(place)
    effect = p = None
    if len(set(prompts)) >= LEAST_PROMPTS:
        effect = slope(np.array(changes), np.array(sizes), np.array(prompts), spread)
        p = effect.beyond(about.threshold, both=about.direction == "both")
    return Finding(name, about.asks, about.direction, about.threshold, effect, p, unscored)


def _off_distribution(cases: Sequence[Case], rewards: Rewards) -> Finding:
    above, below, unscored = [], [], 0
    for case in cases:
        own = [rewards(Sample(case.prompt, text)) for text in case.texts]
        other = [rewards(Sample(case.foreign, text)) for text in case.texts]
        if None in own or None in other:
            unscored += 1
            continue
        (one, two), (three, four) = own, other
        assert one is not None and two is not None and three is not None and four is not None
        below.append(abs(one - two))
        above.append(abs(three - four))
    effect = p = None
    if len(above) >= LEAST_PROMPTS and any(above) and any(below):
        effect = ratio(np.array(above), np.array(below))
        p = effect.beyond(OFF_THRESHOLD, both=False)
    return Finding(OFF_DISTRIBUTION, OFF_ASKS, "up", OFF_THRESHOLD, effect, p, unscored)


def _accuracies(gaps: Sequence[float], rows: Sequence[tuple[str, str]]) -> dict[str, Interval]:
    """By name; empty where all have one."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for gap, (name, prompt) in zip(gaps, rows, strict=True):
        groups.setdefault(name, []).append((0.5 if gap == 0 else float(gap > 0), prompt))
    if len(groups) < 2:
        return {}
    return {
        name: clustered_share([right for right, _ in group], [prompt for _, prompt in group])
        for name, group in sorted(groups.items())
    }


def _length(found: Material, own: Sequence[Sequence[tuple[str, float]]], spread: Spread) -> dict[str, Interval]:
    """The slopes that the responses can tell."""
    rewards: list[Floats] = []
    columns: list[Floats] = []
    for texts, merits, row in zip(found.responses, found.merits, own, strict=True):
        merit = dict(zip(texts, merits, strict=True))
        rewards.append(np.array([value for _, value in row]))
        columns.append(np.array([[np.log2(edits.words(text)), merit[text]] for text, _ in row]))
    keep = [place for place, row in enumerate(own) if len(row) > 1]
    y, x = [rewards[place] for place in keep], [columns[place] for place in keep]
    part = Spread(spread.squares[keep], spread.freedom[keep])
    made = {}
    for name, number in (("raw", 1), ("partial", 2)):
        with contextlib.suppress(ValueError):
            made[name] = within(y, [one[:, :number] for one in x], part)[0].interval
    return made


def _paraphrase(cases: Sequence[Case], rewards: Rewards, spread: Spread) -> Interval | None:
    """sqrt of mean squared change over s^2, where a paraphrase changes any word."""
    squares, prompts = [], []
    for place, case in enumerate(cases):
        for text in case.paraphrased:
            edited = edits.reworded(text)
            one, other = rewards(Sample(case.prompt, text)), rewards(Sample(case.prompt, edited))
            if edited != text and one is not None and other is not None:
                squares.append((other - one) ** 2)
                prompts.append(place)
    if len(set(prompts)) < LEAST_PROMPTS:
        return None
    whole = np.array(squares)
    index = numbered(prompts)[0]
    mean = float(whole.mean())
    sums = np.bincount(index, whole - mean) / len(whole)
    count = len(sums)
    # Of the logarithm, so that the interval stays above 0: its influence is that of the mean over the mean, halved.
    error = float(np.sqrt(count / (count - 1) * (sums @ sums))) / (2 * mean) if mean else 0.0
    room = float(np.exp(1.96 * error))
    size = float(np.sqrt(mean)) / spread.value
    return Interval(size, size / room, size * room, count)
