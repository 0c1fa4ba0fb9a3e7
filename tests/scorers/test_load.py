"""Users' functions as scorers: what is accepted, and what each mistake is told."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kilter.errors import ConfigError
from kilter.records import Message, Sample, Score
from kilter.scorers import load_function, load_scorer

SAMPLES = [Sample((Message("user", "q"),), text) for text in ("a", "bb", "ccc")]


class Lengths:
    name = "lengths"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self.scale * len(sample.text), parts={"length": 1.0}) for sample in samples]


@pytest.fixture(autouse=True)
def module() -> Iterator[types.ModuleType]:
    made: Any = types.ModuleType("users_scorers")
    made.lengths = lambda samples, scale=1.0: [scale * len(sample.text) for sample in samples]
    made.Lengths, made.ready, made.make, made.number = Lengths, Lengths(), lambda scale: Lengths(scale), 3
    made.short = lambda samples: [1.0]
    made.text = lambda samples: ["good"] * len(samples)
    made.odd = lambda samples: [float("nan"), None, True]
    sys.modules["users_scorers"] = made
    yield made
    del sys.modules["users_scorers"]


@pytest.mark.parametrize("name", ["lengths", "Lengths", "make"])
def test_functions_classes_and_factories_take_options(name: str) -> None:
    scorer = load_scorer(f"users_scorers:{name}", {"scale": 2.0})
    assert [score.value for score in scorer.score(SAMPLES)] == [2.0, 4.0, 6.0]
    assert scorer.name == ("users_scorers:lengths" if name == "lengths" else "lengths")


def test_a_scorer_object_is_taken_as_it_is() -> None:
    scorer = load_scorer("users_scorers:ready")
    assert [score.value for score in scorer.score(SAMPLES)] == [1.0, 2.0, 3.0]
    assert scorer.score(SAMPLES)[0].parts == {"length": 1.0}
    with pytest.raises(ConfigError, match=r"takes no options, but .*scale"):
        load_scorer("users_scorers:ready", {"scale": 2.0})


def test_what_is_no_number_is_unscored_never_zero() -> None:
    scores = load_scorer("users_scorers:odd").score(SAMPLES)
    assert [score.value for score in scores] == [None, None, 1.0]
    assert [score.reason for score in scores] == ["the scorer returned nan", "the scorer returned None", ""]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("users_scorers", {}, "write it as `package.module:function`"),
        ("users_scorers:", {}, "write it as `package.module:function`"),
        ("no_such_module:f", {}, "cannot import no_such_module"),
        ("users_scorers:lengthz", {}, "has no 'lengthz'; it has Lengths, lengths, make"),
        ("users_scorers:lengths", {"scales": 2}, r"options \['scales'\] do not fit .*scale"),
        ("users_scorers:number", {}, "int has no method `score`"),
    ],
)
def test_what_cannot_be_loaded_says_why(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scorer(spec, options)


def test_what_a_function_returns_is_checked() -> None:
    with pytest.raises(ConfigError, match="users_scorers:short: 1 scores for 3 samples"):
        load_scorer("users_scorers:short").score(SAMPLES)
    with pytest.raises(ConfigError, match="returned 'good'; a score is a number"):
        load_scorer("users_scorers:text").score(SAMPLES)


def test_load_function_gives_what_is_named() -> None:
    assert load_function("math:floor")(2.5) == 2
