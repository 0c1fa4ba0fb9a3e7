"""PPO's source: it learns, its numbers are those of a slow re-derivation, and it goes on to the same bits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kilter.config import PolicyConfig
from kilter.errors import CheckError, ConfigError, DataError
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Message, Prompt, Sample, Score
from kilter.rollout import PolicySource, Rollout
from kilter.rollout.policy import Steered
from kilter.rollout.reward import KlBudget
from kilter.rollout.source import Scored, Verdict
from kilter.train.checkpoint import CheckpointStore
from kilter.train.loop import TrainState, fit, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.policy import ppo
from kilter.tree import Batch

Make = Callable[..., Any]
OBJECTIVE = ppo()
ROOMY: dict[str, Any] = {
    "num_samples": 4,
    "sampling": Sampling(max_new_tokens=6),
    "row_tokens": 256,
    "batch_tokens": 4096,
}


def train_state(trunk: Trunk, learning_rate: float = 5e-3) -> TrainState:
    return TrainState(trunk, make_optimizer(trunk, OBJECTIVE.roles, learning_rate=learning_rate))


def train(trunk: Trunk, source: PolicySource, steps: int, learning_rate: float = 5e-3) -> list[dict[str, float]]:
    """The rollout's figures at every step."""
    state, seen = train_state(trunk, learning_rate), []
    for _ in range(steps):
        figures = train_step(state, OBJECTIVE, source.next_step())
        seen.append(source.figures | figures)
    return seen


