"""Models of annotators: whose verdicts are right how often, and what they like beside quality.

Dawid and Skene's model for any categories, and a model of verdicts on two responses in which every annotator has a
skill, a liking for length and a liking for the side shown first. In both the truth is not seen: what tells a good
annotator from a bad one is who agrees with whom, so both take for granted that the crowd is right on the whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr, ndtri

from kilter.stats.agreement import Ratings
from kilter.stats.intervals import Floats, Integers, Interval, numbered, percentiles

EFFECTS = ("skill", "length", "side")
PRIOR_ERROR = 2.0
"""The crowd's mean effects are N(0, this^2): weak, but where all agree on everything skill stays finite."""
PRIOR_SPREAD, PRIOR_COUNT = 0.7, 1.0
"""The squared spread of an effect is scaled inverse chi-squared: as if so many further annotators had that one."""
RELIABILITY_DRAWS = 40
"""Of the posterior, that a reliability is averaged over."""
TERMS = 4
"""Of a Polya-gamma variable's sum that are drawn; the others add their mean, and lack 1 in 3,000 of the variance."""
Shared = Literal["quality", "liking"]


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """Each item's true category, how each annotator sees it, and how common it is."""

    ratings: Ratings
    posterior: Floats
    """float[items, K]: the probability that an item is of a category."""
    confusion: Floats
    """float[raters, K, K]: the probability that a rater puts an item of category k into category l."""
    prior: Floats
    """float[K]: the share of items that are of a category."""
    likelihood: float
    """Log-likelihood of the ratings, in nats."""
    objective: tuple[float, ...]
    """What EM climbs, from step to step: the log-likelihood plus the log densities of the Dirichlet smoothing."""


def dawid_skene(ratings: Ratings, *, smoothing: float = 0.1, steps: int = 1000, tolerance: float = 1e-9) -> DawidSkene:
    """The model of Dawid and Skene by EM, from the majority vote.

        P(item i is k | ratings) ~ p_k prod_n pi[rater n, k, value n],   n over the item's ratings
        pi[a, k, l] ~ smoothing + sum of P(item is k) over items that a put into l,   p_k ~ smoothing + sum_i P(i is k)

    Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm" (Appl. Stat.
    28). Theirs is `smoothing` 0; a Dirichlet prior of `1 + smoothing` keeps a category that a rater never used possible
    for him. Raters err independently of each other given the true category: two who copy look like two good ones.

    Args:
        smoothing: 0 or more, ratings added to each cell of a confusion matrix, items to each category.
        tolerance: EM ends when a step raises the objective by less than this share of it.
    """
    if smoothing < 0:
        raise ValueError(f"smoothing is {smoothing}; it must be 0 or more")
    size, raters = len(ratings.categories), len(ratings.raters)
    counts = ratings.counts()
    posterior = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
    cell = ratings.rater * size + ratings.value
    climbed: list[float] = []
    while True:
        prior: Floats = posterior.sum(0) + smoothing
        prior /= prior.sum()
        confusion = np.full((raters, size, size), float(smoothing))
        for k in range(size):
            confusion[:, k] += np.bincount(cell, posterior[ratings.item, k], raters * size).reshape(raters, size)
        # Without smoothing, a rater who surely saw nothing of a category says nothing of how he would see it.
        confusion[confusion.sum(2) == 0] = 1.0
        confusion /= confusion.sum(2, keepdims=True)
        with np.errstate(divide="ignore"):
            logs, base = np.log(confusion), np.log(prior)
        joint = np.stack(
            [np.bincount(ratings.item, logs[ratings.rater, k, ratings.value], len(counts)) for k in range(size)], axis=1
        )
        joint += base
        each = logsumexp(joint, axis=1, keepdims=True)
        posterior, likelihood = np.exp(joint - each), float(each.sum())
        climbed.append(likelihood + (smoothing * float(logs.sum() + base.sum()) if smoothing else 0.0))
        if len(climbed) >= steps or (len(climbed) > 1 and climbed[-1] - climbed[-2] <= tolerance * abs(climbed[-1])):
            return DawidSkene(ratings, posterior, confusion, prior, likelihood, tuple(climbed))


