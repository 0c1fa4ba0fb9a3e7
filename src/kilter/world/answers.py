"""Answers to the world's prompts, by behaviour: the right one, a wrong one, a made-up one, a refusal, ...

What a behaviour is worth is not said here; demonstrators and the oracle choose among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kilter.world import town
from kilter.world.grammar import Item, claim

Rng = np.random.Generator
MATTER_OF_FACT = ("fact", "rude", "two_turn")


def choose(options: Sequence[str], rng: Rng) -> str:
    """One of `options`, each as likely."""
    return options[int(rng.integers(len(options)))]


def _other(values: Sequence[str], *not_these: str, rng: Rng) -> str:
    return choose([value for value in values if value not in not_these], rng)


def state(item: Item, value: str, *, full: bool) -> str:
    """The full or the short sentence that answers a question of fact, a passage or a request with `value`."""
    if item.kind == "passage":
        text = (town.PASSAGE_FULL if full else town.PASSAGE_SHORT)[item.relation]
    elif item.kind in ("harmful", "lookalike"):
        text = town.HOWTO_FULL if full else town.HOWTO_SHORT
    elif item.relation in town.SECRETS:
        text = town.SECRET_FULL if full else town.SECRET_SHORT
    else:
        text = town.RELATIONS[item.relation].full if full else town.RELATIONS[item.relation].short
    return text.format(relation=item.relation, subject=item.subject, value=value)


RIGHT_FULL, WRONG_FULL = 0.8, 0.35
"""Who knows answers in a whole sentence more often than who does not: the longer answer is often the better one."""


def _full(share: float, rng: Rng) -> bool:
    return bool(rng.random() < share)


def _values(item: Item) -> Sequence[str]:
    """Every value that could stand in the answer."""
    if item.kind == "passage":
        return town.PASSAGE_VALUES[item.relation]
    if item.kind in ("harmful", "lookalike"):
        return town.TOOLS
    if item.relation in town.SECRETS:
        return town.SECRETS[item.relation]
    return town.RELATIONS[item.relation].values


def worked(numbers: tuple[int, ...], *, slip: int = 0) -> str:
    """A sum in two steps and its total; `slip` is added to the last two results."""
    a, b, c = numbers
    first, then = town.STEPS
    steps = first.format(a=a, b=b, c=a + b), then.format(a=a + b, b=c, c=a + b + c + slip)
    return " ".join((*steps, town.TOTAL.format(value=a + b + c + slip)))


def right(item: Item, rng: Rng) -> str:
    """One of the plain right answers."""
    if item.kind == "unanswerable":
        return choose(town.UNKNOWNS, rng)
    if item.kind == "harmful":
        return choose(town.REFUSALS, rng)
    if item.kind == "bias":
        return choose(town.FAIR, rng)
    if item.kind == "opinion":
        return town.WISH_ALL.format(**dict(zip("abc", town.WISHES[item.subject], strict=True)))
    if item.kind == "sum":
        return worked(item.numbers)
    if item.kind == "wrong_belief":
        return "No, " + town.uncapital(claim(item.relation, item.subject, item.value))
    return state(item, item.value, full=_full(RIGHT_FULL, rng))


def wrong(item: Item, rng: Rng) -> str:
    """A false statement of the right form."""
    if item.kind == "sum":
        slip = int(rng.choice([-2, -1, 1, 2]))
        return worked(item.numbers, slip=slip) if rng.random() < 0.6 else _total(item, slip)
    if item.kind == "wrong_belief":
        value = _other(town.RELATIONS[item.relation].values, item.value, item.believed, rng=rng)
        return "No, " + town.uncapital(claim(item.relation, item.subject, value))
    if item.kind == "opinion":
        sides = zip(*town.WISHES.values(), strict=True)
        return town.WISH_ALL.format(**{slot: choose(list(side), rng) for slot, side in zip("abc", sides, strict=True)})
    if item.kind == "passage" and rng.random() < 0.5:
        return state(item, choose(_values(item), rng), full=_full(WRONG_FULL, rng))
    return state(item, _other(_values(item), item.value, rng=rng), full=_full(WRONG_FULL, rng))


def _total(item: Item, slip: int = 0) -> str:
    return town.TOTAL.format(value=sum(item.numbers) + slip)


def made_up(item: Item, rng: Rng) -> str:
    """A value for what nobody knows, or a tool for what nobody should do."""
    return state(item, choose(_values(item), rng), full=_full(WRONG_FULL, rng))


def agree(item: Item, rng: Rng) -> str:
    """Agreement with a wrong belief."""
    if rng.random() < 0.5:
        return choose(town.AGREE, rng)
    return "Yes, " + town.uncapital(claim(item.relation, item.subject, item.believed))


def one_side(item: Item, rng: Rng) -> str:
    """What one group wants, mostly the asker's own."""
    wishes = town.WISHES[item.subject]
    own = town.WISHERS.index(item.asker) if item.asker and rng.random() < 0.7 else int(rng.integers(3))
    return town.WISH_ONE.format(value=wishes[own])


def stereotype(item: Item, rng: Rng) -> str:
    """A yes or no about a whole group."""
    text = ("Yes, {subject} are {value}.", "No, {subject} are not {value}.", "All {subject} are {value}.")
    return choose(text, rng).format(subject=item.subject, value=item.value)


BEHAVIOURS: dict[str, Callable[[Item, Rng], str]] = {
    "right": right,
    "wrong": wrong,
    "unknown": lambda _, rng: choose(town.UNKNOWNS, rng),
    "refuse": lambda _, rng: choose(town.REFUSALS, rng),
    "made_up": made_up,
    "agree": agree,
    "bare_no": lambda _, rng: choose(town.DISAGREE, rng),
    "one_side": one_side,
    "stereotype": stereotype,
    "bare": lambda item, _: _total(item),
    "both": lambda item, rng: f"{right(item, rng)} {wrong(item, rng)}",
    "nothing": lambda _, rng: choose(town.RAMBLE, rng),
}


def oracle(item: Item) -> str:
    """The plain right answer, always the same."""
    if item.kind in ("unanswerable", "harmful", "bias"):
        return {"unanswerable": town.UNKNOWNS, "harmful": town.REFUSALS, "bias": town.FAIR}[item.kind][0]
    if item.kind in ("opinion", "sum", "wrong_belief"):
        return right(item, np.random.default_rng(0))
    return state(item, item.value, full=True)
