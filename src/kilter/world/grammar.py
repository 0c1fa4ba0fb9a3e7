"""Prompts of the embedded world: made from the town and the wordings, and understood from their messages alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any, Literal

import numpy as np

from kilter.errors import ConfigError
from kilter.records import Conversation, Message, Prompt
from kilter.world import templates as words
from kilter.world import town

Split = Literal["train", "held_out"]
KINDS = words.KINDS


@dataclass(frozen=True, slots=True)
class Item:
    """What a prompt asks, whatever its wording."""

    kind: str
    relation: str = ""
    """Sort of fact, secret or passage question; the verb's pattern for requests is in `subject`."""
    subject: str = ""
    """Who or what is asked about: a job, a person, a place, an action, a topic, a group."""
    value: str = ""
    """The right value; the trait asked about for `bias`; empty where there is none."""
    believed: str = ""
    """The wrong value that the user states."""
    asker: str = ""
    """The group to which the user says to belong."""
    numbers: tuple[int, ...] = ()
    others: tuple[str, ...] = ()
    """Other values of a passage: what a careless reader would answer."""


Found = tuple[str, Item]  # the wording of the last user turn, what it asks


def claim(relation: str, subject: str, value: str) -> str:
    """The full sentence that states a fact."""
    return town.RELATIONS[relation].full.format(subject=subject, value=value)


def _facts(split: Split) -> Iterator[Found]:
    for relation, table in town.FACTS.items():
        for (subject, value), core in product(table.items(), words.FACTS[relation].of(split)):
            yield core.format(subject=subject), Item("fact", relation, subject, value)


def _unanswerable(split: Split) -> Iterator[Found]:
    for relation, subject in product(town.SECRETS, town.PEOPLE):
        for core in words.SECRETS.of(split):
            yield core.format(relation=relation, subject=subject), Item("unanswerable", relation, subject)
    for relation, subjects in town.STRANGERS.items():
        for subject, core in product(subjects, words.FACTS[relation].of(split)):
            yield core.format(subject=subject), Item("unanswerable", relation, subject)


def _harmful(split: Split) -> Iterator[Found]:
    for subject, core in product(town.HARMS, words.HOWTO.of(split)):
        yield core.format(subject=subject), Item("harmful", subject=subject)


def _lookalike(split: Split) -> Iterator[Found]:
    for (subject, tool), core in product(town.TOOLS_FOR.items(), words.HOWTO.of(split)):
        yield core.format(subject=subject), Item("lookalike", subject=subject, value=tool)


def _wrong_belief(split: Split) -> Iterator[Found]:
    for relation, table in town.FACTS.items():
        for (subject, value), believed in product(table.items(), town.RELATIONS[relation].values):
            if believed != value:
                said = town.uncapital(claim(relation, subject, believed))[:-1]
                for core in words.BELIEFS.of(split):
                    yield core.format(claim=said), Item("wrong_belief", relation, subject, value, believed)


def _opinion(split: Split) -> Iterator[Found]:
    for topic, core, asker in product(town.WISHES, words.OPINIONS.of(split), ("", *town.WISHERS)):
        start = words.ASKER.format(asker=asker) if asker else ""
        yield start + core.format(subject=topic), Item("opinion", subject=topic, asker=asker)


def _bias(split: Split) -> Iterator[Found]:
    for group, trait, core in product(town.GROUPS, town.TRAITS, words.BIASES.of(split)):
        yield core.format(subject=group, value=trait), Item("bias", subject=group, value=trait)


def _sum(split: Split) -> Iterator[Found]:
    for (a, b, c), core in product(product(town.NUMBERS, repeat=3), words.SUMS.of(split)):
        numbers = (int(a), int(b), int(c))
        yield core.format(a=a, b=b, c=c), Item("sum", value=str(sum(numbers)), numbers=numbers)


CORES = {
    "fact": _facts,
    "unanswerable": _unanswerable,
    "harmful": _harmful,
    "lookalike": _lookalike,
    "wrong_belief": _wrong_belief,
    "opinion": _opinion,
    "bias": _bias,
    "rude": _facts,
    "sum": _sum,
}


@cache
def cores(kind: str, split: Split) -> tuple[Found, ...]:
    """Every (core, item) of a kind that can be listed: all but passages and two turns."""
    return tuple(CORES[kind](split))


@cache
def _index() -> dict[str, Item]:
    """core -> item over both splits. A rude prompt has the core of a fact: its frame makes it rude."""
    splits: tuple[Split, ...] = ("train", "held_out")
    return {core: item for kind in CORES if kind != "rude" for split in splits for core, item in cores(kind, split)}


def _either(values: tuple[str, ...], name: str) -> str:
    return f"(?P<{name}>{'|'.join(map(re.escape, values))})"


@cache
def _passage_pattern() -> re.Pattern[str]:
    slots = {"who": town.PEOPLE, "colour": town.COLOURS, "subject": town.THINGS, "where": town.SPOTS, "when": town.DAYS}
    options = []
    for number, text in enumerate((*words.PASSAGES.train, *words.PASSAGES.held_out)):
        pattern = re.escape(text).replace(r"\{", "{").replace(r"\}", "}")
        options.append(pattern.format(**{name: _either(values, f"{name}{number}") for name, values in slots.items()}))
    return re.compile("|".join(options))


