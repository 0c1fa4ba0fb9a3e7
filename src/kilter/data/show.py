"""Records as a model will see them: token by token, with what is scored. Plain data; the command line prints it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kilter.data.chat import ChatEncoder, Encoded
from kilter.data.split import prompt_of
from kilter.errors import DataError
from kilter.records import (
    Demonstration,
    Document,
    Judgement,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    StepLabels,
    UnpairedFeedback,
)


class ShownToken(NamedTuple):
    """One token, its text, and whether the model is trained to say it."""

    id: int
    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One response of a record in its context."""

    record: int
    """Place of the record in the list."""
    label: str
    """What the response is: chosen, rejected, rank 0, ..."""
    tokens: tuple[ShownToken, ...]
    problem: str = ""
    """Why the record cannot be trained on with this template; there are no tokens then."""

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(token.scored for token in self.tokens)


def show(records: Iterable[Record], encoder: ChatEncoder) -> Iterator[ShownRow]:
    """One row for each response of each record; for a prompt alone, nothing is scored."""
    for place, record in enumerate(records):
        try:
            yield from [
                ShownRow(place, label, _tokens(encoded, encoder)) for label, encoded in _encoded(record, encoder)
            ]
        except DataError as err:
            yield ShownRow(place, "", (), str(err))


def _encoded(record: Record, encoder: ChatEncoder) -> list[tuple[str, Encoded]]:
    if isinstance(record, Demonstration):
        rows = encoder.rows(record.messages)
        return [("demonstration" if len(rows) == 1 else f"turn {place + 1}", row) for place, row in enumerate(rows)]
    if isinstance(record, Document):
        ids = encoder.document(record.text)
        return [("document", Encoded(ids, ((1, len(ids)),)))]
    prompt = encoder.prompt(prompt_of(record))
    if isinstance(record, Prompt):
        return [("prompt", Encoded(prompt, ()))]
    made = []
    for label, text in _labelled(record):
        ids = prompt + encoder.response(prompt_of(record), text)
        made.append((label, Encoded(ids, ((len(prompt), len(ids)),))))
    return made


def _labelled(record: Record) -> list[tuple[str, str]]:
    match record:
        case PreferencePair():
            labels = ("tie", "tie") if record.tie else ("chosen", "rejected")
            return list(zip(labels, (record.chosen, record.rejected), strict=True))
        case Ranking() | Judgement():
            return [(f"rank {rank}", text) for rank, text in zip(record.ranks, record.responses, strict=True)]
        case UnpairedFeedback():
            return [("desirable" if record.desirable else "undesirable", record.response)]
        case StepLabels():
            return [("steps", "\n".join(record.steps))]
    raise AssertionError(f"no responses in a {type(record).__name__}")


def _tokens(encoded: Encoded, encoder: ChatEncoder) -> tuple[ShownToken, ...]:
    scored = {place for start, end in encoded.spans for place in range(start, end)}
    texts = encoder.pieces(encoded.ids)
    ids = enumerate(zip(encoded.ids, texts, strict=True))
    return tuple(ShownToken(token, text, place in scored) for place, (token, text) in ids)