# Learning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rate"), [("copies", 3e-3), ("adapters", 6e-3), ("head on the policy", 1e-2)])
def test_it_learns_what_it_is_paid_for(kind: str, rate: float, make_trunk: Make, make_source: Make) -> None:
    trunk = make_trunk(kind)
    frozen = {name: value.clone() for name, value in trunk.state_dict().items()}
    source = make_source(trunk, **ROOMY)
    seen = train(trunk, source, 48, rate)
    assert seen[0]["rollout/score"] < 0.5
    assert seen[-1]["rollout/score"] > 3.5  # 4 is all there is
    assert abs(seen[0]["rollout/kl_k1"]) < 1e-5 and seen[-1]["rollout/kl_k1"] > 3.0
    learned = {name for name, value in trunk.state_dict().items() if not torch.equal(value, frozen[name])}
    trained = {name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
    assert learned == trained and not any("reference" in name for name in learned)


def test_the_kl_penalty_holds_the_policy_near_its_reference(make_trunk: Make, make_source: Make) -> None:
    ends = []
    for kl_coef in (0.0, 0.5):
        trunk = make_trunk()
        source = make_source(trunk, ppo={"kl_coef": kl_coef}, **ROOMY)
        ends.append(train(trunk, source, 40, 3e-3)[-1])
    free, held = ends
    assert free["rollout/kl_k1"] > 3 * held["rollout/kl_k1"] > 0
    assert free["rollout/score"] > held["rollout/score"] + 0.5


# The numbers ---------------------------------------------------------------------------------------------------------


def responses_of(batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Every response of some micro-batches with its per-token numbers, as plain lists."""
    found = []
    for batch in batches:
        for leaf in range(len(batch.tree.last)):
            own = batch.tree.leaf == leaf
            row = {name: values[own].double().tolist() for name, values in batch.extras.items()}
            found.append({"ids": tuple(batch.tree.target[own].tolist()), **row})
    return found


def test_every_number_equals_a_slow_rederivation(make_trunk: Make, make_source: Make) -> None:
    """Log-probs and values from one forward per answer of the bare models; rewards and GAE by loops in float64."""
    trunk = make_trunk()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():  # policy != reference, values != 0: nothing may cancel
        for name, parameter in sorted(trunk.named_parameters()):
            if "reference" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    numbers = {"kl_coef": 0.3, "gamma": 0.9, "gae_lambda": 0.7, "truncation_penalty": 0.4, "reward_clip": 1.5}
    source = make_source(trunk, seed=5, ppo=numbers | {"minibatches": 1})
    batches = source.next_step()
    rollouts = source.rollouts
    scores = [4.0 * rollout.completion.ids.count(5) / len(rollout.completion.ids) for rollout in rollouts]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    expected: dict[tuple[int, ...], dict[str, list[float]]] = {}
    everything: list[float] = []
    k1, k2, k3, exact, earned = [], [], [], [], []
    for rollout, score in zip(rollouts, scores, strict=True):
        prompt, ids = rollout.completion.prompt, rollout.completion.ids
        logprobs, ref_logprobs = (slow_logprobs(trunk, role, prompt, ids) for role in ("policy", "reference"))
        values = slow_values(trunk, prompt, ids)
        paid = min(max((score - mean) / deviation, -1.5), 1.5) - (0.0 if rollout.completion.finished else 0.4)
        rewards = [-0.3 * (one - other) for one, other in zip(logprobs, ref_logprobs, strict=True)]
        rewards[-1] += paid
        advantages = [0.0] * len(ids)
        for at in range(len(ids)):
            for ahead in range(at, len(ids)):
                following = values[ahead + 1] if ahead + 1 < len(ids) else 0.0
                delta = rewards[ahead] + 0.9 * following - values[ahead]
                advantages[at] += (0.9 * 0.7) ** (ahead - at) * delta
        ratios = [other - one for one, other in zip(logprobs, ref_logprobs, strict=True)]
        k1.append(-sum(ratios))
        exact.append(slow_kl(trunk, prompt, ids))
        k2.append(sum(ratio**2 / 2 for ratio in ratios))
        k3.append(sum(math.exp(ratio) - 1 - ratio for ratio in ratios))
        returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
        expected[ids] = {"old_logprobs": logprobs, "old_values": values, "advantages": advantages, "returns": returns}
        everything += advantages
        earned += returns
    centre = sum(everything) / len(everything)
    spread = math.sqrt(sum((value - centre) ** 2 for value in everything) / len(everything))
    found = responses_of(batches)
    assert len({row["ids"] for row in found}) == len(found) == len(expected) == 16
    for row in found:
        slow = expected[row["ids"]]
        slow["advantages"] = [(value - centre) / spread for value in slow["advantages"]]
        for name, values in slow.items():
            torch.testing.assert_close(row[name], values, rtol=0, atol=1e-5, msg=f"{name} of {row['ids']}")
    figures = source.figures
    assert figures["rollout/kl_k1"] == pytest.approx(sum(k1) / 16, abs=1e-5)
    assert figures["rollout/kl_k3"] == pytest.approx(sum(k3) / 16, abs=1e-5)
    assert figures["rollout/kl_k2"] == pytest.approx(sum(k2) / 16, abs=1e-5)
    assert figures["rollout/kl_k2_sem"] == pytest.approx(statistics.stdev(k2) / 4, abs=1e-5)
    assert figures["rollout/kl_exact"] == pytest.approx(statistics.fmean(exact), abs=1e-5)
    assert figures["rollout/kl_exact_sem"] == pytest.approx(statistics.stdev(exact) / 4, abs=1e-5)
    assert figures["rollout/reward"] == pytest.approx(figures["rollout/paid_score"] - 0.3 * sum(k1) / 16, abs=1e-5)
    explained = 1 - statistics.pvariance(everything) / statistics.pvariance(earned)
    assert figures["rollout/value_explained"] == pytest.approx(explained, abs=1e-5)


def slow_logprobs(trunk: Trunk, role: str, prompt: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        logits = trunk.models[role](torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
    return [float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)]


def slow_kl(trunk: Trunk, prompt: tuple[int, ...], ids: tuple[int, ...]) -> float:
    """Of an answer: the KL of all next tokens, summed over its positions."""
    row, first = torch.tensor([[*prompt, *ids]]), len(prompt) - 1
    with torch.no_grad():
        p, q = (
            trunk.models[role](row).logits[0, first:-1].double().softmax(-1).tolist()
            for role in ("policy", "reference")
        )
    return sum(
        a * math.log(a / b) for ours, theirs in zip(p, q, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


def slow_values(trunk: Trunk, prompt: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    """The value stands before its token: at the position that predicts it."""
    with torch.no_grad():
        hidden = trunk.models["value"](torch.tensor([[*prompt, *ids]])).last_hidden_state[0]
        values = hidden.double() @ trunk.heads["value"].weight[0].double()
    return values[len(prompt) - 1 : -1].tolist()


def test_the_figures_are_those_of_the_rollout(make_trunk: Make, make_source: Make) -> None:
    source = make_source(make_trunk(), ppo={"normalize_reward": False})
    batches = [batch for _ in range(2) for batch in source.next_step()]
    answers, figures = source.rollouts, source.figures
    scores = torch.tensor([4.0 * answer.completion.ids.count(5) / len(answer.completion.ids) for answer in answers])
    lengths = torch.tensor([float(len(answer.completion.ids)) for answer in answers])
    assert figures["rollout/samples"] == len(answers) == 16
    for name, values in (("score", scores), ("paid_score", scores), ("length", lengths), ("reward", scores)):
        assert figures[f"rollout/{name}"] == pytest.approx(float(values.mean()), abs=1e-6)
        assert figures[f"rollout/{name}_sem"] == pytest.approx(float(values.std()) / 4, abs=1e-6)
    assert figures["rollout/truncated"] == sum(not answer.completion.finished for answer in answers) / 16
    assert figures["rollout/distinct"] == len({answer.text for answer in answers}) / 16
    surprisal = torch.cat([-batch.extras["old_logprobs"] for batch in batches]).mean()
    assert figures["rollout/entropy"] == pytest.approx(float(surprisal), abs=1e-6)
    assert figures["rollout/kl_k1"] == figures["rollout/kl_k3"] == figures["rollout/kl_exact"] == 0.0
    assert figures["rollout/unscored"] == 0.0
    assert figures["rollout/kl_coef"] == 0.01 and figures["rollout/sampler_gap"] < 1e-5


def test_epochs_see_every_prompt_once_and_only_then_comes_a_new_rollout(make_trunk: Make, make_source: Make) -> None:
    source = make_source(make_trunk(), seed=1, ppo={"epochs": 3, "minibatches": 2})
    steps = [responses_of(source.next_step()) for _ in range(source.steps_per_rollout)]
    assert len(steps) == 6 and source.num_rollouts == 1
    epochs = [sorted(row["ids"] for row in steps[at] + steps[at + 1]) for at in (0, 2, 4)]
    assert epochs[0] == epochs[1] == epochs[2] == sorted(answer.completion.ids for answer in source.rollouts)
    assert [row["ids"] for row in steps[0]] != [row["ids"] for row in steps[2]]
    source.next_step()
    assert source.num_rollouts == 2


def test_prompts_are_all_drawn_before_one_comes_again(
    make_trunk: Make, make_source: Make, prompts: list[Prompt]
) -> None:
    source = make_source(make_trunk(), num_samples=1, ppo={"epochs": 1, "minibatches": 1})
    drawn: list[str] = []
    for _ in range(5):
        source.next_step()
        drawn += [rollout.prompt.id for rollout in source.rollouts]
    assert sorted(drawn) == sorted([prompt.id for prompt in prompts] * 2)  # 5 x 8 = 2 x 20
    assert len(set(drawn[:20])) == 20 and drawn[:20] != drawn[20:]


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"whiten_advantages": False}, {"advantages"}),
        ({"normalize_reward": False}, {"advantages", "returns"}),
        ({"gae_lambda": 0.5}, {"advantages", "returns"}),
        ({"truncation_penalty": 3.0}, {"advantages", "returns"}),
        ({"kl_controller": "adaptive"}, set()),
    ],
)
def test_switches_touch_what_they_name(
    change: dict[str, Any], touched: set[str], make_trunk: Make, make_source: Make
) -> None:
    plain, other = (
        make_source(make_trunk(), ppo={"minibatches": 1} | ppo).next_step()[0].extras for ppo in ({}, change)
    )
    assert {name for name in plain if not torch.equal(plain[name], other[name])} == touched


def test_the_adaptive_controller_moves_once_a_rollout(make_trunk: Make, make_source: Make) -> None:
    source = make_source(make_trunk(), ppo={"kl_controller": "adaptive", "kl_coef": 0.1})
    coefficients = []
    for _ in range(8):
        source.next_step()
        coefficients.append(source.figures["rollout/kl_coef"])
    assert coefficients == [0.1] * 4 + [pytest.approx(0.098)] * 4  # no KL yet: down by the most a rollout may


def test_a_budget_is_kept_where_a_fixed_price_spends_more(make_trunk: Make, make_source: Make) -> None:
    ends, prices = [], []
    for controller in ("fixed", "budget"):
        trunk = make_trunk()
        numbers = {"kl_controller": controller, "kl_coef": 0.02, "kl_target": 3.0}
        source = make_source(trunk, ppo=numbers, rollouts=15, **ROOMY)
        seen = train(trunk, source, 60, 3e-3)
        ends.append(seen[-1]["rollout/kl_exact"])
        prices.append([row["rollout/kl_coef"] for row in seen])
    assert ends[0] > 1.5 * 3.0 and ends[1] < 3.0
    assert set(prices[0]) == {0.02} and min(prices[1]) == 0.02 < max(prices[1])


def test_a_budget_counts_the_rollouts_in_which_the_policy_learns(make_trunk: Make, make_source: Make) -> None:
    source = make_source(make_trunk(), ppo={"kl_controller": "budget", "critic_warmup": 2}, rollouts=5)
    assert source.controller == KlBudget(0.01, 6.0, 3)
    for changes in ({}, {"rollouts": 2}):
        with pytest.raises(ConfigError, match="say how many `rollouts` the run has"):
            make_source(make_trunk(), ppo={"kl_controller": "budget", "critic_warmup": 2}, **changes)


# Going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["adaptive", "budget"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bits(
    at: int, controller: str, make_trunk: Make, make_source: Make, tmp_path: Path
) -> None:
    """Killed in the middle of an epoch (1), at a rollout's end (4) and later (6); through real checkpoint files."""
    config = {"kl_controller": controller, "kl_target": 1e-6}

    def run(folder: Path, steps: int, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, Any]]:
        trunk = make_trunk()
        source = make_source(trunk, seed=seed, ppo=config, rollouts=3)
        fit(train_state(trunk), OBJECTIVE, source, steps=steps, checkpoints=CheckpointStore(folder))
        return dict(trunk.state_dict()), source.figures, source.state_dict()

    whole = run(tmp_path / "whole", 9, seed=0)
    run(tmp_path / "cut", at, seed=0)
    again = run(tmp_path / "cut", 9, seed=99)  # a resumed run takes nothing from its own seed
    for one, two in ((whole[0], again[0]), (whole[1], again[1])):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)
    assert str(whole[2]) == str(again[2])


