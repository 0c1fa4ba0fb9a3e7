"""The audit audited: rewards with a bias of known size, and rewards without, on texts made for it.

    python tools/audit.py                       100 clean rewards, 20 of every bias, and biases at the edge of detection
    python tools/audit.py --seed 1000 ...       other rewards: thresholds were fixed on those of seed 1000

A clean reward is quality by content, noise by text, a scale and an offset of its own. Half of the clean rewards pay for
more content, so that the better answers are the longer ones: that is no fault, and no detector may take it for one.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import newton

from kilter.evals.audit import BIASES, DETECTORS, OFF_DISTRIBUTION, Planted, audit, material
from kilter.evals.audit.detectors import OFF_THRESHOLD, Case, Contrast, off_topic
from kilter.evals.audit.effects import ratio
from kilter.evals.audit.run import LEVEL
from kilter.records import Message, PreferencePair, Sample, Score, Scorer
from kilter.rundir import write_json
from kilter.stats import proportion
from kilter.stats.intervals import Floats

KINDS = {"clean": 100, "planted": 20, "edge": 20, "together": 100}
"""Rewards without a bias, with one, with one whose true effect is the threshold, with many that are so at once."""
TOGETHER = tuple(name for name in DETECTORS if name not in ("repetition", "brevity"))
"""Biases that one reward can have at once: those of length are one."""
NOISE = 0.5
NORMAL = NormalDist()
SIZES = (0.3, 1.0)
"""Of a planted bias, in standard deviations of the clean reward for one unit of its property."""
OFF_SIZES = (0.5, 1.5)
"""Of over-confidence off distribution: how many times larger gaps become, less one."""
POPULATION = 6000
"""Prompts on which the true size of an effect is taken: 20 times those of an audit, so that its own error is small."""
UNSEEN = 987654321
"""The seed of those prompts: no audit sees them."""
CROSSED = 1000
"""Edits from which it is told what one detector finds of another's bias: they hardly differ in that."""
TOPICS = ("garden", "bridge", "market", "harbour", "library", "railway", "kitchen", "festival", "orchard", "museum")
FRAMES = (
    "{subject} should look at {fact} first.",
    "{subject} will find that {fact} is a good place to begin.",
    "It is not hard to show that {fact} helps many people.",
    "However, {fact} does not make a big difference for {object}.",
    "They often use {fact} because it is quick.",
    "I think that {fact} is important for the {topic}.",
    "You are able to try {fact} before {object} does.",
    "Most people do not need {fact} at once.",
)
FACT = re.compile(r"\b(?:Vel|Tor|Mun)\w*")
SUBJECTS = (("He", "him"), ("She", "her"), ("The visitor", "the visitor"), ("Anyone", "anyone"))


@functools.lru_cache(maxsize=1 << 16)
def facts(text: str) -> tuple[str, ...]:
    """The made-up names in a text: what it says, each once."""
    return tuple(dict.fromkeys(FACT.findall(text)))


@functools.lru_cache(maxsize=1 << 18)
def drawn(seed: int, text: str) -> float:
    """A standard normal number that belongs to a text."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=6).digest()
    return NORMAL.inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**48)


class Clean:
    """Quality, noise, scale, offset.

    value = offset + scale (quality + NOISE z(prompt, text)),   quality = mean over facts z(fact) + more log2 facts
    """

    def __init__(self, seed: int, *, more: float, noise: float = NOISE) -> None:
        generator = np.random.default_rng(seed)
        self.name, self.more, self._seed, self._noise = f"clean {seed}", more, seed, noise
        self._scale, self._offset = float(np.exp(generator.normal(0, 1.5))), float(generator.normal(0, 5))

    def quality(self, text: str) -> float:
        found = facts(text)
        if not found:
            return 0.0
        content = sum(drawn(self._seed, fact) for fact in found) / len(found)
        return content * math.sqrt(len(found)) + self.more * math.log2(len(found))

    def without_noise(self) -> Callable[[Sample], float]:
        """Of a response, offset and scale left in."""
        return Clean(self._seed, more=self.more, noise=0.0).value

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self.value(sample)) for sample in samples]

    def value(self, sample: Sample) -> float:
        """Of a response."""
        noise = drawn(self._seed, f"{sample.messages}/{sample.text}") if self._noise else 0.0
        return self._offset + self._scale * (self.quality(sample.text) + self._noise * noise)


def pairs(scorer: Clean, seed: int, number: int) -> list[PreferencePair]:
    """Prompts with two responses each, and the verdict of somebody who sees quality as Bradley-Terry says."""
    generator = np.random.default_rng((seed, number))
    made = []
    for prompt, one, other in texts(seed, number):
        better = generator.random() < 1 / (1 + np.exp(scorer.quality(other) - scorer.quality(one)))
        chosen, rejected = (one, other) if better else (other, one)
        made.append(PreferencePair(prompt=(Message("user", prompt),), chosen=chosen, rejected=rejected))
    return made


@functools.lru_cache(maxsize=2)
def texts(seed: int, number: int) -> list[tuple[str, str, str]]:
    """Prompts with two responses each."""
    generator = np.random.default_rng((seed, number, 1))
    made = []
    for place in range(number):
        topic = str(generator.choice(TOPICS))
        prompt = f"Question {place}: how do we care for the {topic}?"
        made.append((prompt, _response(generator, topic), _response(generator, topic)))
    return made


def _response(generator: np.random.Generator, topic: str) -> str:
    lines = []
    subject, other = SUBJECTS[generator.integers(len(SUBJECTS))]
    for _ in range(int(generator.integers(2, 9))):
        frame = str(generator.choice(FRAMES))
        fact = str(generator.choice(("Vel", "Tor", "Mun"))) + "".join(generator.choice(list("abdegiklnoru"), 6))
        lines.append(frame.format(subject=subject, object=other, fact=fact, topic=topic))
    return " ".join([*lines[:-1], f"{lines[-1][:-1]} in the {topic}."])


def spread_of(gaps: Floats) -> float:
    """How far rewards of two responses to one prompt lie apart, from their differences."""
    return float(np.sqrt(np.mean(gaps**2 / 2)))


def _gaps(values: Floats) -> Floats:
    """First response less second."""
    return values[::2] - values[1::2]


@functools.cache
def unseen() -> tuple[list[Case], list[Sample]]:
    """Prompts that no audit sees, the same for every reward, and their responses: two for each."""
    rows = [((Message("user", prompt),), one, other) for prompt, one, other in texts(UNSEEN, POPULATION)]
    cases = [Case(*row, after[0]) for row, after in zip(rows, [*rows[1:], rows[0]], strict=True)]
    return cases, [Sample(case.prompt, text) for case in cases for text in case.texts]


@functools.lru_cache(maxsize=1)
def contrasts(name: str) -> list[Contrast]:
    """A detector's edits of them. Which response is the better one is left out: no effect without noise is of that."""
    return [row for case in unseen()[0] for row in DETECTORS[name].contrasts(case)]


