"""Best-of-n: the choice, and the unbiased estimator against every subset written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kilter.errors import ConfigError
from kilter.models.generation import NativeSampler
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Sample, Score
from kilter.rollout import best_of_n, best_of_n_curve, best_of_n_kl, collect


def test_kl_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    assert abs(best_of_n_kl(4) - (1.3862943611 - 0.75)) < 1e-9


def by_subsets(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """The mean over all subsets; among equal proxy scores each is chosen equally often."""
    values = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[at] for at in subset)
        chosen = [gold[at] for at in subset if proxy[at] == best]
        values.append(sum(chosen) / len(chosen))
    return sum(values) / len(values)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_curve_is_the_mean_over_all_subsets(n: int) -> None:
    proxy = [[0.3, -1.0, 2.0, 0.1, 0.7, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    gold = [[1.0, 4.0, -2.0, 8.0, 0.5, 3.0], [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]]
    (point,) = best_of_n_curve(proxy, gold, ns=[n])
    assert point.n == n and point.kl == best_of_n_kl(n) and point.proxy.n == 2
    assert abs(point.proxy.mean - sum(by_subsets(row, row, n) for row in proxy) / 2) < 1e-12
    assert point.gold is not None
    assert abs(point.gold.mean - sum(map(by_subsets, proxy, gold, [n, n])) / 2) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ties_share_what_any_of_them_would_bring(n: int) -> None:
    proxy, gold = [0.0, 1.0, 1.0, 0.0], [3.0, 1.0, -5.0, 7.0]
    (point,) = best_of_n_curve([proxy], [gold], ns=[n])
    assert point.gold is not None
    assert abs(point.gold.mean - by_subsets(proxy, gold, n)) < 1e-12


def test_curve_refuses_an_n_it_has_no_samples_for() -> None:
    with pytest.raises(ConfigError, match="best-of-4 from 3 proxy"):
        best_of_n_curve([[1.0, 2.0, 3.0]], ns=[4])
    assert best_of_n_curve([[1.0, 2.0, 3.0]], ns=[1])[0].gold is None


def test_the_best_scored_answer_is_chosen(
    make_trunk: Callable[..., Trunk], encoder: Any, prompts: list[Prompt], likes_one_word: Any
) -> None:
    options: dict[str, Any] = {"sampling": Sampling(max_new_tokens=6)}
    drawn = collect(
        NativeSampler(make_trunk(), "policy"),
        encoder,
        prompts[:3],
        num_samples=5,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    choices = best_of_n(
        NativeSampler(make_trunk(), "policy"),
        encoder,
        prompts[:3],
        likes_one_word(),
        n=5,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    for rollouts, choice in zip(drawn, choices, strict=True):
        assert list(choice.rollouts) == rollouts
        values = [score.value for score in choice.scores]
        assert choice.score.value == max(values)
        assert choice.chosen == rollouts[values.index(max(values))]


def test_an_unscored_answer_is_not_preferred(
    make_trunk: Callable[..., Trunk], encoder: Any, prompts: list[Prompt]
) -> None:
    class Grumpy:
        name = "grumpy"

        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [Score(None) if at % 3 else Score(-math.pi) for at in range(1, 1 + len(samples))]

    (choice,) = best_of_n(
        NativeSampler(make_trunk(), "policy"),
        encoder,
        prompts[:1],
        Grumpy(),
        n=4,
        sampling=Sampling(max_new_tokens=2),
        generator=torch.Generator().manual_seed(0),
    )
    assert choice.chosen is choice.rollouts[2] and choice.score.value == -math.pi


def test_collected_answers_carry_text_and_sample(
    make_trunk: Callable[..., Trunk], encoder: Any, prompts: list[Prompt]
) -> None:
    drawn = collect(
        NativeSampler(make_trunk(), "policy"),
        encoder,
        prompts,
        num_samples=2,
        sampling=Sampling(max_new_tokens=4),
        generator=torch.Generator().manual_seed(0),
    )
    assert [group[0].prompt for group in drawn] == prompts
    for rollout in (rollout for group in drawn for rollout in group):
        sample = rollout.sample
        assert rollout.completion.prompt == encoder.prompt(rollout.prompt.prompt)
        assert sample.text == rollout.text == encoder.decode(sample.ids)
        assert sample.messages == rollout.prompt.prompt
        assert sample.ids == rollout.completion.ids and sample.finished == rollout.completion.finished
