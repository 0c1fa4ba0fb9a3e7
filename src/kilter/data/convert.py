"""One kind of record from another, where that says nothing the data does not say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from kilter.data.fields import BadRow, ranked_by
from kilter.records import (
    Demonstration,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Rating,
    Record,
    UnpairedFeedback,
)


def convert(record: Record, want: str, native: str) -> Iterator[Record]:
    """The records of kind `want` that `record` (of kind `native`) holds.

    Raises:
        BadRow: this record holds none, for example the demonstration in a disliked response.
    """
    if want == native:
        yield record
        return
    step = CONVERSIONS.get((native, want))
    if step is None:
        raise BadRow("", f"the row holds a {native}, and no {want} can be made of it")
    yield from step(record)


def can_convert(native: str, want: str | None) -> bool:
    """Whether `convert` knows the way."""
    return want is None or want == native or (native, want) in CONVERSIONS


def pairs_of(record: Record) -> Iterator[PreferencePair]:
    """All pairs of unequal rank; of two tied responses one tie."""
    assert isinstance(record, Ranking | Judgement | Rating)
    record = ranking_of(record)
    ranked = sorted(zip(record.ranks, record.responses, strict=True), key=lambda item: item[0])
    for (better, chosen), (worse, rejected) in combinations(ranked, 2):
        if better != worse or len(ranked) == 2:
            tie = better == worse
            yield PreferencePair(prompt=record.prompt, chosen=chosen, rejected=rejected, tie=tie, **_said_of(record))


def ranking_of(record: PreferencePair | Ranking | Judgement | Rating) -> Ranking:
    """The order of the responses, without who gave it and how."""
    if isinstance(record, PreferencePair):
        responses: tuple[str, ...] = (record.chosen, record.rejected)
        ranks: tuple[int, ...] = (0, 0) if record.tie else (0, 1)
    else:
        responses = record.responses
        ranks = ranked_by(record.values) if isinstance(record, Rating) else record.ranks
    return Ranking(prompt=record.prompt, responses=responses, ranks=ranks, **_said_of(record))


def _said_of(record: PreferencePair | Ranking | Judgement | Rating) -> dict[str, Any]:
    """What holds for every comparison of a record."""
    return {"kind": record.kind, "weight": record.weight, "group": record.group, "source": record.source}


def _pairs(record: Record) -> Iterator[Record]:
    found = list(pairs_of(record))
    if not found:
        raise BadRow("ranks", "all responses are tied; no pair says which one is better")
    yield from found


def _ranking(record: Record) -> Iterator[Record]:
    assert isinstance(record, PreferencePair | Judgement | Rating)
    yield ranking_of(record)


def _best(record: Record) -> Iterator[Record]:
    if isinstance(record, UnpairedFeedback):
        if not record.desirable:
            raise BadRow("desirable", "the response is marked as undesirable; it is no demonstration")
        prompt, answer = record.prompt, record.response
    elif isinstance(record, PreferencePair):
        prompt, answer = record.prompt, record.chosen
    else:
        assert isinstance(record, Ranking | Judgement | Rating)
        ranking = ranking_of(record)
        prompt, answer = ranking.prompt, ranking.responses[ranking.ranks.index(min(ranking.ranks))]
    yield Demonstration(messages=(*prompt, Message("assistant", answer)), source=record.source)


def _feedback(record: Record) -> Iterator[Record]:
    assert isinstance(record, PreferencePair)
    if record.tie:
        raise BadRow("tie", "the pair is a tie; it says of neither response whether it is desirable")
    for response, desirable in ((record.chosen, True), (record.rejected, False)):
        yield UnpairedFeedback(
            prompt=record.prompt, response=response, desirable=desirable, source=record.source, kind=record.kind
        )


def _prompt(record: Record) -> Iterator[Record]:
    if isinstance(record, Demonstration):
        # What was shown to be said is the reference that a verifier compares with.
        truth = {"answer": record.messages[-1].content}
        yield Prompt(prompt=record.messages[:-1], truth=truth, source=record.source)
    else:
        yield Prompt(prompt=record.prompt, kind=getattr(record, "kind", ""), source=record.source)  # type: ignore[attr-defined]


CONVERSIONS: dict[tuple[str, str], Callable[[Record], Iterator[Record]]] = {
    ("ranking", "pair"): _pairs,
    ("judgement", "pair"): _pairs,
    ("judgement", "ranking"): _ranking,
    ("rating", "ranking"): _ranking,
    ("rating", "pair"): _pairs,
    ("pair", "ranking"): _ranking,
    ("pair", "feedback"): _feedback,
    **{(native, "demonstration"): _best for native in ("pair", "ranking", "judgement", "rating", "feedback")},
    **{
        (native, "prompt"): _prompt
        for native in ("demonstration", "pair", "ranking", "judgement", "rating", "feedback", "steps")
    },
}