@dataclass(frozen=True, slots=True)
class Verdicts:
    """N verdicts on items of two responses, sorted by item; `outcome` 1: the item's first is better, 0: its second."""

    item: Integers
    annotator: Integers
    outcome: Floats
    side: Floats
    """float[N]: 1 where the item's first response was shown first, -1 where its second was, 0 where nobody knows."""
    length: Floats
    """float[items]: log length of the item's first response less that of its second."""
    items: tuple[Hashable, ...]
    annotators: tuple[Hashable, ...]

    @classmethod
    def of(
        cls, rows: Iterable[tuple[Hashable, Hashable, float, int]], lengths: Mapping[Hashable, float] | None = None
    ) -> Verdicts:
        """From rows of (item, annotator, outcome, side), and the items' differences in length; None: no difference.

        Raises:
            ValueError: no row, an outcome other than 0, 1/2 and 1, a side other than -1, 0 and 1.
        """
        held = list(rows)
        if not held:
            raise ValueError("a model of annotators needs verdicts; none was given")
        for place, (_, _, outcome, side) in enumerate(held):
            if outcome not in (0.0, 0.5, 1.0):
                raise ValueError(f"verdict {place}: outcome is {outcome}; give 1 (first), 0.5 (tie) or 0 (second)")
            if side not in (-1, 0, 1):
                raise ValueError(f"verdict {place}: side is {side}; give 1 (first shown first), -1, or 0 (unknown)")
        item, items = numbered(row[0] for row in held)
        annotator, annotators = numbered(row[1] for row in held)
        order = np.argsort(item, kind="stable")
        outcomes = np.array([row[2] for row in held], dtype=np.float64)
        sides = np.array([row[3] for row in held], dtype=np.float64)
        length = np.array([0.0 if lengths is None else lengths[name] for name in items], dtype=np.float64)
        return cls(item[order], annotator[order], outcomes[order], sides[order], length, items, annotators)


@dataclass(frozen=True, slots=True)
class Crowd:
    """What each annotator is like, and which response is the better one: draws from the posterior."""

    verdicts: Verdicts
    effects: Floats
    """float[draws, A, 3]: skill, length and side of each annotator."""
    means: Floats
    """float[draws, 3]: the crowd's mean effects."""
    spreads: Floats
    """float[draws, 3]: the standard deviation of each effect among annotators."""
    quality: Floats
    """float[items]: posterior mean of d."""
    better: Mapping[str, Floats]
    """By what a shared liking for length is taken for, float[items]: the probability that the first is better."""
    with_others: NDArray[np.bool_]
    """bool[A]: whether another annotator judged one of his items; else nothing but the crowd tells his skill."""

    def interval(self, annotator: Hashable, effect: str, *, confidence: float = 0.95) -> Interval:
        """Of one annotator's `skill`, `length` or `side`; n: his verdicts."""
        who = self.verdicts.annotators.index(annotator)
        count = int((self.verdicts.annotator == who).sum())
        return _interval(self.effects[:, who, EFFECTS.index(effect)], count, confidence)

    def mean_interval(self, effect: str, *, confidence: float = 0.95) -> Interval:
        """Of the crowd's mean effect; n: annotators."""
        return _interval(self.means[:, EFFECTS.index(effect)], self.effects.shape[1], confidence)

    def reliability(self, shared: Shared = "quality") -> Floats:
        """float[A]: 2 P(right) - 1 of an annotator's verdict on two responses of which nobody else says anything.

            E[sign(better) tanh((skill d + length z + side s) / 2)],   better as in `better`

        over d ~ N(0, 1), the items' z, either side (0 where no verdict knows its side), and the posterior. Of skill 1
        with nothing beside it: 0.350; of skill -1: -0.350; of one who always takes the side or the length: near 0.
        """
        if shared not in get_args(Shared):
            raise ValueError(f"shared {shared!r}; choose one of {', '.join(get_args(Shared))}")
        held, levels = self.verdicts, (np.arange(32) + 0.5) / 32
        lengths = np.quantile(held.length, levels) if held.length.any() else np.zeros(1)
        d, z = (grid.ravel() for grid in np.meshgrid(ndtri(levels), lengths))
        sides = (-1.0, 1.0) if held.side.any() else (0.0,)
        kept = np.linspace(0, len(self.effects) - 1, RELIABILITY_DRAWS).astype(int)
        total = np.zeros(self.effects.shape[1])
        for draw in kept:
            of_d, of_z, _ = self.means[draw]
            better = np.sign(of_d * d + of_z * z) if shared == "quality" else np.sign(d)
            skill, length, side = self.effects[draw].T[:, :, None]
            for s in sides:
                total += np.tanh((skill * d + length * z + side * s) / 2) @ better
        found: Floats = total / (len(kept) * len(sides) * len(d))
        return found