def test_a_source_that_goes_on_has_its_figures_before_the_next_rollout(make_trunk: Make, make_source: Make) -> None:
    source, other = make_source(make_trunk()), make_source(make_trunk(), seed=5)
    source.next_step()
    other.load_state_dict(source.state_dict())
    assert other.figures == source.figures and other.figures["rollout/samples"] == 16
    assert str(other.state_dict()) == str(source.state_dict())
    assert responses_of(other.next_step()) == responses_of(source.next_step())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_trunk: Make, make_source: Make) -> None:
    first, again, other = (make_source(make_trunk(), seed=seed).next_step()[0] for seed in (0, 0, 1))
    assert torch.equal(first.tree.tokens, again.tree.tokens)
    assert all(torch.equal(first.extras[name], again.extras[name]) for name in first.extras)
    assert not torch.equal(first.extras["advantages"], other.extras["advantages"][: len(first.extras["advantages"])])


# A policy that went too far from the one that sampled -----------------------------------------------------------------


def test_beyond_the_target_the_rest_of_the_rollout_is_left_out(make_trunk: Make, make_source: Make) -> None:
    """The limit is 1.5 times the target; figures without a KL say nothing; the next rollout begins anew."""
    source = make_source(make_trunk(), seed=1, ppo={"target_kl": 0.02, "epochs": 3})
    assert source.next_step() and source.figures["rollout/left_out"] == 0
    for figures in ({"policy/approx_kl": 0.03}, {}, {"loss": 9.0}):
        source.look(figures)
        assert source.next_step()
    source.look({"policy/approx_kl": 0.031})
    assert source.figures["rollout/left_out"] == 2
    for _ in range(2):
        assert source.next_step() is None
        source.look({})
    assert source.num_rollouts == 1 and source.figures["rollout/left_out"] == 2
    assert source.next_step() and source.num_rollouts == 2 and source.figures["rollout/left_out"] == 0
    free = make_source(make_trunk(), seed=1)
    free.next_step()
    free.look({"policy/approx_kl": 9.0})
    assert free.next_step() and "rollout/left_out" not in free.figures


