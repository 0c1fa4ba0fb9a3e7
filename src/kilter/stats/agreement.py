"""How far annotators agree, beyond what chance would give.

Every coefficient here is a function of a few sums over items: how often which categories met, how often each was given.
So its value for a bootstrap draw of items, or without one of them, is the same function of other sums, and an interval
costs one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from kilter.stats.intervals import Floats, Integers, Interval, numbered, percentiles

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["plain", "linear", "quadratic"]
DRAWS_AT_ONCE = 1 << 22
"""Elements of the table of draws held at once."""


@dataclass(frozen=True, slots=True)
class Ratings:
    """N ratings: `rater[n]` put `item[n]` into category `value[n]`; all three are places in the tuples beside."""

    item: Integers
    rater: Integers
    value: Integers
    items: tuple[Hashable, ...]
    raters: tuple[Hashable, ...]
    categories: tuple[Hashable, ...]
    """In their order, which ordinal and interval coefficients and weights go by."""

    @classmethod
    def of(
        cls, rows: Iterable[tuple[Hashable, Hashable, Hashable]], *, categories: Sequence[Hashable] | None = None
    ) -> Ratings:
        """From rows of (item, rater, category).

        Args:
            categories: all that there are, in order; None: those that occur, sorted.
        Raises:
            ValueError: no row, a category that is not listed, or a rater who rated an item twice: which of the two
                counts is for you to say, and a rater agreeing with himself is no agreement.
        """
        held = list(rows)
        if not held:
            raise ValueError("agreement needs ratings; none was given")
        seen: set[tuple[Hashable, Hashable]] = set()
        for item, rater, _ in held:
            if (item, rater) in seen:
                raise ValueError(f"rater {rater!r} rated item {item!r} twice; keep one rating of each rater and item")
            seen.add((item, rater))
        found = sorted({value for *_, value in held}, key=_order) if categories is None else list(categories)
        places = {name: place for place, name in enumerate(found)}
        for *_, value in held:
            if value not in places:
                raise ValueError(f"category {value!r} is not one of {', '.join(map(repr, found))}")
        of_item, items = numbered(row[0] for row in held)
        of_rater, raters = numbered(row[1] for row in held)
        given = np.array([places[value] for *_, value in held], dtype=np.int64)
        return cls(of_item, of_rater, given, items, raters, tuple(found))

    def counts(self) -> Floats:
        """float[items, categories]: how many raters put an item into a category."""
        table = np.zeros((len(self.items), len(self.categories)))
        np.add.at(table, (self.item, self.value), 1.0)
        return table

    def without(self, rater: Hashable) -> Ratings:
        """The ratings of all others; items and categories keep their places."""
        kept = self.rater != self.raters.index(rater)
        return Ratings(self.item[kept], self.rater[kept], self.value[kept], self.items, self.raters, self.categories)

    def both(self, first: Hashable, second: Hashable) -> tuple[Integers, Integers, Integers]:
        """The items that two raters have in common, and the category each gave."""
        tables = []
        for rater in (first, second):
            mine = self.rater == self.raters.index(rater)
            given = np.full(len(self.items), -1, dtype=np.int64)
            given[self.item[mine]] = self.value[mine]
            tables.append(given)
        common = np.flatnonzero((tables[0] >= 0) & (tables[1] >= 0))
        return common, tables[0][common], tables[1][common]


def _order(value: Hashable) -> tuple[bool, float, str]:
    """Numbers by size, then the others by name."""
    return (False, float(value), "") if isinstance(value, int | float) else (True, 0.0, str(value))


class Coefficient(NamedTuple):
    """A coefficient as a function of sums over items."""

    parts: Floats
    """float[items, F]: what each item adds to the sums."""
    of: Callable[[Floats], Floats]
    """float[..., F], sums -> float[...]; NaN where it has no value."""

    def value(self) -> float:
        """The coefficient of all items."""
        return float(self.of(self.parts.sum(0)))

    def interval(self, generator: np.random.Generator, *, resamples: int = 1000, confidence: float = 0.95) -> Interval:
        """With its percentile interval over draws of whole items (Davison and Hinkley 1997, section 3.8); `n` counts
        the items that add to it, and of one nothing is known.

        Raises:
            ValueError: the coefficient has no value, as where all ratings are the same.
        """
        value, size = self.value(), len(self.parts)
        if not np.isfinite(value):
            raise ValueError(
                "agreement beyond chance has no value: no item has two ratings, or all ratings are of one category"
            )
        count = int((self.parts != 0).any(1).sum())
        if count == 1:
            return Interval(value, -np.inf, np.inf, 1)
        found = []
        step = max(1, DRAWS_AT_ONCE // size)
        for begin in range(0, resamples, step):
            drawn = generator.multinomial(size, np.full(size, 1.0 / size), size=min(step, resamples - begin))
            found.append(self.of(drawn @ self.parts))
        draws = np.concatenate(found)
        return Interval(value, *percentiles(draws[np.isfinite(draws)], confidence), count)

    def pull(self) -> Floats:
        """float[items]: the coefficient with an item, less that without it. Low: the item pulls agreement down."""
        total = self.parts.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = self.of(total) - self.of(total - self.parts)
        return found


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(below > 0, above / below, np.nan)
    return found


def _agreeing(counts: Floats) -> Floats:
    """Of each item's pairs of ratings, the share that agree; 0 where there is no pair."""
    given = counts.sum(1)
    pairs = given * (given - 1)
    found: Floats = np.where(pairs > 0, (counts * (counts - 1)).sum(1) / np.maximum(pairs, 1.0), 0.0)
    return found


