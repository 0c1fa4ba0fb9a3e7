"""Splitting by prompt."""

from __future__ import annotations

import pytest

from kilter.data.split import prompt_of, split_by_prompt, split_key
from kilter.records import Demonstration, Message, PreferencePair, Prompt


def pair(question: str, answer: str = "a") -> PreferencePair:
    return PreferencePair(prompt=(Message("user", question),), chosen=answer, rejected="b")


def test_a_prompt_never_stands_on_both_sides() -> None:
    records = [pair(f"Q{n % 50}", f"a{n}") for n in range(500)]
    for seed in range(5):
        train, held = split_by_prompt(records, held_out=0.3, seed=seed)
        assert {split_key(record) for record in train}.isdisjoint(split_key(record) for record in held)
        assert sorted(r.id for r in [*train, *held]) == sorted(r.id for r in records)
        assert 50 <= len(held) <= 250


def test_longer_prompts_of_one_conversation_stay_together() -> None:
    turns = [Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Why?"), Message("assistant", "So")]
    short, long = Prompt(prompt=tuple(turns[:1])), Prompt(prompt=tuple(turns[:3]))
    assert split_key(short) == split_key(long) == split_key(Demonstration(messages=tuple(turns)))
    assert split_key(short) != split_key(Prompt(prompt=(Message("system", "S"), turns[0])))
    assert prompt_of(Demonstration(messages=tuple(turns))) == tuple(turns[:3])


def test_a_side_follows_from_prompt_and_seed_alone() -> None:
    records = [pair(f"Q{n}") for n in range(400)]
    train, held = split_by_prompt(records, held_out=0.25, seed=1)
    again, more = split_by_prompt([*reversed(records), *(pair(f"R{n}") for n in range(100))], held_out=0.25, seed=1)
    assert {record.id for record in held} <= {record.id for record in more}
    assert {record.id for record in train} <= {record.id for record in again}
    assert 60 < len(held) < 140
    other = split_by_prompt(records, held_out=0.25, seed=2)[1]
    assert {record.id for record in held} != {record.id for record in other}


def test_the_share_grows_and_keeps_what_was_held_out() -> None:
    records = [pair(f"Q{n}") for n in range(200)]
    less, more = ({r.id for r in split_by_prompt(records, held_out=share, seed=0)[1]} for share in (0.1, 0.4))
    assert less < more


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_no_side_is_empty(held_out: float) -> None:
    train, held = split_by_prompt([pair("Q0"), pair("Q1")], held_out=held_out, seed=0)
    assert len(train) == len(held) == 1


def test_nothing_held_out() -> None:
    records = [pair("Q0"), pair("Q1")]
    assert split_by_prompt(records, held_out=0, seed=0) == (records, [])
    assert split_by_prompt([], held_out=0.5, seed=0) == ([], [])
    assert len(split_by_prompt([pair("Q0"), pair("Q0", "c")], held_out=0.5, seed=0)[1]) in (0, 2)
    with pytest.raises(ValueError, match="held_out is 1"):
        split_by_prompt(records, held_out=1, seed=0)