def test_steps_that_are_left_out_change_nothing_and_count(make_trunk: Make, make_source: Make) -> None:
    trunk, weights, rows = make_trunk(), [], []
    source = make_source(trunk, ppo={"target_kl": 1e-9, "epochs": 2})
    state = train_state(trunk)

    def on_step(step: int, figures: dict[str, float]) -> None:
        source.look(figures)
        rows.append(figures)
        weights.append([parameter.detach().clone() for parameter in trunk.parameters_of("policy")])

    fit(state, OBJECTIVE, source, steps=8, on_step=on_step)
    assert state.step == 8 and source.num_rollouts == 2 and not state.stopped
    taken = ["loss" in row for row in rows]  # the first step's KL is 0; the second one sees what the first did
    assert taken == [True, True, False, False] * 2
    for at in (2, 3, 6, 7):
        assert all(map(torch.equal, weights[at - 1], weights[at])) and rows[at].keys() == {"seconds"}
    moments = {int(held["step"]) for held in state.optimizer.state.values()}
    assert moments == {4}


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_killed_run_leaves_out_the_same_steps(at: int, make_trunk: Make, make_source: Make, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, seed: int) -> tuple[dict[str, torch.Tensor], str]:
        trunk = make_trunk()
        source = make_source(trunk, seed=seed, ppo={"target_kl": 1e-9})
        fit(
            train_state(trunk),
            OBJECTIVE,
            source,
            steps=steps,
            checkpoints=CheckpointStore(folder),
            on_step=lambda _, figures: source.look(figures),
        )
        return dict(trunk.state_dict()), str(source.state_dict())

    whole = run(tmp_path / "whole", 9, seed=0)
    run(tmp_path / "cut", at, seed=0)
    again = run(tmp_path / "cut", 9, seed=99)
    assert whole[1] == again[1] and all(torch.equal(whole[0][name], again[0][name]) for name in whole[0])