def raw(ratings: Ratings) -> Coefficient:
    """Of two raters of an item, how often they agree: the mean over items with two ratings or more.

    Three raters, two items, (a, a, b) and (a, a, a): (1/3 + 1) / 2 = 0.667.
    """
    counts = ratings.counts()
    rated = (counts.sum(1) > 1).astype(np.float64)
    return Coefficient(np.column_stack([_agreeing(counts), rated]), lambda s: _ratio(s[..., 0], s[..., 1]))


def cohen(ratings: Ratings, first: Hashable, second: Hashable, *, weights: Weights = "plain") -> Coefficient:
    """Cohen's kappa of two raters on the items that both rated.

        1 - sum_kl w_kl o_kl / sum_kl w_kl e_kl,   e_kl = o_k. o_.l / n

    o counts the items that the first put into k and the second into l; w is 1 - [k = l], |k - l| or (k - l)^2 over the
    places of the categories. Cohen 1960 (Educ. Psychol. Meas. 20), eq. 1; weighted: Cohen 1968 (Psychol. Bull. 70).

    Raises:
        ValueError: the two have no item in common.
    """
    common, one, other = ratings.both(first, second)
    if not len(common):
        raise ValueError(f"raters {first!r} and {second!r} rated no item in common; choose two that did")
    if weights not in get_args(Weights):
        raise ValueError(f"weights {weights!r}; choose one of {', '.join(get_args(Weights))}")
    size = len(ratings.categories)
    parts = np.zeros((len(common), size * size))
    parts[np.arange(len(common)), one * size + other] = 1.0
    apart = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(np.float64)
    far = {"plain": np.sign(apart), "linear": apart, "quadratic": apart**2}[weights]

    def of(sums: Floats) -> Floats:
        met = sums.reshape(*sums.shape[:-1], size, size)
        expected = met.sum(-1)[..., :, None] * met.sum(-2)[..., None, :] / met.sum((-1, -2))[..., None, None]
        found: Floats = 1 - _ratio((far * met).sum((-1, -2)), (far * expected).sum((-1, -2)))
        return found

    return Coefficient(parts, of)


def fleiss(ratings: Ratings) -> Coefficient:
    """Fleiss' kappa: `(P - P_e) / (1 - P_e)`, P the agreeing share of pairs of ratings, P_e = sum_k p_k^2.

    Fleiss 1971 (Psychol. Bull. 76), eq. 1-7.

    Raises:
        ValueError: items with different numbers of ratings, which it is not defined for.
    """
    counts = ratings.counts()
    given = counts.sum(1)
    if given.min() != given.max() or given.max() < 2:
        raise ValueError(
            f"Fleiss' kappa needs the same number of ratings for every item, two or more; here they have "
            f"{given.min():.0f} to {given.max():.0f}: use alpha or ac1"
        )
    parts = np.column_stack([_agreeing(counts), np.ones(len(counts)), counts / given[:, None]])

    def of(sums: Floats) -> Floats:
        chance = ((sums[..., 2:] / sums[..., 1:2]) ** 2).sum(-1)
        return _ratio(sums[..., 0] / sums[..., 1] - chance, 1 - chance)

    return Coefficient(parts, of)


