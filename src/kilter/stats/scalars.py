"""A number with its error for each response, from comparisons of the responses to each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from kilter.stats.intervals import Floats, Integers

Bools = NDArray[np.bool_]
NARROWEST, WIDEST = 0.02, 20.0
"""Nats between which sigma is looked for."""
STEPS, TOLERANCE = 200, 1e-6
DAMPED = 0.5
"""Of each step in precision: whole ones swing to and fro where responses differ much."""
NODES, SHARES = hermegauss(12)
SHARES = SHARES / SHARES.sum()
"""Gauss and Hermite's, for expectations under a normal distribution."""


@dataclass(frozen=True, slots=True)
class Scalars:
    """Of G prompts, each with its own number of responses."""

    values: list[Floats]
    """Nats of odds, the mean of each prompt 0."""
    errors: list[Floats]
    """Their standard errors."""
    sigma: float
    """How much responses to one prompt differ, in nats."""


def scalars(tables: Sequence[Floats], *, sigma: float | None = None) -> Scalars:
    """Strengths of the responses to each prompt, with a prior that keeps those finite that always won.

        P(i beats j) = sigmoid(theta_i - theta_j),   theta_i ~ N(0, sigma^2)

    Of each prompt's posterior the normal distribution that is nearest to it (the variational one, Opper and Archambeau
    2009, Neural Comp. 21): its mean, and its errors of theta less its mean over the prompt, of which comparisons say
    nothing. Laplace's, at the mode, is too narrow where a response won or lost nearly all: with 10 votes on every two
    and sigma 2 the variance of z is 1.16, this one's 1.06; with 3 votes and sigma 1 they are 1.08 and 1.00. sigma
    maximises the bound on the likelihood of all verdicts; of few votes a prompt it is a few percent too small.

    Args:
        tables: of each prompt float[k, k], how often (in weight) i won against j, a tie half a win of both.
        sigma: in nats; None: fitted.
    Raises:
        ValueError: a table that is none; or sigma cannot be fitted, because no verdict contradicts another, or all do.
    """
    for place, table in enumerate(tables):
        if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2 or not (table >= 0).all():
            raise ValueError(f"prompt {place}: a table of wins is [k, k] with k of 2 or more, 0 or more in each place")
    if not tables:
        raise ValueError("scalars need comparisons; none was given")
    if sigma is not None and not 0 < sigma < np.inf:
        raise ValueError(f"sigma is {sigma}; it must be above 0")
    sizes = np.array([len(table) for table in tables])
    where = {int(size): np.flatnonzero(sizes == size) for size in np.unique(sizes)}
    stacks = [np.stack([tables[place] for place in places.tolist()]).astype(np.float64) for places in where.values()]
    if sigma is None:
        sigma = _fitted(stacks)
    values: list[Floats] = [np.empty(0)] * len(tables)
    errors = list(values)
    for (size, places), stack in zip(where.items(), stacks, strict=True):
        found = _posterior(stack, sigma, None)[0]
        centre = np.eye(size) - 1.0 / size
        error = np.sqrt(np.diagonal(centre @ found.covariance @ centre, axis1=1, axis2=2))
        for place, one, other in zip(places.tolist(), found.mean, error, strict=True):
            values[place], errors[place] = one, other
    return Scalars(values, errors, sigma)


def _fitted(stacks: Sequence[Floats]) -> float:
    """Sigma of the largest marginal likelihood."""
    if not any(_goes_round(stack).any() for stack in stacks):
        raise ValueError(
            "how far responses differ cannot be fitted: no verdict contradicts the others to its prompt (those "
            "taken from one ranking never do), so they say which is better and not how surely; give sigma"
        )
    starts: list[_Posterior | None] = [None] * len(stacks)

    def loss(log_sigma: float) -> float:
        total = 0.0
        for place, stack in enumerate(stacks):
            starts[place], bound = _posterior(stack, float(np.exp(log_sigma)), starts[place])
            total -= float(bound.sum())
        return total

    bounds = (float(np.log(NARROWEST)), float(np.log(WIDEST)))
    found = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3}).x))
    if found < 1.05 * NARROWEST:
        raise ValueError(
            "how far responses differ cannot be fitted: the verdicts hold no more agreement than coins; give sigma, or "
            "collect more verdicts"
        )
    return found


def _goes_round(wins: Floats) -> Bools:
    """bool[G]: whether somebody is, over some others, better than himself."""
    beaten = wins > 0
    for _ in range(wins.shape[1].bit_length()):
        beaten = beaten | (beaten.astype(np.float64) @ beaten > 0)
    found: Bools = np.trace(beaten, axis1=1, axis2=2) > 0
    return found


class _Posterior(NamedTuple):
    """Of each of G prompts of k responses."""

    mean: Floats
    """float[G, k]."""
    precision: Floats
    """float[G, k, k]."""
    covariance: Floats
    """Its inverse."""


def _posterior(wins: Floats, sigma: float, start: _Posterior | None) -> tuple[_Posterior, Floats]:
    """Newton with expectations over the normal distribution in place of values at its middle.

    Returns:
        (the posteriors, float[G]: the bound on log P(verdicts), in nats).
    """
    size, prior = wins.shape[1], np.eye(wins.shape[1]) / sigma**2
    one, other = np.triu_indices(size, 1)
    won, lost = wins[:, one, other], wins[:, other, one]
    sign = np.zeros((len(one), size))  # a pair's gap from the strengths
    sign[np.arange(len(one)), one], sign[np.arange(len(one)), other] = 1.0, -1.0
    outer = (sign[:, :, None] * sign[:, None, :]).reshape(len(one), -1)

    def curved(spread: Floats) -> Floats:
        found: Floats = (spread @ outer).reshape(wins.shape) + prior
        return found

    mean = np.zeros(wins.shape[:2]) if start is None else start.mean
    precision = curved((won + lost) / 4) if start is None else start.precision
    covariance = _inverse(precision)
    for _ in range(STEPS):
        gaps = _gaps(mean, covariance, one, other)
        chance: Floats = expit(gaps)
        step = (won - (won + lost) * (chance @ SHARES)) @ sign - mean / sigma**2
        target = curved((won + lost) * ((chance * (1 - chance)) @ SHARES))
        changed = np.abs(target - precision).max() / np.abs(precision).max()
        precision = (1 - DAMPED) * precision + DAMPED * target
        covariance = _inverse(precision)
        moved = (covariance @ step[:, :, None])[:, :, 0]
        mean = mean + moved
        if np.abs(moved).max() < TOLERANCE * sigma and changed < 1e-4:
            break
    gaps = _gaps(mean, covariance, one, other)
    said: Floats = -(won * (np.logaddexp(0.0, -gaps) @ SHARES) + lost * (np.logaddexp(0.0, gaps) @ SHARES)).sum(1)
    trace = np.trace(covariance, axis1=1, axis2=2)
    apart = (trace + (mean**2).sum(1)) / sigma**2 - size + 2 * size * np.log(sigma) + np.linalg.slogdet(precision)[1]
    return _Posterior(mean, precision, covariance), said - apart / 2


def _inverse(matrices: Floats) -> Floats:
    return np.linalg.inv(matrices).astype(np.float64, copy=False)


def _gaps(mean: Floats, covariance: Floats, one: Integers, other: Integers) -> Floats:
    """float[G, pairs, nodes]: where the differences of two strengths are looked at."""
    own = np.diagonal(covariance, axis1=1, axis2=2)
    width = np.sqrt(own[:, one] + own[:, other] - 2 * covariance[:, one, other])
    return (mean[:, one] - mean[:, other])[:, :, None] + width[:, :, None] * NODES
