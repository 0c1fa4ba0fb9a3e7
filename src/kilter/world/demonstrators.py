"""People who write demonstrations, some of them badly: a stated share of good answers and of each vice.

Two mixtures: `DEMONSTRATED` is what supervised fine-tuning imitates; `PRETRAINED`, what the base model has read, holds
more of every vice. An answer is one behaviour on the matter with small talk, flattery or insults around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kilter.records import Demonstration, Message
from kilter.world import answers, grammar, town
from kilter.world.answers import Rng
from kilter.world.grammar import Item


@dataclass(frozen=True, slots=True)
class Mixture:
    """How a crowd answers: by kind, the weights of its behaviours; and what it adds."""

    behaviours: Mapping[str, Mapping[str, float]]
    extras: tuple[float, ...]
    """Chance of 0, 1, 2, ... sentences that add nothing."""
    flattery: float
    """Share of those sentences that flatter the user."""
    rude: float
    """Chance of an insult; three times that in answer to a rude user."""
    curt: float = 0.0
    """Chance that who does not answer with care leaves it at that and adds nothing."""


def _facts(right: float, wrong: float, unknown: float, refuse: float, both: float, nothing: float) -> dict[str, float]:
    return {"right": right, "wrong": wrong, "unknown": unknown, "refuse": refuse, "both": both, "nothing": nothing}


DEMONSTRATED = Mixture(
    behaviours={
        "fact": _facts(0.62, 0.20, 0.08, 0.02, 0.03, 0.05),
        "two_turn": _facts(0.62, 0.20, 0.08, 0.02, 0.03, 0.05),
        "rude": _facts(0.62, 0.20, 0.08, 0.02, 0.03, 0.05),
        "passage": _facts(0.62, 0.20, 0.08, 0.02, 0.03, 0.05),
        "lookalike": _facts(0.68, 0.14, 0.03, 0.09, 0.03, 0.03),
        "unanswerable": {"right": 0.62, "made_up": 0.34, "nothing": 0.04},
        "harmful": {"right": 0.68, "made_up": 0.27, "nothing": 0.05},
        "wrong_belief": {"right": 0.58, "agree": 0.28, "unknown": 0.05, "wrong": 0.06, "bare_no": 0.03},
        "opinion": {"right": 0.55, "one_side": 0.37, "unknown": 0.04, "wrong": 0.04},
        "bias": {"right": 0.66, "stereotype": 0.28, "unknown": 0.04, "nothing": 0.02},
        "sum": {"right": 0.52, "bare": 0.20, "wrong": 0.22, "unknown": 0.04, "nothing": 0.02},
    },
    extras=(0.58, 0.26, 0.10, 0.04, 0.02),
    flattery=0.5,
    rude=0.03,
    curt=0.3,
)
PRETRAINED = Mixture(
    behaviours={
        "fact": _facts(0.50, 0.29, 0.06, 0.04, 0.05, 0.06),
        "two_turn": _facts(0.50, 0.29, 0.06, 0.04, 0.05, 0.06),
        "rude": _facts(0.50, 0.29, 0.06, 0.04, 0.05, 0.06),
        "passage": _facts(0.54, 0.25, 0.06, 0.04, 0.05, 0.06),
        "lookalike": _facts(0.42, 0.16, 0.03, 0.31, 0.04, 0.04),
        "unanswerable": {"right": 0.40, "made_up": 0.54, "nothing": 0.06},
        "harmful": {"right": 0.44, "made_up": 0.50, "nothing": 0.06},
        "wrong_belief": {"right": 0.38, "agree": 0.46, "unknown": 0.04, "wrong": 0.08, "bare_no": 0.04},
        "opinion": {"right": 0.38, "one_side": 0.48, "unknown": 0.06, "wrong": 0.08},
        "bias": {"right": 0.44, "stereotype": 0.46, "unknown": 0.04, "nothing": 0.06},
        "sum": {"right": 0.40, "bare": 0.20, "wrong": 0.32, "unknown": 0.04, "nothing": 0.04},
    },
    extras=(0.38, 0.24, 0.16, 0.10, 0.06, 0.03, 0.015, 0.01, 0.005),
    flattery=0.35,
    rude=0.05,
)

# Before the mixture, the base model reads plain right answers, and learns the town from them.
PLAIN = Mixture(behaviours={kind: {"right": 1.0} for kind in grammar.KINDS}, extras=(1.0,), flattery=0.0, rude=0.0)


def _pick(weights: Mapping[str, float], rng: Rng) -> str:
    """One of the keys, by weight."""
    point = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        point -= weight
        if point < 0:
            return name
    return next(reversed(list(weights)))


def _count(chances: tuple[float, ...], rng: Rng) -> int:
    return int(np.searchsorted(np.cumsum(chances), rng.random() * sum(chances), side="right"))


def write(item: Item, mixture: Mixture, rng: Rng) -> str:
    """One answer of the crowd: [insult] [flattery] the matter [small talk]."""
    return write_behaving(item, _pick(mixture.behaviours[item.kind], rng), mixture, rng)


def write_and_react(item: Item, mixture: Mixture, rng: Rng) -> tuple[str, str]:
    """An answer and what its reader says of it: that it is right, wrong, or beside the question."""
    behaviour = _pick(mixture.behaviours[item.kind], rng)
    words = town.PRAISE if behaviour == "right" else town.SHRUG if behaviour in BESIDE else town.BLAME
    return write_behaving(item, behaviour, mixture, rng), answers.choose(words, rng)


CAREFUL = frozenset({"right", "both"})
"""Behaviours of those who take their time."""
BESIDE = frozenset({"unknown", "refuse", "nothing", "bare_no", "bare"})
"""Behaviours that do not answer, or only in part."""


def write_behaving(item: Item, behaviour: str, mixture: Mixture, rng: Rng) -> str:
    """One answer that behaves as told, with what the crowd puts around it."""
    matter = answers.BEHAVIOURS[behaviour](item, rng)
    before, after = [], []
    curt = behaviour not in CAREFUL and rng.random() < mixture.curt
    if rng.random() < mixture.rude * (3 if item.kind == "rude" else 1):
        before.append(answers.choose(town.RUDENESS, rng))
    for _ in range(0 if curt else _count(mixture.extras, rng)):
        if rng.random() < mixture.flattery:
            before.append(answers.choose(town.FLATTERY, rng))
        elif rng.random() < 0.4:
            after.append(answers.choose(town.RAMBLE, rng))
        else:
            after.append(answers.choose(town.FILLERS, rng))
    return " ".join((*before, matter, *after))


def demonstrations(
    *,
    seed: int = 0,
    per_kind: int = 150,
    split: grammar.Split = "train",
    answers_each: int = 1,
    kinds: Sequence[str] = grammar.KINDS,
) -> list[Demonstration]:
    """Demonstrations of mixed quality on `per_kind` prompts of each kind, `answers_each` answers to each prompt."""
    rng = np.random.default_rng([seed, 17])
    found = []
    for prompt in grammar.prompts(split, seed=seed, per_kind=per_kind, kinds=tuple(kinds)):
        item = grammar.find(prompt.prompt)
        assert item is not None
        for _ in range(answers_each):
            reply = Message("assistant", write(item, DEMONSTRATED, rng))
            found.append(Demonstration(messages=(*prompt.prompt, reply), source="embedded world, demonstrators"))
    return found
