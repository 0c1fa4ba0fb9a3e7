"""What rating a million votes over 129 models costs, with intervals and without, beside evalica's fit.

    python bench/votes.py [--votes 1000000] [--runs 7]

Simulated votes with ties by 20,000 annotators on 100,000 prompts. On one core, all ways in turn in every run; printed:
medians, and their ratio to evalica's. Kilter begins at columns of numbers (`Comparisons`), and once at the lists of
names that evalica begins at; evalica gives strengths alone. Ends with an error where the strengths are not the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import evalica
import numpy as np

from kilter.stats.ratings import Comparisons, rate

MODELS, PEOPLE, PROMPTS = 129, 20_000, 100_000


def votes(number: int) -> Comparisons:
    """Strengths a normal number each; a fifth of the votes are ties."""
    rng = np.random.default_rng(0)
    strength = rng.normal(size=MODELS)
    left = rng.integers(MODELS, size=number)
    right = (left + rng.integers(1, MODELS, size=number)) % MODELS
    won = rng.random(number) < 1 / (1 + np.exp(strength[right] - strength[left]))
    return Comparisons(
        left,
        right,
        np.where(rng.random(number) < 0.2, 0.5, won),
        tuple(f"model {place}" for place in range(MODELS)),
        {"annotator": rng.integers(PEOPLE, size=number), "prompt": rng.integers(PROMPTS, size=number)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    data = votes(options.votes)
    lefts, rights = ([data.names[at] for at in side] for side in (data.left, data.right))
    kinds = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    outcomes = data.outcome.tolist()
    winners = [kinds[outcome] for outcome in outcomes]

    def theirs() -> np.ndarray:
        found = evalica.bradley_terry(lefts, rights, winners, tolerance=1e-8, limit=1000).scores
        logs = np.log([found[name] for name in data.names])
        return logs - logs.mean()

    def ours(*clusters: str) -> np.ndarray:
        held = {name: data.clusters[name] for name in clusters}
        return rate(Comparisons(data.left, data.right, data.outcome, data.names, held)).strength

    def from_names() -> np.ndarray:
        scale = rate(Comparisons.of(zip(lefts, rights, outcomes, strict=True)))
        return scale.strength[[scale.names.index(name) for name in data.names]]

    ways: dict[str, Callable[[], np.ndarray]] = {
        "evalica, from names, no intervals": theirs,
        "Kilter, from names": from_names,
        "Kilter": ours,
        "Kilter, by annotator": lambda: ours("annotator"),
        "Kilter, by annotator and prompt": lambda: ours("annotator", "prompt"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, np.ndarray] = {}
    for _ in range(options.runs):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - start)
    first, *others = found.values()
    apart = max(float(np.abs(first - other).max()) for other in others)
    base = statistics.median(next(iter(seconds.values())))
    print(f"{options.votes:,} votes over {MODELS} models, medians of {options.runs} runs; strengths within {apart:.1e}")
    for name, measured in seconds.items():
        middle = statistics.median(measured)
        print(f"{name:<36}{middle:8.3f} s  {middle / base:6.2f} of evalica's")
    if apart > 1e-4:
        raise SystemExit(f"the strengths differ by {apart:.1e} nats; they must agree to 1e-4")


if __name__ == "__main__":
    main()
