"""Rules by name that leave records out, each counted.

A rule is written `name` or `name=value`: `duplicates`, `max-chars=2000`. Adding one is a function under `@rule`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from kilter.data.lint import comparisons, contradictory, cyclic, plain, prompt_key, responses_of
from kilter.data.split import prompt_of
from kilter.errors import ConfigError
from kilter.records import PreferencePair, Record

R = TypeVar("R", bound=Record)


class Asked(NamedTuple):
    """What a rule may look at."""

    records: Sequence[Record]
    held_out: Sequence[Record]
    value: str
    name: str

    def number(self) -> float:
        """The rule's value as a number."""
        try:
            return float(self.value)
        except ValueError as err:
            raise ConfigError(f"rule {self.name!r} is given {self.value!r}; write a number: {self.name}=100") from err


Rule = Callable[[Asked], Callable[[int, Record], bool]]
"""Gives a function (place, record) -> whether to keep it."""

RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register a rule. Its docstring is what users read."""

    def register(made: Rule) -> Rule:
        if name in RULES:
            raise ValueError(f"rule {name!r} is registered twice")
        RULES[name] = made
        return made

    return register


def filter_records(
    records: Sequence[R], rules: Sequence[str], *, held_out: Sequence[Record] = ()
) -> tuple[list[R], Counter[str]]:
    """The records that every rule keeps, and how many each rule left out (the first one that does counts).

    Raises:
        ConfigError: no such rule, or a value that is not a number.
    """
    asked = []
    for text in rules:
        name, _, value = text.partition("=")
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(RULES))}"
            raise ConfigError(f"rule {name!r} does not exist; {hint}")
        asked.append((text, RULES[name](Asked(records, held_out, value, name))))
    kept: list[R] = []
    dropped: Counter[str] = Counter({text: 0 for text, _ in asked})
    for place, record in enumerate(records):
        against = next((text for text, keeps in asked if not keeps(place, record)), None)
        if against is None:
            kept.append(record)
        else:
            dropped[against] += 1
    return kept, dropped


@rule("duplicates")
def duplicates(_: Asked) -> Callable[[int, Record], bool]:
    """Copies of an earlier record."""
    seen: set[str] = set()

    def keeps(_: int, record: Record) -> bool:
        known = record.id in seen
        seen.add(record.id)
        return not known

    return keeps


@rule("identical")
def identical(_: Asked) -> Callable[[int, Record], bool]:
    """Pairs and rankings in which two responses are the same but for case and blanks."""

    def keeps(_: int, record: Record) -> bool:
        pairs = comparisons([record])
        return all(plain(verdict.better) != plain(verdict.worse) for verdict in pairs)

    return keeps


@rule("contradictory")
def opposed(asked: Asked) -> Callable[[int, Record], bool]:
    """Records that say the opposite of another, and that other."""
    rows = {verdict.row for verdict in contradictory(comparisons(asked.records))}
    return lambda place, _: place not in rows


@rule("cycles")
def cycles(asked: Asked) -> Callable[[int, Record], bool]:
    """Comparisons of prompts whose preferences go round."""
    rows = {verdict.row for verdict in cyclic(list(comparisons(asked.records)))}
    return lambda place, _: place not in rows


@rule("ties")
def ties(_: Asked) -> Callable[[int, Record], bool]:
    """Pairs without a better response, and rankings in which all are equal."""

    def keeps(_: int, record: Record) -> bool:
        verdicts = list(comparisons([record]))
        return not verdicts or not all(verdict.tie for verdict in verdicts)

    return keeps


@rule("leaked")
def leaked(asked: Asked) -> Callable[[int, Record], bool]:
    """Records with a prompt of the held-out set."""
    known = {prompt_key(record) for record in asked.held_out}
    return lambda _, record: prompt_key(record) not in known


@rule("min-chars")
def min_chars(asked: Asked) -> Callable[[int, Record], bool]:
    """Records with a response of fewer characters."""
    least = asked.number()
    return lambda _, record: all(len(text) >= least for text in responses_of(record))


@rule("max-chars")
def max_chars(asked: Asked) -> Callable[[int, Record], bool]:
    """Records whose prompt with one of its responses has more characters."""
    most = asked.number()

    def keeps(_: int, record: Record) -> bool:
        prompt = sum(len(turn.content) for turn in prompt_of(record))
        return prompt + max(map(len, responses_of(record)), default=0) <= most

    return keeps


@rule("max-turns")
def max_turns(asked: Asked) -> Callable[[int, Record], bool]:
    """Records with more turns before the last response."""
    most = asked.number()
    return lambda _, record: len(prompt_of(record)) <= most


@rule("min-margin")
def min_margin(asked: Asked) -> Callable[[int, Record], bool]:
    """Pairs with a smaller margin; those without one stay."""
    least = asked.number()
    return lambda _, record: not isinstance(record, PreferencePair) or record.margin is None or record.margin >= least


@rule("kind")
def kind(asked: Asked) -> Callable[[int, Record], bool]:
    """Records of any other kind: `kind=reasoning`."""
    return lambda _, record: getattr(record, "kind", asked.value) == asked.value