def ac1(ratings: Ratings) -> Coefficient:
    """Gwet's AC1, which does not fall when nearly all ratings are of one category.

        (P - P_e) / (1 - P_e),   P_e = sum_k p_k (1 - p_k) / (K - 1)

    P over items with two ratings or more, p_k over all: the mean share of an item's ratings that are k. Gwet 2008
    (Br. J. Math. Stat. Psychol. 61), eq. 5 and 19.
    """
    counts = ratings.counts()
    given, size = counts.sum(1), len(ratings.categories)
    shares = counts / np.maximum(given, 1.0)[:, None]
    rated = (given > 1).astype(np.float64)
    parts = np.column_stack([_agreeing(counts), rated, (given > 0).astype(np.float64), shares])

    def of(sums: Floats) -> Floats:
        p = sums[..., 3:] / sums[..., 2:3]
        chance = (p * (1 - p)).sum(-1) / max(size - 1, 1)
        return _ratio(_ratio(sums[..., 0], sums[..., 1]) - chance, 1 - chance)

    return Coefficient(parts, of)


def alpha(ratings: Ratings, *, level: Level = "nominal") -> Coefficient:
    """Krippendorff's alpha, for any number of raters and missing ratings: `1 - D_o / D_e`.

        D_o = sum_kl o_kl d_kl / n,   D_e = sum_kl n_k n_l d_kl / (n (n - 1))

    o_kl are coincidences: in an item with m >= 2 ratings every ordered pair of them adds 1 / (m - 1). d_kl is [k != l]
    (nominal), (k - l)^2 of the categories' own numbers (interval), or (n_k / 2 + sum of n between + n_l / 2)^2
    (ordinal). Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections A to E.

    Raises:
        ValueError: `interval` for categories that are not numbers.
    """
    if level not in get_args(Level):
        raise ValueError(f"level {level!r}; choose one of {', '.join(get_args(Level))}")
    if level == "interval" and not all(isinstance(name, int | float) for name in ratings.categories):
        raise ValueError(f"level 'interval' needs categories that are numbers, not {ratings.categories[0]!r}")
    counts, size = ratings.counts(), len(ratings.categories)
    given = counts.sum(1)
    met = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(size)
    met /= np.maximum(given - 1, 1.0)[:, None, None]
    numbers = np.array(ratings.categories, dtype=np.float64) if level == "interval" else np.arange(float(size))

    def of(sums: Floats) -> Floats:
        coincidences = sums.reshape(*sums.shape[:-1], size, size)
        each = coincidences.sum(-1)  # n_k
        total = each.sum(-1)
        if level == "ordinal":
            up_to = np.cumsum(each, -1) - each / 2  # half of a category's own stand below its middle
            far = (up_to[..., :, None] - up_to[..., None, :]) ** 2
        else:
            far = np.subtract.outer(numbers, numbers) ** 2
            far = np.sign(far) if level == "nominal" else far
        observed = (coincidences * far).sum((-1, -2))
        expected = (each[..., :, None] * each[..., None, :] * far).sum((-1, -2))
        found: Floats = 1 - _ratio(observed * (total - 1), expected)
        return found

    return Coefficient(met.reshape(len(counts), -1), of)


def leave_one_out(ratings: Ratings) -> Coefficient:
    """How often a rating is the majority of the item's other ratings; one of m majorities counts 1 / m.

    What AlpacaEval calls human agreement (Dubois et al. 2023, arXiv 2305.14387, section 4.1).
    """
    counts = ratings.counts()
    credit, judged = np.zeros(len(counts)), np.zeros(len(counts))
    given = counts.sum(1)
    for value in range(counts.shape[1]):
        others = counts.copy()
        others[:, value] -= 1
        most = others.max(1)
        right = np.where(others[:, value] == most, 1.0 / np.maximum((others == most[:, None]).sum(1), 1), 0.0)
        kept = np.where(given > 1, counts[:, value], 0.0)
        credit, judged = credit + kept * right, judged + kept
    return Coefficient(np.column_stack([credit, judged]), lambda s: _ratio(s[..., 0], s[..., 1]))


def pull_of_raters(ratings: Ratings, measure: Callable[[Ratings], Coefficient]) -> dict[Hashable, float]:
    """By rater, the coefficient with him less that without him: low, he pulls agreement down. NaN: none without him."""
    whole = measure(ratings).value()
    return {rater: whole - measure(ratings.without(rater)).value() for rater in ratings.raters}
