"""Each method of the table: its numbers by slow re-derivation, that it learns, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any, get_args

import pytest
import torch

from kilter.config import PolicyConfig, RlStage
from kilter.errors import ConfigError
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.rollout import PolicySource
from kilter.rollout.algorithms import ALGORITHMS, Paid, by_critic, by_what_is_to_come
from kilter.train.loop import TrainState, train_step
from kilter.train.optimizer import make_optimizer

CRITIC_FREE = [name for name, algorithm in ALGORITHMS.items() if not algorithm.critic]
ROOMY: dict[str, Any] = {"num_samples": 4, "sampling": Sampling(max_new_tokens=6), "row_tokens": 256}
Make = Callable[..., Any]


def test_the_recipe_knows_the_table() -> None:
    assert set(get_args(RlStage.model_fields["algorithm"].annotation)) == set(ALGORITHMS)
    given = {"model": "m", "reward": "r", "prompts": "p"}
    alone = (by_critic, by_what_is_to_come)
    for name, one in ALGORITHMS.items():
        assert RlStage.model_validate(given | {"algorithm": name}).compares == (one.credit not in alone)
    assert {name for name, one in ALGORITHMS.items() if one.loss not in get_args(get_args(loss_type())[0])} == set()


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    shown = {name.strip("`"): cells for name, *cells in rows if name.strip("`") in ALGORITHMS}
    assert set(shown) == set(ALGORITHMS)
    for name, one in ALGORITHMS.items():
        numbers = ", ".join(f"{number:g}" for number in one.clip if number is not None)
        unset = "none" if one.loss == "reinforce" else "the loss's"
        assert shown[name][1:] == [one.loss, one.aggregate, one.kl_in, numbers or unset, one.about]


def loss_type() -> Any:
    return PolicyConfig.model_fields["loss"].annotation


def some_paid() -> tuple[Paid, list[list[float]], list[list[int]]]:
    """Four answers to prompt 0, three to prompt 1, two of them equally good; rewards at every token."""
    lengths = [3, 1, 4, 2, 2, 5, 1]
    generator = torch.Generator().manual_seed(0)
    tokens = [(0.1 * torch.randn(length, generator=generator)).tolist() for length in lengths]
    for row, score in zip(tokens, [1.0, -0.5, 2.0, 0.0, 1.5, -1.0, 0.5], strict=True):
        row[-1] += score
    tokens[5] = [*tokens[5][:-1], sum(tokens[4]) - sum(tokens[5][:-1])]  # paid as much as answer 4
    leaf = torch.repeat_interleave(torch.arange(7), torch.tensor(lengths))
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    flat = torch.tensor([value for row in tokens for value in row], dtype=torch.float64)
    return Paid(flat, leaf, group), tokens, [[0, 1, 2, 3], [4, 5, 6]]


def slow_advantages(name: str, tokens: list[list[float]], groups: list[list[int]]) -> list[float]:
    """Of each token, from the papers, in plain Python."""
    totals = [sum(row) for row in tokens]
    if name == "reinforce++":
        to_come = [[sum(row[at:]) for at in range(len(row))] for row in tokens]
        everything = [value for row in to_come for value in row]
        return [(value - fmean(everything)) / math.sqrt(pstdev(everything) ** 2 + 1e-8) for value in everything]
    found = [0.0] * len(tokens)
    for group in groups:
        own = [totals[at] for at in group]
        for at in group:
            others = [totals[other] for other in group if other != at]
            found[at] = {
                "rloo": totals[at] - fmean(others),
                "dr_grpo": totals[at] - fmean(own),
                "raft": float(at == max(group, key=lambda one: (round(totals[one], 9), -one))),
            }.get(name, (totals[at] - fmean(own)) / (stdev(own) + 1e-4))
    return [value for value, row in zip(found, tokens, strict=True) for _ in row]


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_advantages_equal_a_slow_rederivation(name: str) -> None:
    paid, tokens, groups = some_paid()
    advantages, returns = ALGORITHMS[name].credit(paid, PolicyConfig())
    assert returns is None
    expected = torch.tensor(slow_advantages(name, tokens, groups), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-10)


def run(trunk: Trunk, source: PolicySource, algorithm: str, steps: int, rate: float) -> list[dict[str, float]]:
    objective = ALGORITHMS[algorithm].objective(source.config, longest=6)
    trunk.train_only(*objective.roles)
    state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=rate))
    seen = []
    for step in range(steps * source.steps_per_rollout):
        figures = train_step(state, objective, source.next_step())
        if step % source.steps_per_rollout == 0:
            seen.append({**source.figures, **figures})
    return seen


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_it_learns_what_it_is_paid_for_without_a_critic(name: str, make_trunk: Make, make_source: Make) -> None:
    trunk = make_trunk()
    critic = {key: value.clone() for key, value in trunk.state_dict().items() if "value" in key}
    source = make_source(trunk, algorithm=name, **ROOMY)
    seen = run(trunk, source, name, 24, 5e-3)
    assert seen[0]["rollout/score"] < 0.5 and seen[-1]["rollout/score"] > seen[0]["rollout/score"] + 1
    assert abs(seen[0]["policy/ratio"] - 1) < 1e-5 and abs(seen[0]["rollout/kl_k1"]) < 1e-5
    assert "rollout/value_explained" not in seen[0] and "values/mean" not in seen[0]
    assert all(torch.equal(value, trunk.state_dict()[key]) for key, value in critic.items())
    in_loss = ALGORITHMS[name].kl_in == "loss"
    assert ("policy/ref_kl" in seen[0]) == in_loss


@pytest.mark.parametrize("kind", ["copies", "adapters"])
def test_the_kl_in_the_loss_holds_the_policy_near_its_reference(kind: str, make_trunk: Make, make_source: Make) -> None:
    def end(**numbers: Any) -> dict[str, float]:
        trunk = make_trunk(kind)
        source = make_source(trunk, algorithm="grpo", ppo=numbers, **ROOMY)
        return run(trunk, source, "grpo", 24, 5e-3)[-1]

    free, held, exactly = end(kl_coef=0.0), end(kl_coef=1.0), end(kl_coef=1.0, kl_estimator="exact")
    assert free["rollout/kl_k1"] > 3 * held["rollout/kl_k1"] > 0
    assert free["rollout/kl_exact"] > 3 * exactly["rollout/kl_exact"] > 0
    assert abs(exactly["policy/ratio"] - 1) < 1e-5 and exactly["policy/ref_kl"] > 0


def test_the_bonus_for_entropy_keeps_the_policy_broad(make_trunk: Make, make_source: Make) -> None:
    ends = []
    for entropy_coef in (0.0, 0.5):
        trunk = make_trunk()
        source = make_source(trunk, algorithm="grpo", ppo={"kl_coef": 0.0, "entropy_coef": entropy_coef}, **ROOMY)
        ends.append(run(trunk, source, "grpo", 24, 5e-3)[-1])
    narrow, broad = ends
    assert broad["rollout/entropy"] > 2 * narrow["rollout/entropy"] and broad["policy/entropy"] > 0
    assert "policy/entropy" not in narrow


def test_what_is_left_open_is_the_algorithms_own() -> None:
    grpo, ppo, dapo, gspo = (
        ALGORITHMS[name].resolved(name, PolicyConfig()) for name in ("grpo", "ppo", "dapo", "gspo")
    )
    assert (grpo.kl_in, grpo.kl_controller, grpo.aggregate, grpo.whiten_advantages) == (
        "loss",
        "fixed",
        "sequence",
        False,
    )
    assert (ppo.kl_in, ppo.kl_controller, ppo.loss, ppo.whiten_advantages) == ("reward", "adaptive", "ppo_clip", True)
    assert (dapo.clip_range, dapo.clip_range_high) == (0.2, 0.28) and gspo.clip_range is None
    said = ALGORITHMS["dapo"].resolved("dapo", PolicyConfig(clip_range=0.1, kl_in="reward", aggregate="sequence"))
    assert (said.clip_range, said.clip_range_high, said.kl_controller, said.aggregate) == (
        0.1,
        None,
        "adaptive",
        "sequence",
    )
    assert ALGORITHMS["grpo"].resolved("grpo", PolicyConfig(loss="gspo")).clip_range is None
    again = ALGORITHMS["dapo"].resolved("dapo", dapo_config := ALGORITHMS["dapo"].resolved("dapo", PolicyConfig()))
    assert again == dapo_config


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("grpo", {"vf_coef": 0.1}, r"policy\.vf_coef is 0\.1, but grpo has no critic"),
        ("rloo", {"value_from": "policy"}, r"policy\.value_from is policy, but rloo has no critic"),
        ("grpo", {"kl_controller": "adaptive"}, "only a price in the reward is steered"),
        ("grpo", {"kl_controller": "budget"}, "only a price in the reward is steered"),
        ("rloo", {"kl_controller": "budget", "kl_coef": 0.0}, "which no factor raises"),
        ("ppo", {"kl_coef": -0.1}, r"kl_controller adaptive; a bonus is paid in the reward alone"),
        ("grpo", {"kl_coef": -0.1}, "kl_in loss and kl_controller fixed; a bonus is paid"),
        ("grpo", {"critic_warmup": 1}, r"policy\.critic_warmup is 1, but grpo has no critic"),
        ("grpo", {"target_kl": 0.1, "epochs": 1, "minibatches": 1}, "a rollout is one step"),
        ("ppo", {"kl_estimator": "exact"}, "ppo pays for log-ratios of sampled tokens"),
    ],
)
def test_numbers_it_has_no_use_for_are_refused(name: str, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ALGORITHMS[name].resolved(name, PolicyConfig(**numbers))


def test_a_clip_for_a_loss_that_clips_nothing_is_refused() -> None:
    numbers = ALGORITHMS["raft"].resolved("raft", PolicyConfig(clip_range=0.2))
    with pytest.raises(ConfigError, match="'reinforce' clips nothing"):
        ALGORITHMS["raft"].objective(numbers, longest=8)


def test_comparing_needs_two_answers() -> None:
    given = {"model": "m", "reward": "r", "prompts": "p"}
    assert RlStage.model_validate(given | {"algorithm": "rloo"}).samples == 8
    assert (
        RlStage.model_validate(given).samples
        == RlStage.model_validate(given | {"algorithm": "reinforce++"}).samples
        == 1
    )
    with pytest.raises(ValueError, match="rloo compares responses to one prompt: num_samples must be at least 2"):
        RlStage.model_validate(given | {"algorithm": "rloo", "num_samples": 1})
    with pytest.raises(ValueError, match="critic_warmup is 3 and rollouts 3: the policy would never learn"):
        RlStage.model_validate(given | {"rollouts": 3, "policy": {"critic_warmup": 3}})
