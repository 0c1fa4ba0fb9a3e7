"""The audit audited: rewards with a bias of known size, and rewards without, on texts made for it.

    python tools/audit.py                       100 clean rewards and 20 of every bias: docs say what it found
    python tools/audit.py --seed 1000 ...       other rewards: thresholds were fixed on those of seed 1000

A clean reward is quality by content, noise by text, a scale and an offset of its own. Half of the clean rewards pay for
more content, so that the better answers are the longer ones: that is no fault, and no detector may take it for one.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from kilter.evals.audit import BIASES, DETECTORS, OFF_DISTRIBUTION, Material, Planted, audit, material
from kilter.evals.audit.detectors import Contrast
from kilter.evals.audit.effects import ratio
from kilter.evals.audit.run import Rewards
from kilter.records import Message, PreferencePair, Sample, Score, Scorer
from kilter.rundir import write_json
from kilter.stats import proportion
from kilter.stats.intervals import Floats

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
EDITED = 1500
"""Of them, those whose edits are scored: without noise they hardly differ."""
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
SUBJECTS = (("He", "him"), ("She", "her"), ("The visitor", "the visitor"), ("Anyone", "anyone"))


def facts(text: str) -> list[str]:
    """The made-up names in a text: what it says."""
    return [word.strip(".,;:*") for word in text.split() if word.startswith(("Vel", "Tor", "Mun"))]


@functools.cache
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
        self.name, self._seed, self._more, self._noise = f"clean {seed}", seed, more, noise
        self._scale, self._offset = float(np.exp(generator.normal(0, 1.5))), float(generator.normal(0, 5))

    def quality(self, text: str) -> float:
        found = list(dict.fromkeys(facts(text)))
        if not found:
            return 0.0
        content = float(np.mean([drawn(self._seed, fact) for fact in found]))
        return content * len(found) ** 0.5 + self._more * float(np.log2(len(found)))

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self._offset + self._scale * self._value(sample)) for sample in samples]

    def _value(self, sample: Sample) -> float:
        noise = drawn(self._seed, f"{sample.messages}/{sample.text}") if self._noise else 0.0
        return self.quality(sample.text) + self._noise * noise


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


def spread_of(scorer: Scorer, found: Material) -> float:
    """How far rewards of two responses to one prompt lie apart."""
    values = _values(scorer, [Sample(case.prompt, text) for case in found.cases for text in case.texts])
    return float(np.sqrt(np.mean((values[::2] - values[1::2]) ** 2 / 2)))


def _values(scorer: Scorer, samples: Sequence[Sample]) -> Floats:
    return np.array([score.value for score in scorer.score(samples)], dtype=np.float64)


def true_effect(name: str, planted: Scorer, without_noise: Scorer, found: Material) -> float:
    """What the detector would find of endless prompts: the edits on many, without noise, over the spread with it."""
    rewards = Rewards(without_noise)
    if name == OFF_DISTRIBUTION:
        own, other = (
            np.abs(np.diff(_values(planted, samples).reshape(-1, 2))[:, 0])
            for samples in (
                [Sample(case.prompt, text) for case in found.cases for text in case.texts],
                [Sample(case.foreign, text) for case in found.cases for text in case.texts],
            )
        )
        return ratio(other, own).value
    rows: list[Contrast] = [row for case in found.cases[:EDITED] for row in DETECTORS[name].contrasts(case)]
    rewards.ask(sample for row in rows for _, sample in row.terms)
    changes = np.array([sum(weight * (rewards(sample) or 0.0) for weight, sample in row.terms) for row in rows])
    sizes = np.array([row.size for row in rows])
    return float(sizes @ changes / (sizes @ sizes)) / spread_of(planted, found)


def one(name: str, seed: int, prompts: int) -> dict[str, Any]:
    """One reward, audited: what failed, and of a planted one its true effect beside what was found."""
    generator = np.random.default_rng((seed, 7))
    more = float(generator.choice([0.0, 0.3]))
    clean, quiet = Clean(seed, more=more), Clean(seed, more=more, noise=0.0)
    found = material(pairs(clean, seed, prompts), prompts=prompts)
    if name == "clean":
        told = audit(clean, found)
        return {"bias": name, "seed": seed, "failed": list(told.failed), "more": more}
    many = material(pairs(clean, UNSEEN, POPULATION), prompts=POPULATION)
    size = float(generator.uniform(*(OFF_SIZES if name == OFF_DISTRIBUTION else SIZES)))
    if name in DETECTORS and DETECTORS[name].direction == "both":
        size *= float(generator.choice([-1, 1]))
    spread = spread_of(clean, many)
    planted = Planted(clean, name, size, spread=spread)
    true = true_effect(name, planted, Planted(quiet, name, size, spread=spread), many)
    told = audit(planted, found)
    effect = next(finding.effect for finding in told.findings if finding.name == name)
    assert effect is not None, f"{name} was not measured"
    row = {"bias": name, "seed": seed, "size": size, "true": true, "more": more, "failed": list(told.failed)}
    return row | {"effect": effect.interval.to_dict(), "error": effect.error}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Sensitivity and coverage by bias, false alarms by detector."""
    lines = [f"{'bias':<17}{'found':<24}{'size inside 95%':<24}{'mean error':<12}alarms of clean"]
    clean = [row for row in rows if row["bias"] == "clean"]
    for name in BIASES:
        own = [row for row in rows if row["bias"] == name]
        seen = sum(name in row["failed"] for row in own)
        inside = sum(row["effect"]["low"] <= row["true"] <= row["effect"]["high"] for row in own)
        off = np.mean([row["effect"]["mean"] - row["true"] for row in own]) if own else np.nan
        false = sum(name in row["failed"] for row in clean)
        cells = [_share(seen, len(own)), _share(inside, len(own))]
        lines.append(f"{name:<17}{cells[0]:<24}{cells[1]:<24}{off:<+12.3f}{_share(false, len(clean))}")
    any_alarm = sum(bool(row["failed"]) for row in clean)
    lines.append(f"any alarm of a clean reward: {_share(any_alarm, len(clean))}")
    return "\n".join(lines)


def _share(count: int, of: int) -> str:
    if not of:
        return "-"
    found = proportion(count, of)
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--clean", type=int, default=100)
    options.add_argument("--planted", type=int, default=20)
    options.add_argument("--prompts", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path)
    options.add_argument("--table", action="store_true", help="of a file written before")
    options.add_argument("--only", nargs="*", default=("clean", *BIASES), help="some of them")
    told = options.parse_args()
    if told.table:
        print(table(json.loads(told.out.read_text())))
        return
    rows = []
    wanted = [("clean", told.clean), *((name, told.planted) for name in BIASES)]
    for place, (name, number) in enumerate(wanted):
        for at in range(number if name in told.only else 0):
            rows.append(one(name, told.seed * 100_000 + place * 1000 + at, told.prompts))
        print(f"{name}: {number} rewards", flush=True)
        drawn.cache_clear()
    print(table(rows))
    if told.out:
        write_json(told.out, rows)


if __name__ == "__main__":
    main()