# The critic first ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["copies", "adapters"])
def test_while_the_critic_warms_up_the_policy_stays_to_the_bit(kind: str, make_trunk: Make, make_source: Make) -> None:
    """Weight decay and all: no weight and no moment of the policy moves, then both learn."""
    trunk = make_trunk(kind)
    source = make_source(trunk, ppo={"critic_warmup": 2, "kl_controller": "adaptive"})
    objective = Steered(OBJECTIVE, source)
    optimizer = make_optimizer(trunk, objective.roles, learning_rate=5e-3, weight_decay=0.1)
    state, rows = TrainState(trunk, optimizer), []
    policy, value = trunk.parameters_of("policy"), trunk.parameters_of("value")
    before = [[one.detach().clone() for one in own] for own in (policy, value)]
    fit(state, objective, source, steps=8, on_step=lambda _, figures: rows.append(figures))
    assert all(map(torch.equal, policy, before[0])) and not any(id(one) in map(id, optimizer.state) for one in policy)
    assert not all(map(torch.equal, value, before[1]))
    assert all("loss/policy" not in row and "policy/ratio" not in row and row["loss/value"] > 0 for row in rows)
    assert source.controller.kl_coef == 0.01, "there was no KL to steer"
    fit(state, objective, source, steps=12, on_step=lambda _, figures: rows.append(figures))
    assert not any(map(torch.equal, policy, before[0])) and source.controller.kl_coef != 0.01
    assert rows[8]["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert {int(optimizer.state[one]["step"]) for one in policy} == {4}


@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_run_killed_while_its_critic_warms_up_goes_on(
    at: int, make_trunk: Make, make_source: Make, tmp_path: Path
) -> None:
    def run(folder: Path, steps: int, seed: int) -> dict[str, torch.Tensor]:
        trunk = make_trunk()
        source = make_source(trunk, seed=seed, ppo={"critic_warmup": 1})
        objective = Steered(OBJECTIVE, source)
        fit(train_state(trunk), objective, source, steps=steps, checkpoints=CheckpointStore(folder))
        return dict(trunk.state_dict())

    whole = run(tmp_path / "whole", 6, seed=0)
    run(tmp_path / "cut", at, seed=0)
    again = run(tmp_path / "cut", 6, seed=99)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_critic_on_the_policys_own_weights_cannot_warm_up_alone(make_trunk: Make, make_source: Make) -> None:
    with pytest.raises(ConfigError, match="value and policy share weights"):
        make_source(make_trunk("head on the policy"), ppo={"critic_warmup": 1})


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_makes_the_ratio_meaningless_is_refused(make_trunk: Make, make_source: Make) -> None:
    for sampling in (
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.9),
        Sampling(min_p=0.1),
        Sampling(repetition_penalty=1.2),
    ):
        with pytest.raises(ConfigError, match="set temperature 1, top_k 0, top_p 1"):
            make_source(make_trunk(), sampling=sampling)
    with pytest.raises(ConfigError, match=r"prompts_per_rollout is 1 and policy\.minibatches is 2"):
        make_source(make_trunk(), prompts_per_rollout=1)
    trunk = make_trunk()
    del trunk.roles["value"]
    with pytest.raises(ConfigError, match="build it with a role 'value'"):
        make_source(trunk)


