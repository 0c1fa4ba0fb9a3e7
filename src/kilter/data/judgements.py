"""Judgements taken apart into verdicts on two responses: what agreement and ratings are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kilter.data.lint import comparisons
from kilter.errors import DataError
from kilter.records import Judgement, Record, content_hash, prompt_id

BETTER_FIRST, TIE, BETTER_SECOND = -1, 0, 1


class Verdict(NamedTuple):
    """What one annotator said of two responses to one prompt."""

    item: str
    """Which two: a hash of prompt and texts, whichever stood first."""
    annotator: str
    value: int
    """Which is better: -1, 0 (tie) or 1, in an order of the two texts that has nothing to do with the file's."""
    prompt: str
    """The prompt's id."""
    kind: str
    at: str
    record: int
    """Which record it comes from."""


class Verdicts(NamedTuple):
    """All verdicts of a file, each annotator's first on each item."""

    kept: list[Verdict]
    repeated: int
    """Further verdicts of an annotator on an item that he had judged: they are no agreement with anybody else."""
    identical: int
    """Verdicts on two responses of one text: they say nothing."""
    texts: dict[str, tuple[str, str]]
    """By item, its two responses."""


def verdicts(records: Iterable[Record]) -> Verdicts:
    """Every two responses of every judgement, each annotator's first verdict on each item.

    Raises:
        DataError: a record that does not say who judged, or a judgement without its annotator.
    """
    kept: dict[tuple[str, str], Verdict] = {}
    texts: dict[str, tuple[str, str]] = {}
    repeated = identical = 0
    for verdict, of_item in every_verdict(records):
        if of_item[0] == of_item[1]:
            identical += 1
            continue
        texts[verdict.item] = of_item
        if (verdict.item, verdict.annotator) in kept:
            repeated += 1
        else:
            kept[verdict.item, verdict.annotator] = verdict
    return Verdicts(list(kept.values()), repeated, identical, texts)


def every_verdict(records: Iterable[Record]) -> Iterator[tuple[Verdict, tuple[str, str]]]:
    """Every two responses of every judgement, with their texts; a ranking of k gives k (k - 1) / 2.

    Raises:
        DataError: as `verdicts`.
    """
    for place, record in enumerate(records):
        if not isinstance(record, Judgement):
            raise DataError(
                f"record {place + 1} is a {type(record).__name__}; who judged what is read from judgements alone"
            )
        if not record.annotator:
            raise DataError(f"record {place + 1}: 'annotator' is empty; say who judged, or leave the record out")
        prompt = prompt_id(record.prompt)
        for compared in comparisons([record]):
            # By hash: a file that puts the better response first would have all its verdicts in one category.
            first, second = sorted((compared.better, compared.worse), key=content_hash)
            item = content_hash([prompt, first, second])
            value = TIE if compared.tie else BETTER_FIRST if compared.better == first else BETTER_SECOND
            yield Verdict(item, record.annotator, value, prompt, record.kind, record.at, place), (first, second)