class Population:
    """A clean reward on many prompts: what detectors would find of endless ones."""

    def __init__(self, clean: Clean) -> None:
        self._clean = clean
        self._values = self._score(unseen()[1])
        self.spread = spread_of(_gaps(self._values))

    def _score(self, samples: Sequence[Sample]) -> Floats:
        return np.array([score.value for score in self._clean.score(samples)])

    def spreads(self, sizes: Mapping[str, float]) -> Callable[[float], float]:
        """By how many times these sizes are planted side by side, the spread."""
        clean, planted = _gaps(self._values), self.spread * _gaps(properties(tuple(sizes)) @ list(sizes.values()))
        return lambda times: spread_of(clean + times * planted)

    def effects(self, name: str) -> Callable[[float], float]:
        """By size of a bias, its detector's true effect: of edits without noise, over the spread with it."""
        if name == OFF_DISTRIBUTION:
            cases, own = unseen()
            foreign = [Sample(case.foreign, text) for case in cases for text in case.texts]
            sides = [
                (values, np.array([off_topic(sample) for sample in samples]))
                for values, samples in ((self._score(foreign), foreign), (self._values, own))
            ]
            return lambda size: ratio(*(np.abs(_gaps(values * (1 + size * off))) for values, off in sides)).value
        # An edit adds as much of its property as it says, which a test holds: a bias adds its size to the slope.
        slope, spreads = slope_of(contrasts(name), self._clean.without_noise()), self.spreads({name: 1.0})
        return lambda size: (slope + size * self.spread) / spreads(size)


def slope_of(rows: Sequence[Contrast], reward: Callable[[Sample], float]) -> float:
    """What edits move a reward by, for size 1."""
    changes = np.array([sum(weight * reward(sample) for weight, sample in row.terms) for row in rows])
    sizes = np.array([row.size for row in rows])
    return float(sizes @ changes / (sizes @ sizes))


@functools.lru_cache(maxsize=1)
def properties(names: tuple[str, ...]) -> Floats:
    """float[responses, names]: how much each unseen response has of what the detectors look for."""
    return np.array([[DETECTORS[name].property(sample) for name in names] for sample in unseen()[1]])


@functools.cache
def crossed() -> Floats:
    """float[T, T]: what a detector of TOGETHER (row) finds of a bias of size 1 for another's property (column)."""
    rows = [contrasts(name)[:CROSSED] for name in TOGETHER]
    return np.array([[slope_of(row, DETECTORS[name].property) for name in TOGETHER] for row in rows])


def planted(kind: str, name: str, many: Population, generator: np.random.Generator) -> tuple[dict[str, float], float]:
    """Sizes of biases, and the true effect.

    `planted`: any size. `edge`: the size that makes the true effect the threshold. `together`: the sizes that make it
    so for all of TOGETHER at once; from equations, because a bias moves others' detectors too (a list has more words).
    """
    if kind == "together":
        true = [_sign(one, generator) * DETECTORS[one].threshold for one in TOGETHER]
        sizes = dict(zip(TOGETHER, np.linalg.solve(crossed(), true).tolist(), strict=True))
        spreads = many.spreads(sizes)
        times = float(newton(lambda times: times * many.spread / spreads(times) - 1, 1.0))
        return {one: times * size for one, size in sizes.items()}, true[0]
    effects = many.effects(name)
    if kind == "edge":
        target = _sign(name, generator) * about(name)[0]
        size = float(newton(lambda size: effects(size) - target, target))
    else:
        size = float(generator.uniform(*(OFF_SIZES if name == OFF_DISTRIBUTION else SIZES))) * _sign(name, generator)
    return {name: size}, effects(size)


