"""A bias of known size put into a reward: what detectors are validated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kilter.evals.audit.detectors import DETECTORS, OFF_DISTRIBUTION, off_topic
from kilter.records import Sample, Score, Scorer

BIASES = (*DETECTORS, OFF_DISTRIBUTION)


class Planted:
    """A scorer that pays for a property of the text beside what another scorer says.

        value = value of the scorer + size * property(sample) * spread

    Of `off_distribution`, which is no property that adds: value * (1 + size) of a response that shares no longer word
    with its prompt.

    Args:
        name: of a detector.
        size: in standard deviations, for one unit of the detector's property.
        spread: the standard deviation of the scorer's values of responses to one prompt.
    Raises:
        KeyError: no such detector.
    """

    def __init__(self, scorer: Scorer, name: str, size: float, *, spread: float = 1.0) -> None:
        self.name = f"{scorer.name} with {name} {size:+g}"
        self._scorer, self._bias, self._amount = scorer, name, size * spread
        self._size = size
        self._property = None if name == OFF_DISTRIBUTION else DETECTORS[name].property

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in order; what the other scorer leaves unscored stays so."""
        return [
            score if score.value is None else replace(score, value=self._value(score.value, sample))
            for score, sample in zip(self._scorer.score(samples), samples, strict=True)
        ]

    def _value(self, value: float, sample: Sample) -> float:
        if self._property is None:
            return value * (1 + self._size * off_topic(sample))
        return value + self._amount * self._property(sample)
