"""What is paid: by hand, by slow re-derivation, and with each sign turned round."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from kilter.config import PolicyConfig, RlStage
from kilter.errors import CheckError
from kilter.models.trunk import Trunk
from kilter.records import Score
from kilter.rollout import PolicySource, experience
from kilter.rollout.experience import Measured, pay
from kilter.rollout.reward import KlBudget, KlController, RunningNorm, paid_rewards
from kilter.rollout.several import Several


def test_paid_rewards_by_hand() -> None:
    leaf = torch.tensor([0, 0, 1, 2, 2, 2])
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0, -3.0])
    ref_logprobs = torch.tensor([-1.5, -2.5, -0.5, -1.0, -2.0, -2.0])
    paid = paid_rewards(torch.tensor([1.0, -2.0, 0.5]), logprobs, ref_logprobs, leaf, kl_coef=0.1)
    torch.testing.assert_close(paid, torch.tensor([-0.05, 0.95, -2.0, 0.0, -0.1, 0.6]))


def test_running_norm_is_the_mean_and_deviation_of_all_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (1e3 + torch.randn(50, generator=generator, dtype=torch.float64)).tolist()
    norm = RunningNorm()
    for start, end in ((0, 1), (1, 1), (1, 8), (8, 50)):
        norm.update(scores[start:end])
    assert abs(norm.mean - statistics.fmean(scores)) < 1e-9
    assert abs(norm.std - statistics.stdev(scores)) < 1e-9
    again = RunningNorm()
    again.load_state_dict(norm.state_dict())
    assert again == norm
    middle, far = norm([norm.mean, norm.mean + 9 * norm.std], clip=3.0)
    assert (middle, far) == (0.0, 3.0)
    assert abs(norm([norm.mean - 9 * norm.std])[0] + 9.0) < 1e-9


@pytest.mark.parametrize("scores", [[], [2.0], [2.0, 2.0, 2.0]])
def test_running_norm_never_divides_by_nothing(scores: list[float]) -> None:
    norm = RunningNorm()
    norm.update(scores)
    assert norm.std == 1.0
    assert norm([norm.mean + 1.5]) == [1.5]


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (-3.0, 0.98)])
def test_adaptive_controller_by_hand(kl: float, factor: float) -> None:
    adaptive, fixed = KlController(0.05, target=6.0), KlController(0.05)
    adaptive.update(kl)
    fixed.update(kl)
    assert abs(adaptive.kl_coef - 0.05 * factor) < 1e-12
    assert fixed.kl_coef == 0.05
    fixed.load_state_dict(adaptive.state_dict())
    assert fixed.kl_coef == adaptive.kl_coef


def two_answers(**ppo: object) -> list[float]:
    """Answers of two tokens with scores 3 and 1, the second cut off, no KL; what each is paid."""
    measured = Measured(torch.tensor([0, 0, 1, 1]), *torch.zeros(3, 4))
    config = PolicyConfig.model_validate(ppo)
    several, scores = Several([], config), [[Score(3.0), Score(1.0)]]
    several.take_in(scores)
    paid = pay(several(scores), [True, False], measured, kl_coef=0.5, config=config)
    assert paid.rewards[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(paid.rewards[[1, 3]], paid.scores)
    return [round(score, 4) for score in paid.scores.tolist()]


def test_what_happens_to_a_score_can_be_switched_off() -> None:
    assert two_answers(truncation_penalty=0.0, normalize_reward=False) == [3.0, 1.0]
    assert two_answers(truncation_penalty=0.0) == [0.7071, -0.7071]
    assert two_answers(truncation_penalty=0.0, reward_clip=0.5) == [0.5, -0.5]
    assert two_answers(truncation_penalty=0.25) == [0.7071, -0.9571]
    assert two_answers(truncation_penalty=0.25, normalize_reward=False) == [3.0, 0.75]


@pytest.mark.parametrize(("sign", "message"), [((-1.0, 1.0), "sign of the reward"), ((1.0, -1.0), "sign of the KL")])
def test_either_sign_turned_round_is_refused_before_any_rollout(
    sign: tuple[float, float],
    message: str,
    make_source: Callable[..., PolicySource],
    make_trunk: Callable[..., Trunk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planted(scores: torch.Tensor, *args: torch.Tensor, kl_coef: float) -> torch.Tensor:
        return paid_rewards(sign[0] * scores, *args, kl_coef=sign[1] * kl_coef)

    monkeypatch.setattr(experience, "paid_rewards", planted)
    with pytest.raises(CheckError, match=message):
        make_source(make_trunk())
    [verdict] = make_source(make_trunk(), signs="ignore").turned  # said, and trained nevertheless
    assert verdict.startswith(message)
    if sign[0] > 0:  # without a penalty there is no sign of it to get wrong
        assert make_source(make_trunk(), ppo={"kl_coef": 0.0})


def test_a_bonus_for_leaving_the_reference_goes_by_its_own_name(
    make_source: Callable[..., PolicySource], make_trunk: Callable[..., Trunk]
) -> None:
    with pytest.raises(CheckError, match="sign of the KL"):
        make_source(make_trunk(), ppo={"kl_coef": -0.1})
    assert make_source(make_trunk(), ppo={"kl_coef": 0.1}, signs="ignore").turned == []
    given = {"model": "m", "reward": "r", "prompts": "p", "policy": {"kl_coef": -0.1, "kl_controller": "fixed"}}
    with pytest.raises(ValueError, match=r"policy\.kl_coef is -0\.1: a bonus for leaving the reference"):
        RlStage.model_validate(given)
    assert RlStage.model_validate(given | {"signs": "ignore"}).policy.kl_coef == -0.1


def test_the_budget_by_hand() -> None:
    """Budget 6 over 8 rollouts: 0.75 nats may be spent with each that was learned from."""
    budget = KlBudget(0.1, 6.0, 8)
    prices = []
    for kl in (5.0, 0.9, 1.5, 2.1, 30.0, 3.0, 0.0, 0.0, 0.0):
        budget.update(kl)
        prices.append(budget.kl_coef)
    risen = 0.1 * (0.9 / 0.75) * (1.5 / 1.5)
    assert prices[0] == 0.1, "nothing was learned yet"
    assert prices[1:3] == pytest.approx([0.1 * 1.2, risen])
    assert prices[3] == pytest.approx(risen * 2.1 / 2.25)  # behind its time: down
    assert prices[4] == pytest.approx(prices[3] * 1.5)  # the most that a rollout may
    assert prices[5] == pytest.approx(prices[4] * 3.0 / 3.75)
    assert prices[6:] == pytest.approx([0.1] * 3), "never below the start"
    example = KlBudget(0.1, 6.0, 4, learned=1)
    example.update(1.8)
    assert example.kl_coef == pytest.approx(0.12)


def test_the_guard_raises_the_budgets_least_price_for_good() -> None:
    budget = KlBudget(0.1, 6.0, 8, learned=1)
    budget.raise_by(1.5)
    assert budget.kl_coef == pytest.approx(0.15)
    budget.update(0.1)  # far behind its time, which alone would bring it down
    assert budget.kl_coef == pytest.approx(0.15)
    other = KlBudget(0.1, 6.0, 8)
    other.load_state_dict(budget.state_dict())
    assert other == budget


def test_the_budget_goes_on_where_it_was() -> None:
    whole, other = KlBudget(0.1, 6.0, 8), KlBudget(0.1, 6.0, 8)
    for kl in (0.0, 2.0, 4.0):
        whole.update(kl)
    other.load_state_dict(whole.state_dict())
    for one in (whole, other):
        for kl in (5.0, 0.1, 0.1, 0.1, 0.1):
            one.update(kl)
    assert whole == other and other.kl_coef == other.least == 0.1