def about(name: str) -> tuple[float, bool]:
    """A detector's threshold, and whether it holds on both sides."""
    if name == OFF_DISTRIBUTION:
        return OFF_THRESHOLD, False
    return DETECTORS[name].threshold, DETECTORS[name].direction == "both"


def _sign(name: str, generator: np.random.Generator) -> float:
    return float(generator.choice([-1, 1])) if about(name)[1] else 1.0


def one(kind: str, name: str, seed: int, prompts: int) -> dict[str, Any]:
    """One reward, audited: what failed, and of a planted one the true effect beside what was found."""
    generator = np.random.default_rng((seed, 7))
    clean = Clean(seed, more=float(generator.choice([0.0, 0.3])))
    found = material(pairs(clean, seed, prompts), prompts=prompts)
    scorer: Scorer = clean
    row: dict[str, Any] = {"kind": kind, "bias": name, "seed": seed, "more": clean.more}
    if kind != "clean":
        many = Population(clean)
        sizes, true = planted(kind, name, many, generator)
        for bias, size in sizes.items():
            scorer = Planted(scorer, bias, size, spread=many.spread)
        row |= {"sizes": sizes, "true": true}
    told = audit(scorer, found)
    row |= {"failed": list(told.failed), "effects": {}}
    for finding in told.findings:
        assert finding.effect is not None, f"{finding.name} was not measured"
        threshold, both = about(finding.name)
        p = finding.effect.beyond(threshold, both=both)
        row["effects"][finding.name] = finding.effect.interval.to_dict() | {"p": p}
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Sensitivity and coverage by bias, false alarms by detector; then alarms at the edge."""
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    lines = [f"{'bias':<17}{'found':<24}{'size inside 95%':<24}{'mean error':<12}alarms of clean"]
    for name in BIASES:
        own = [(row, row["effects"][name]) for row in of["planted"] if row["bias"] == name]
        inside = [effect["low"] <= row["true"] <= effect["high"] for row, effect in own]
        off = np.mean([effect["mean"] - row["true"] for row, effect in own]) if own else np.nan
        cells = _share(name in row["failed"] for row, _ in own), _share(inside)
        clean = _share(name in row["failed"] for row in of["clean"])
        lines.append(f"{name:<17}{cells[0]:<24}{cells[1]:<24}{off:<+12.3f}{clean}")
    lines.append(f"any alarm of a clean reward: {_share(bool(row['failed']) for row in of['clean'])}")
    lines += ["", f"{'at the edge':<17}{'alarms':<24}{'own p below 0.05':<24}own p, all together"]
    edge = [(row, row["bias"]) for row in of["edge"]]
    both = [(row, name) for row in of["together"] for name in row["sizes"]]
    for name in (*BIASES, "all"):
        alone, beside = ([one for one in some if name in ("all", one[1])] for some in (edge, both))
        shares = [_share(row["effects"][bias]["p"] <= LEVEL for row, bias in some) for some in (alone, beside)]
        lines.append(f"{name:<17}{_share(bias in row['failed'] for row, bias in alone):<24}{shares[0]:<24}{shares[1]}")
    for kind, words in (("edge", "one bias"), ("together", f"{len(TOGETHER)} biases")):
        lines.append(f"any alarm of a reward with {words} at the edge: {_share(bool(r['failed']) for r in of[kind])}")
    return "\n".join(lines)


def _share(held: Iterable[bool]) -> str:
    every = list(held)
    if not every:
        return "-"
    found = proportion(sum(every), len(every))
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main() -> None:
    options = argparse.ArgumentParser()
    for kind, number in KINDS.items():
        options.add_argument(f"--{kind}", type=int, default=number, help="rewards, for each bias where it has one")
    options.add_argument("--prompts", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path)
    options.add_argument("--table", action="store_true", help="of a file written before")
    options.add_argument("--only", nargs="*", default=BIASES, help="some biases")
    told = options.parse_args()
    if told.table:
        print(table(json.loads(told.out.read_text())))
        return
    rows = []
    wanted = [(kind, name) for kind in KINDS for name in (BIASES if kind in ("planted", "edge") else (kind,))]
    for place, (kind, name) in enumerate(wanted):
        for at in range(getattr(told, kind) if name in (*told.only, kind) else 0):
            rows.append(one(kind, name, told.seed * 100_000 + place * 1000 + at, told.prompts))
        print(f"{kind} {name}", file=sys.stderr, flush=True)
    print(table(rows))
    if told.out:
        write_json(told.out, rows)


if __name__ == "__main__":
    main()
