"""What people gave to single responses: marks on a common scale, and the thumbs of a prompt side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from kilter.errors import DataError
from kilter.records import Conversation, Rating, UnpairedFeedback


def standardized(records: Sequence[Rating], by: Literal["all", "annotator"]) -> list[Rating]:
    """Values less their mean, over their standard deviation; errors over the same.

    By annotator it takes away how kind somebody is and how much of the scale he uses, and assumes that everybody was
    given answers alike, as where items are dealt out by chance: who was given better ones loses what they were better
    by. It does not see a scale that moves while its owner works. Whoever gave one value only, or the same to all, is
    taken to be in the middle: all his values become 0.

    Args:
        by: over all values together, or over each annotator's own.
    Raises:
        DataError: a record without an annotator, by annotator.
    """
    held: dict[str, list[Rating]] = {}
    for record in records:
        if by == "annotator" and not record.annotator:
            raise DataError(
                f"the rating {record.id} names no 'annotator', and values are to be standardised by annotator; name "
                "everybody who gave marks, or standardise over all"
            )
        held.setdefault(record.annotator if by == "annotator" else "", []).append(record)
    scales = {}
    for who, own in held.items():
        given = np.concatenate([record.values for record in own])
        scales[who] = float(given.mean()), float(given.std()) or 1.0
    made = []
    for record in records:
        mean, spread = scales[record.annotator if by == "annotator" else ""]
        values = tuple((value - mean) / spread for value in record.values)
        made.append(replace(record, values=values, errors=tuple(error / spread for error in record.errors)))
    return made


def thumbs_together(records: Sequence[UnpairedFeedback]) -> list[Rating]:
    """The thumbs of each prompt side by side, 1 for up and 0 for down, so that up and down can be compared.

    A response that has several thumbs stands in as many ratings: each thumb counts once.
    """
    rows: dict[tuple[Conversation, int], dict[str, UnpairedFeedback]] = {}
    for record in records:
        copy = 0
        while record.response in rows.setdefault((record.prompt, copy), {}):
            copy += 1
        rows[record.prompt, copy][record.response] = record
    return [
        Rating(
            prompt=prompt,
            responses=tuple(row),
            values=tuple(float(one.desirable) for one in row.values()),
            kind=first.kind,
            source=first.source,
        )
        for (prompt, _), row in rows.items()
        for first in list(row.values())[:1]
    ]