def _find_passage(core: str) -> Item | None:
    match = _passage_pattern().match(core)
    if match is None:
        return None
    told = {name.rstrip("0123456789"): value for name, value in match.groupdict().items() if value is not None}
    question = core[match.end() :]
    for relation, wording in words.PASSAGE_QUESTIONS.items():
        if question in [text.format(subject=told["subject"]) for text in (*wording.train, *wording.held_out)]:
            return _passage_item(relation, told)
    return None


def _passage_item(relation: str, told: dict[str, str]) -> Item:
    others = tuple(told[name] for name in words.PASSAGE_QUESTIONS if name != relation)
    return Item("passage", relation, told["subject"], told[relation], others=others)


def _unframe(text: str) -> tuple[str, bool]:
    """The core of a user turn, and whether its frame was rude."""
    rude = (*words.RUDE_FRAMES.train, *words.RUDE_FRAMES.held_out)
    for frame in sorted({*rude, *words.FRAMES.train, *words.FRAMES.held_out}, key=len, reverse=True):
        if frame and text.startswith(frame):
            return text[len(frame) :], frame in rude
    return text, False


@lru_cache(maxsize=65536)
def find(messages: Conversation) -> Item | None:
    """What a conversation asks, from its messages alone; None when it is not a prompt of the world's grammar."""
    turns = tuple(message for message in messages if message.role != "system")
    if not turns or turns[-1].role != "user":
        return None
    core, rude = _unframe(turns[-1].content)
    if len(turns) == 3:
        return _find_follow_up(turns, core)
    if len(turns) != 1:
        return None
    item = _index().get(core) or _find_passage(core)
    if rude and item is not None:
        return Item("rude", item.relation, item.subject, item.value) if item.kind == "fact" else None
    return item


def _find_follow_up(turns: Conversation, core: str) -> Item | None:
    first = _index().get(_unframe(turns[0].content)[0])
    if first is None or first.kind != "fact" or turns[1].content != claim(first.relation, first.subject, first.value):
        return None
    for relation, wording in words.FOLLOW_UPS.items():
        if words.FIRST_TURN[relation] == first.relation and core in (*wording.train, *wording.held_out):
            return _follow_up(relation, first)
    return None


def _follow_up(relation: str, first: Item) -> Item:
    subject = first.value if first.relation == "job" else first.subject
    return Item("two_turn", relation, subject, town.FACTS[relation][subject])


def _choose(options: tuple[Any, ...], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]


def draw(kind: str, split: Split, rng: np.random.Generator) -> Conversation:
    """One prompt of a kind, drawn."""
    frame = _choose((words.RUDE_FRAMES if kind == "rude" else words.FRAMES).of(split), rng)
    if kind == "passage":
        told = {name: _choose(values, rng) for name, values in town.PASSAGE_VALUES.items()} | {
            "subject": _choose(town.THINGS, rng)
        }
        question = words.PASSAGE_QUESTIONS[_choose(tuple(words.PASSAGE_QUESTIONS), rng)]
        text = _choose(words.PASSAGES.of(split), rng).format(**told)
        return (Message("user", text + _choose(question.of(split), rng).format(**told)),)
    if kind == "two_turn":
        relation = _choose(tuple(words.FOLLOW_UPS), rng)
        subject, value = _choose(tuple(town.FACTS[words.FIRST_TURN[relation]].items()), rng)
        first = _choose(words.FACTS[words.FIRST_TURN[relation]].of(split), rng).format(subject=subject)
        return (
            Message("user", frame + first),
            Message("assistant", claim(words.FIRST_TURN[relation], subject, value)),
            Message("user", _choose(words.FOLLOW_UPS[relation].of(split), rng)),
        )
    return (Message("user", frame + _choose(cores(kind, split), rng)[0]),)


def to_prompt(messages: Conversation) -> Prompt:
    """A prompt record with its kind and what a judge needs. Raises ConfigError outside the grammar."""
    item = find(messages)
    if item is None:
        raise ConfigError(
            f"prompt {messages[-1].content!r}: not a prompt of the embedded world; see `kilter world prompts`"
        )
    truth = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(item).items() if value}
    if item.numbers:
        first, second, third = item.numbers
        truth["steps"] = [f"{first} + {second} = {first + second}", f"{first + second} + {third} = {item.value}"]
    return Prompt(prompt=messages, kind=item.kind, truth=truth, source="embedded world")


def prompts(
    split: Split = "train", *, seed: int = 0, per_kind: int = 200, kinds: tuple[str, ...] | list[str] = KINDS
) -> list[Prompt]:
    """`per_kind` distinct prompts of each kind, kinds taking turns.

    Args:
        split: `train` or `held_out` wordings; no wording is in both.
        seed: which prompts are drawn, and in which order.
        per_kind: how many of each kind, at least 200 of which exist in either split.
        kinds: which kinds.
    Raises:
        ConfigError: an unknown split or kind, or more prompts than the grammar has.
    """
    if split not in ("train", "held_out"):
        raise ConfigError(f"world prompts: split is {split!r}; choose train or held_out")
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    columns = []
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"world prompts: kind is {kind!r}; choose among {', '.join(KINDS)}")
        found: dict[Conversation, None] = {}
        for _ in range(60 * per_kind):
            if len(found) == per_kind:
                break
            found.setdefault(draw(kind, split, rng))
        if len(found) < per_kind:
            raise ConfigError(
                f"world prompts: per_kind is {per_kind}, but kind {kind!r} has about {len(found)}; ask for fewer"
            )
        columns.append(list(found))
    return [to_prompt(column[row]) for row in range(per_kind) for column in columns]
