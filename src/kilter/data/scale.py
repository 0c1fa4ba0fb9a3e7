"""What `kilter data scale` writes: a number with its error for every response, from comparisons of responses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kilter.data.lint import comparisons
from kilter.errors import DataError
from kilter.records import Conversation, Judgement, Rating, Record
from kilter.stats.scalars import scalars


class Scaled(NamedTuple):
    """One rating for each prompt, and for each group that judged it."""

    records: list[Rating]
    responses: int
    sigma: float
    identical: int
    """Comparisons of two responses of one text: they say nothing."""


def ratings_of(records: Iterable[Record], *, sigma: float | None = None) -> Scaled:
    """Every two responses of every judgement, as a comparison for the scale of their prompt.

    Verdicts of different groups make scales of their own. A comparison counts as much as its record's `weight`; a tie
    is half a win of both. Values of one prompt have the mean 0: they say nothing about the next prompt.

    Args:
        sigma: as in `stats.scalars.scalars`.
    Raises:
        DataError: a record that is no judgement, nothing to compare, or a sigma that cannot be fitted.
    """
    won: dict[tuple[Conversation, str], list[tuple[str, str, float]]] = {}
    kinds: dict[tuple[Conversation, str], str] = {}
    identical = 0
    for place, record in enumerate(records):
        if not isinstance(record, Judgement):
            raise DataError(f"record {place + 1} is a {type(record).__name__}; a scale needs judgements")
        key = record.prompt, record.group
        kinds.setdefault(key, record.kind)
        for compared in comparisons([record]):
            if compared.better == compared.worse:
                identical += 1
                continue
            part = record.weight / 2 if compared.tie else record.weight
            rows = won.setdefault(key, [])
            rows.append((compared.better, compared.worse, part))
            if compared.tie:
                rows.append((compared.worse, compared.better, part))
    if not won:
        raise DataError("no two different responses were compared; a scale needs comparisons")
    tables, texts = [], []
    for rows in won.values():
        places = {text: at for at, text in enumerate(dict.fromkeys(text for row in rows for text in row[:2]))}
        table = np.zeros((len(places), len(places)))
        for better, worse, part in rows:
            table[places[better], places[worse]] += part
        tables.append(table)
        texts.append(tuple(places))
    try:
        found = scalars(tables, sigma=sigma)
    except ValueError as err:
        raise DataError(str(err)) from err
    made = [
        Rating(
            prompt=prompt,
            responses=responses,
            values=tuple(values.tolist()),
            errors=tuple(errors.tolist()),
            kind=kinds[prompt, group],
            group=group,
        )
        for (prompt, group), responses, values, errors in zip(won, texts, found.values, found.errors, strict=True)
    ]
    return Scaled(made, sum(len(responses) for responses in texts), found.sigma, identical)