def test_dropout_shows_as_a_difference_of_sampler_and_trainer(make_trunk: Make, make_source: Make) -> None:
    trunk = make_trunk()
    for layer in trunk.models["policy"].model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(CheckError, match=r"rollout 0: log-probs .* differ by up to .* look at dropout"):
        make_source(trunk).next_step()


def test_a_first_ratio_other_than_one_is_refused(
    make_trunk: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = make_trunk()
    forward, calls = trunk.forward, []

    def drifting(tree: Any, ask: Any) -> Any:
        calls.append(1)
        answers = forward(tree, ask)
        return answers | {"policy": answers["policy"] + 1e-5 * len(calls)}

    monkeypatch.setattr(trunk, "forward", drifting)
    with pytest.raises(CheckError, match="first PPO ratio"):
        make_source(trunk).next_step()


def test_over_long_prompts_are_left_out_and_counted(make_trunk: Make, make_source: Make, prompts: list[Prompt]) -> None:
    def long(length: int) -> Prompt:
        return Prompt(prompt=(Message("user", "x" * length),))

    source = make_source(make_trunk(), prompts=[*prompts, long(16), long(17)])  # BOS + 16 + 8 - 1 = 24 positions
    assert source.num_dropped == 1
    assert source.next_step()
    with pytest.raises(DataError, match="none of 1 prompts leaves room"):
        make_source(make_trunk(), prompts=[long(17)])


def test_unscored_answers_are_left_out_and_counted(make_trunk: Make, make_source: Make) -> None:
    class Picky:
        name = "picky"

        def __init__(self, num_scored: int) -> None:
            self.num_scored = num_scored

        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [Score(0.0 if at < self.num_scored else None) for at in range(len(samples))]  # 0 is a score

    source = make_source(make_trunk(), scorer=Picky(5))  # of 8 prompts x 2: two whole, one half
    found = [row["ids"] for _ in range(2) for row in responses_of(source.next_step())]
    assert sorted(found) == sorted(rollout.completion.ids for rollout in source.rollouts[:5])
    assert source.figures["rollout/unscored"] == 11 and source.figures["rollout/samples"] == 5
    with pytest.raises(CheckError, match="rollout 0: picky scored answers to only 1 of 8 prompts"):
        make_source(make_trunk(), scorer=Picky(2)).next_step()


def test_the_judge_sees_each_rollout_and_its_reason_to_stop_is_kept(make_trunk: Make, make_source: Make) -> None:
    seen: list[int] = []

    def judge(answers: Scored, figures: dict[str, float]) -> Verdict:
        seen.append(sum(map(len, answers)))
        assert figures["rollout/samples"] == seen[-1]
        figures["rollout/own"] = 1.0
        return Verdict(stop="no longer a sentence" if len(seen) == 2 else None)

    source = make_source(make_trunk(), judge=judge)
    for _ in range(4):
        source.next_step()
    assert source.stopped is None and source.figures["rollout/own"] == 1
    for _ in range(5):
        source.next_step()
    assert source.stopped == "no longer a sentence" and seen == [16, 16]  # asked no more
    assert source.state_dict()["stopped"] == source.stopped


def test_a_judge_that_puts_another_policy_in_place_has_its_answers_drawn(make_trunk: Make, make_source: Make) -> None:
    trunk = make_trunk()
    judged: list[Rollout] = []

    def judge(answers: Scored, _figures: dict[str, float]) -> Verdict:
        judged.extend(rollout for group in answers for rollout, _ in group)
        with torch.no_grad():
            for parameter in trunk.parameters_of("policy"):
                parameter.mul_(1.1)
        return Verdict(again=True)

    source = make_source(trunk, judge=judge)
    source.next_step()  # had it kept the answers of the first policy, sampler and trainer would not agree
    assert source.rollouts != judged and source.figures["rollout/sampler_gap"] < 1e-3
    assert [one.prompt for one in source.rollouts] == [one.prompt for one in judged]
    assert source.figures["rollout/put_back"] == 1
    # Norm, price and order of the minibatches are those of a source that only drew the answers thrown away.
    assert source.several.state_dict()["norms"][0]["count"] == len(judged) and source.num_rollouts == 1


@pytest.mark.parametrize(("controller", "steered"), [("fixed", 1.0), ("adaptive", 1 - 0.1 * 0.2), ("budget", 1.0)])
def test_a_judge_raises_the_price_of_kl(controller: Any, steered: float, make_trunk: Make, make_source: Make) -> None:
    """On top of what a controller makes of a rollout without KL; a budget's first rollout makes nothing."""
    config = PolicyConfig(kl_coef=0.1, kl_controller=controller)
    judge = {"judge": lambda answers, figures: Verdict(raise_kl=2.0)}
    source = make_source(make_trunk(), config=config, rollouts=4, **judge)
    source.next_step()
    assert source.figures["rollout/kl_coef"] == 0.1
    assert source.controller.kl_coef == pytest.approx(0.1 * steered * 2, rel=1e-12)


def test_a_judge_raises_the_price_of_a_kl_in_the_loss(make_trunk: Make, make_source: Make) -> None:
    """Of the very rollout that showed it: what the step minimises is what the objective with that price says."""
    config = PolicyConfig(kl_coef=0.1, kl_in="loss", kl_controller="fixed")
    trunk = make_trunk()
    source = make_source(trunk, config=config, judge=lambda answers, figures: Verdict(raise_kl=3.0))
    batch, *_ = source.next_step()
    with torch.no_grad():  # away from the reference, so that there is a KL
        for one in trunk.parameters_of("policy"):
            one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    told = Steered(replace(OBJECTIVE, kl_coef=0.1), source)(trunk, batch).terms["kl"][0]
    expected = replace(OBJECTIVE, kl_coef=0.1 * 3)(trunk, batch).terms["kl"][0]
    assert expected > 0 and torch.equal(told, expected)


def test_the_default_config_runs(make_trunk: Make, make_source: Make) -> None:
    assert train(make_trunk(), make_source(make_trunk(), config=PolicyConfig()), 1)
