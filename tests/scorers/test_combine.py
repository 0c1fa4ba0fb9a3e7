"""Several heads make one reward: every way by hand, and what a recipe may not say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kilter.errors import ConfigError
from kilter.scorers.combine import Combination

LABELS = ("farmer", "fisher", "trader")
SAID = np.array([[1.0, -2.0], [2.0, 0.0], [6.0, 5.0]])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, [3.0, 1.0]),
        ({"how": "mean", "weights": {"trader": 0.0, "fisher": 3.0}}, [7 / 4, -2 / 4]),
        ({"how": "min"}, [1.0, -2.0]),
        # variances (4 + 1 + 9) / 2 and (9 + 1 + 16) / 2
        ({"how": "mean_minus_variance", "variance_coef": 0.5}, [3 - 3.5, 1 - 6.5]),
        (
            {"how": "vote"},
            [(sigmoid(0.5) + sigmoid(2) + sigmoid(2)) / 3, (sigmoid(-2.5) + 0.5 + sigmoid(1)) / 3],
        ),
        ({"how": "vote", "weights": {"farmer": 0.0, "trader": 0.0}}, [sigmoid(2), 0.5]),
    ],
)
def test_every_way_by_hand(said: dict[str, Any], expected: list[float]) -> None:
    usual = (0.5, 0.0, 4.0)
    combination = Combination.of(said, LABELS, usual)
    assert combination(SAID).tolist() == pytest.approx(expected, abs=1e-12)
    assert combination(SAID[:, :0]).tolist() == []


def test_one_head_says_what_it_says() -> None:
    for how in ("mean", "min", "mean_minus_variance"):
        assert Combination.of({"how": how}, ("reward",), ())(SAID[:1]).tolist() == [1.0, -2.0]
    assert Combination.of({"how": "vote"}, ("reward",), (1.0,))(SAID[:1]).tolist() == [0.5, sigmoid(-3.0)]


def test_a_vote_survives_rewards_without_bounds() -> None:
    votes = Combination.of({"how": "vote"}, LABELS[:2], ())(np.array([[1e6], [-1e6]]))
    assert votes.tolist() == pytest.approx([0.5], abs=1e-12)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"how": "median"}, "combine.how is 'median'; choose one of mean, min"),
        ({"weights": {"baker": 1.0}}, "combine.weights names 'baker'; the reward model has farmer, fisher, trader"),
        ({"weights": dict.fromkeys(LABELS, 0.0)}, "combine.weights are all 0"),
    ],
)
def test_what_a_recipe_may_not_say(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Combination.of(said, LABELS, ())
