"""What an audit reads: comparisons with their prompt, kind and annotator, and the cases that edits are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilter.config import AUDIT_PROMPTS, LEAST_PROMPTS
from kilter.data.lint import comparisons
from kilter.errors import DataError
from kilter.evals.audit.detectors import Case
from kilter.evals.audit.words import ENGLISH, Words
from kilter.records import Conversation, Record, prompt_id


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison that has a better response."""

    prompt: str
    """Its id."""
    messages: Conversation
    better: str
    worse: str
    kind: str
    annotator: str


@dataclass(frozen=True, slots=True)
class Material:
    """What is audited on."""

    verdicts: list[Verdict]
    left_out: int
    """Ties, and comparisons of two responses of one text."""
    cases: list[Case]
    """One for each prompt."""
    responses: list[tuple[str, ...]]
    """By case, the prompt's different responses."""
    merits: list[tuple[float, ...]]
    """Of each, the share of its comparisons that it won less that it lost."""


def material(records: Sequence[Record], *, prompts: int = AUDIT_PROMPTS, words: Words = ENGLISH) -> Material:
    """Verdicts of all records, and cases of up to `prompts` prompts: those with the smallest ids, so always the same.

    A case is the first comparison of its prompt that has a better response.

    Args:
        words: that are put into copies.
    Raises:
        DataError: fewer than LEAST_PROMPTS prompts have a comparison.
    """
    kept: list[Verdict] = []
    left_out = 0
    responses: dict[str, dict[str, list[int]]] = {}
    for one in comparisons(records):
        key = prompt_id(one.prompt)
        if one.tie or one.better == one.worse:
            left_out += 1
            continue
        kind: Any = getattr(records[one.row], "kind", "")
        kept.append(Verdict(key, one.prompt, one.better, one.worse, kind, one.judge))
        of_prompt = responses.setdefault(key, {})
        of_prompt.setdefault(one.better, []).append(1)
        of_prompt.setdefault(one.worse, []).append(-1)
    first: dict[str, Verdict] = {}
    for verdict in kept:
        first.setdefault(verdict.prompt, verdict)
    if len(first) < LEAST_PROMPTS:
        raise DataError(
            f"an audit needs comparisons of responses to {LEAST_PROMPTS} prompts or more, and there are {len(first)} "
            f"({left_out} comparisons are ties or of two equal texts); give more pairs, rankings or judgements"
        )
    chosen = [first[key] for key in sorted(first)[:prompts]]
    others = [*chosen[1:], chosen[0]]
    cases = [
        Case(one.messages, one.better, one.worse, other.messages, words)
        for one, other in zip(chosen, others, strict=True)
    ]
    rows = [responses[one.prompt] for one in chosen]
    merits = [tuple(sum(won) / len(won) for won in row.values()) for row in rows]
    return Material(kept, left_out, cases, [tuple(row) for row in rows], merits)
