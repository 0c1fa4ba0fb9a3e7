"""Figures with their intervals: means, proportions, paired differences, bootstraps, win rates, diversity of texts."""

from kilter.stats import diversity
from kilter.stats.intervals import (
    Interval,
    bootstrap,
    cluster_bootstrap,
    clustered_mean,
    clustered_share,
    mean_interval,
    paired_difference,
    proportion,
)
from kilter.stats.rates import pair_accuracy, win_rate, wins

__all__ = [
    "Interval",
    "bootstrap",
    "cluster_bootstrap",
    "clustered_mean",
    "clustered_share",
    "diversity",
    "mean_interval",
    "pair_accuracy",
    "paired_difference",
    "proportion",
    "win_rate",
    "wins",
]