def crowd(verdicts: Verdicts, generator: np.random.Generator, *, draws: int = 2000, burn: int = 300) -> Crowd:
    """A skill, a liking for length and one for a side of each annotator, from whose verdicts agree with whose.

        P(a prefers the first of item i) = sigmoid(skill_a d_i + length_a z_i + side_a s),   d_i ~ N(0, 1)
        effect_a ~ N(mean, spread^2), for each of the three effects

    d is the difference in quality that the crowd sees beside length, z the difference in log length, s which was shown
    first; a tie is half of each verdict. So an annotator of few verdicts is taken to be like the crowd (shrinkage), and
    how alike annotators are is fitted with everything else; priors are weak (`PRIOR_ERROR`, `PRIOR_SPREAD`).

    The posterior is drawn by Gibbs' sampler: Polya-gamma variables make the logistic normal (Polson, Scott and Windle
    2013, JASA 108), and skills and d are rescaled against each other, which no verdict sees (Liu and Sabatti 2000,
    Biometrika 87). The maximum over effects with d integrated out, the usual way for tests of pupils (Bock and Aitkin
    1981, Psychometrika 46), was tried first: the skewness of the annotators' likelihoods adds up, so that with 100
    verdicts of each the crowd's mean skill comes out at 1.26 where it is 1.43, and 95% intervals of skills at 40
    verdicts of each hold 85% of them; these hold 94%.

    What verdicts cannot say:
        - whether longer is better: a liking for length that all share gives the same verdicts as truly better longer
          responses. `Crowd.better` has both readings: `quality`, better is what the mean annotator would prefer without
          noise and sides (`skill d + length z > 0`), and `liking`, better is what he would prefer at equal length
          (`d > 0`).
        - which way is up: with every skill and every d turned round the verdicts are the same. The crowd's mean skill
          is taken to be positive (the start and the prior); where most are adversaries, the others look like them.
        - skill without others: where nobody else judged an annotator's items, his skill is the crowd's, whatever he
          does (`with_others`).

    Comparisons of one ranking are taken as independent, which they are not quite: intervals are then a little narrow.

    Args:
        draws: kept; `burn` are thrown away before.
    Raises:
        ValueError: no two annotators judged one item; nothing tells skill from chance.
    """
    chain = _Chain(verdicts)
    if not chain.with_others.any():
        raise ValueError(
            f"no two annotators judged the same item ({len(verdicts.items)} items, {len(verdicts.annotators)} "
            "annotators), so nothing tells skill from chance; have some items judged by two annotators or more"
        )
    for _ in range(burn):
        chain.step(generator)
    effects, means, spreads = [], [], []
    quality, quality_better, liking_better = (np.zeros(len(verdicts.items)) for _ in range(3))
    for _ in range(draws):
        at, error = chain.step(generator)
        effects.append(chain.effects)
        means.append(chain.mean)
        spreads.append(chain.spread)
        skill, length, _ = chain.mean
        quality += at / draws
        liking_better += ndtr(at / error) / draws
        quality_better += ndtr((skill * at + length * verdicts.length) / (abs(skill) * error)) / draws
    return Crowd(
        verdicts,
        np.stack(effects),
        np.stack(means),
        np.stack(spreads),
        quality,
        {"quality": quality_better, "liking": liking_better},
        chain.with_others,
    )


