"""Train and held-out records, apart by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from kilter.records import Conversation, Demonstration, Document, Message, Record, prompt_id

R = TypeVar("R", bound=Record)


def prompt_of(record: Record) -> Conversation:
    """What a record's responses answer; of a demonstration, all before its last turn; a document answers nothing."""
    if isinstance(record, Document):
        return ()
    if isinstance(record, Demonstration):
        return record.messages[:-1]
    prompt: Conversation = record.prompt  # type: ignore[attr-defined]  # every other record has one
    return prompt


def split_key(record: Record) -> str:
    """Identity of a conversation's opening, up to the first user turn; of a document, all of it.

    Longer and shorter prompts of one conversation contain each other, so they stay on one side.
    """
    if isinstance(record, Document):
        return prompt_id((Message("user", record.text),))
    turns = record.messages if isinstance(record, Demonstration) else prompt_of(record)
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns) - 1)
    return prompt_id(turns[: first + 1])


def split_by_prompt(records: Sequence[R], *, held_out: float, seed: int) -> tuple[list[R], list[R]]:
    """Records to learn from and records held out; a prompt never stands on both sides.

    The side of a prompt follows from its own hash and the seed: more rows in the file move no other row. The held-out
    share is met on average. Where chance would leave a side empty, the prompt nearest to the border changes over.

    Args:
        held_out: share of the prompts, in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must lie in [0, 1)")
    keys = [split_key(record) for record in records]
    places = {key: _place(key, seed) for key in keys}
    ordered = sorted(places, key=lambda key: places[key])
    held = {key for key in ordered if places[key] < held_out}
    if held_out and len(ordered) > 1:
        held = held or {ordered[0]}
        held = held if len(held) < len(ordered) else set(ordered[:-1])
    sides = [key in held for key in keys]
    return (
        [record for record, side in zip(records, sides, strict=True) if not side],
        [record for record, side in zip(records, sides, strict=True) if side],
    )


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that looks random and depends on nothing else."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