class _Chain:
    """Where the sampler stands; all loops over verdicts are numpy's."""

    def __init__(self, verdicts: Verdicts) -> None:
        self.all = verdicts
        size = len(verdicts.annotators)
        self.start = np.searchsorted(verdicts.item, np.arange(len(verdicts.items)))
        self.z = verdicts.length[verdicts.item]
        first, last = (of.reduceat(verdicts.annotator, self.start) for of in (np.minimum, np.maximum))
        self.with_others = np.zeros(size, dtype=np.bool_)
        self.with_others[verdicts.annotator[(first != last)[verdicts.item]]] = True
        self.mean, self.spread = np.array([1.0, 0.0, 0.0]), np.full(3, PRIOR_SPREAD)
        self.effects = np.tile(self.mean, (size, 1))
        self.d = np.zeros(len(verdicts.items))

    def step(self, generator: np.random.Generator) -> tuple[Floats, Floats]:
        """One round; mean and standard deviation of each d in it, given all else."""
        held, size = self.all, len(self.effects)
        skill, length, side = (effect[held.annotator] for effect in self.effects.T)
        beside = length * self.z + side * held.side
        kappa = held.outcome - 0.5
        omega = polya_gamma(skill * self.d[held.item] + beside, generator)
        precision = 1.0 + np.add.reduceat(omega * skill**2, self.start)
        at = np.add.reduceat(skill * (kappa - omega * beside), self.start) / precision
        error = precision**-0.5
        self.d = at + error * generator.standard_normal(len(at))

        design = (self.d[held.item], self.z, held.side)
        inner, right = np.empty((size, 3, 3)), np.empty((size, 3))
        for one in range(3):
            right[:, one] = np.bincount(held.annotator, kappa * design[one], size)
            for other in range(one + 1):
                found = np.bincount(held.annotator, omega * design[one] * design[other], size)
                inner[:, one, other] = inner[:, other, one] = found
        inner += np.diag(self.spread**-2)
        right += self.mean * self.spread**-2
        root = np.linalg.cholesky(inner)  # precision = L L', so L'^-1 e has its inverse as covariance
        noise = np.linalg.solve(root.transpose(0, 2, 1), generator.standard_normal((size, 3, 1)))
        self.effects = (np.linalg.solve(inner, right[:, :, None]) + noise)[:, :, 0]

        precision = size * self.spread**-2 + PRIOR_ERROR**-2
        middle = self.effects.sum(0) * self.spread**-2 / precision
        self.mean = middle + precision**-0.5 * generator.standard_normal(3)
        around = ((self.effects - self.mean) ** 2).sum(0) + PRIOR_COUNT * PRIOR_SPREAD**2
        self.spread = np.sqrt(around / generator.chisquare(size + PRIOR_COUNT, 3))
        turn = 1.0 if self.effects[held.annotator, 0].sum() >= 0 else -1.0  # of two states that no verdict tells apart
        scale = self._scale(generator)
        by = np.array([turn * scale, 1.0, 1.0])
        self.effects, self.mean, self.spread = self.effects * by, self.mean * by, self.spread * np.abs(by)
        self.d = self.d * turn / scale
        return turn * at / scale, error / scale

    def _scale(self, generator: np.random.Generator) -> float:
        """What skills, their mean and spread are multiplied by and every d is divided by: a Metropolis step on its log.

        What changes is the density of d, of the mean and of the spread; the Jacobian of skills, mean and spread against
        that of d is c^(A + 2 - items), and the density of the skills about their mean gives c^-A.
        """
        items, squares, mean, spread = len(self.d), float(self.d @ self.d), self.mean[0], self.spread[0]

        def density(log: float) -> float:
            c = np.exp(log)
            above = squares / c**2 + (c * mean / PRIOR_ERROR) ** 2 + PRIOR_COUNT * (PRIOR_SPREAD / (c * spread)) ** 2
            return float((2 - items - PRIOR_COUNT - 1) * log - above / 2)

        log = float(generator.normal(0.0, 1.7 / np.sqrt(2.0 * items)))
        return float(np.exp(log)) if np.log(generator.random()) < density(log) - density(0.0) else 1.0


def polya_gamma(tilt: Floats, generator: np.random.Generator) -> Floats:
    """float[N] -> float[N]: draws from PG(1, tilt), whose mean is `tanh(tilt / 2) / (2 tilt)`.

        sum_k g_k / (2 pi^2 ((k - 1/2)^2 + tilt^2 / (4 pi^2))),   g_k ~ Exponential(1), k = 1, 2, ...

    Polson, Scott and Windle 2013, eq. 2. The terms after the first `TERMS` are given their mean.
    """
    half = np.maximum(np.abs(tilt), 1e-4) / 2
    found, least = np.tanh(half) / (4 * half), (tilt / (2 * np.pi)) ** 2
    for place in range(TERMS):
        found += (generator.standard_exponential(len(tilt)) - 1.0) / (2 * np.pi**2 * ((place + 0.5) ** 2 + least))
    return found


def _interval(draws: Floats, count: int, confidence: float) -> Interval:
    return Interval(float(draws.mean()), *percentiles(draws, confidence), count)
