"""The loop: one update is right, a bad one is refused and kept, and fit evaluates, stops and reports as told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilter.errors import CheckError
from kilter.train import objectives, policy, rewards
from kilter.train.checkpoint import CheckpointStore, load_batches
from kilter.train.loop import EarlyStop, TrainState, fit, measure, train_step
from kilter.train.objectives import LossOutput
from kilter.train.optimizer import make_optimizer, make_schedule
from kilter.train.sources import GroupSource
from kilter.tree import Batch, make_batches


def start(make: Any, **options: Any) -> TrainState:
    trunk = make.trunk()
    return TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.01, **options))


def cut(groups: Sequence[Any], tokens: int) -> list[Batch]:
    return make_batches(groups, row_tokens=tokens, batch_tokens=tokens)


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.trunk.parameters()])


class Breaks:
    """SFT whose gradient is NaN at the third micro-batch it is given."""

    roles = ("policy",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        out = objectives.sft()(trunk, batch)
        self.calls += 1
        total, unit = out.terms["nll"]
        return LossOutput({"nll": (total * math.nan if self.calls == 3 else total, unit)}, {})


def test_a_step_is_a_step_of_adamw_on_the_mean_over_its_tokens(make: Any) -> None:
    groups = make.groups(6)
    state, other = start(make), make.trunk()
    figures = train_step(state, objectives.sft(), cut(groups, 40), max_grad_norm=1e9)
    optimizer = make_optimizer(other, ["policy"], learning_rate=0.01)
    (batch,) = cut(groups, 10_000)
    loss = -other(batch.tree, {"policy": "logprobs"})["policy"].mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]).norm()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert torch.allclose(weights(state), after, atol=1e-5)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert figures["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert figures["tokens"] == batch.units["tokens"]
    assert state.step == 1


def test_only_the_trained_role_moves(make: Any) -> None:
    state = start(make)
    before = {name: p.detach().clone() for name, p in state.trunk.named_parameters()}
    train_step(state, objectives.sft(), cut(make.groups(4), 100))
    moved = {name for name, p in state.trunk.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("models.policy.") for name in moved)


def test_the_gradient_is_clipped_to_its_norm(make: Any) -> None:
    state = start(make)
    seen: list[Tensor] = []
    state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None])
        )
    )
    figures = train_step(state, objectives.sft(), cut(make.groups(4), 100), max_grad_norm=0.25)
    assert figures["grad_norm"] > 0.25
    assert seen[0].norm().item() == pytest.approx(0.25, rel=1e-4)


def test_gradients_do_not_pile_up_over_steps(make: Any) -> None:
    state = start(make)
    state.schedule = lambda step: 0.0
    batches = cut(make.groups(4), 100)
    first = train_step(state, objectives.sft(), batches)
    second = train_step(state, objectives.sft(), batches)
    assert first["grad_norm"] == second["grad_norm"]
    assert first["learning_rate"] == 0.0


def test_a_gradient_that_is_not_finite_changes_nothing_and_keeps_its_batch(make: Any, tmp_path: Path) -> None:
    state, groups = start(make), make.groups(8)
    before = weights(state)
    batches = cut(groups, 40)
    assert len(batches) > 3
    with pytest.raises(
        CheckError, match=r"step 0: gradient norm is nan .*not applied and its batches are in .*rank-0"
    ) as err:
        train_step(state, Breaks(), batches, failures=tmp_path)
    assert torch.equal(weights(state), before)
    assert state.step == 0
    assert "learning rate" in str(err.value)
    saved, about = load_batches(tmp_path / "step-000000-rank-0")
    assert about["grad_norm"] == "nan"
    assert len(saved) == len(batches)
    for one, other in zip(saved, batches, strict=True):
        assert torch.equal(one.tree.tokens, other.tree.tokens)
        assert torch.equal(one.tree.ancestors, other.tree.ancestors)
        assert torch.equal(one.extras["rank"], other.extras["rank"])
        assert one.units == other.units
    # what was saved can be run again
    assert measure(state.trunk, objectives.sft(), saved) == measure(state.trunk, objectives.sft(), batches)


def test_a_finite_loss_with_an_infinite_gradient_is_refused_too(make: Any) -> None:
    class Steep:
        def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
            logprobs = trunk(batch.tree, {"policy": "logprobs"})["policy"]
            return LossOutput({"steep": ((logprobs - logprobs.detach()).abs().sqrt().sum(), "tokens")}, {})

    with pytest.raises(CheckError, match="the batches were not saved, no folder was given"):
        train_step(start(make), Steep(), cut(make.groups(2), 100))


def test_an_infinite_loss_with_a_finite_gradient_is_refused_too(make: Any) -> None:
    class Beside:
        def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
            out = objectives.sft()(trunk, batch)
            return LossOutput({**out.terms, "beside": (torch.tensor(math.inf), "tokens")}, {})

    state = start(make)
    before = weights(state)
    with pytest.raises(CheckError, match=r"loss/beside inf"):
        train_step(state, Beside(), cut(make.groups(2), 100))
    assert torch.equal(weights(state), before)


def test_a_step_without_the_unit_is_refused(make: Any) -> None:
    trunk = make.trunk()
    state = TrainState(trunk, make_optimizer(trunk, ["reward"], learning_rate=0.01))
    with pytest.raises(CheckError, match="'bradley_terry' is a mean over pairs, and the step has none"):
        train_step(state, rewards.reward_model(), cut(make.groups(3, k=1), 100))


def test_an_empty_micro_batch_changes_nothing(make: Any) -> None:
    one, other = start(make), start(make)
    groups = make.groups(4)
    first = train_step(one, objectives.sft(), cut(groups, 1000))
    second = train_step(other, objectives.sft(), [*cut(groups, 1000), *cut([], 1000)])
    assert torch.equal(weights(one), weights(other))
    assert first == second


def test_prepare_sees_the_whole_step_without_gradient(make: Any) -> None:
    """A weight that depends on the whole step is the same however the step is cut."""

    class Centred:
        """Pays each token its log-prob less the mean over the step."""

        def prepare(self, trunk: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
            found = [trunk(batch.tree, {"policy": "logprobs"})["policy"] for batch in batches]
            assert not any(values.requires_grad for values in found)
            mean = torch.cat(found).mean()
            return [
                Batch(batch.tree, batch.units, None, {"weight": values - mean})
                for batch, values in zip(batches, found, strict=True)
            ]

        def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
            logprobs = trunk(batch.tree, {"policy": "logprobs"})["policy"]
            return LossOutput({"centred": ((batch.extras["weight"] * logprobs).sum(), "tokens")}, {})

    groups = make.groups(8)
    norms = [train_step(start(make), Centred(), cut(groups, tokens))["grad_norm"] for tokens in (10_000, 30)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0


def test_finish_adds_figures_that_are_no_means(make: Any) -> None:
    figures = train_step(start(make), objectives.sft(), cut(make.groups(4), 30))
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


# Learning rates ---------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    linear = make_schedule("linear", steps=10, warmup_steps=2)
    assert [linear(step) for step in range(12)] == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]
    )
    cosine = make_schedule("cosine", steps=9, warmup_steps=1)
    assert [cosine(step) for step in (0, 1, 3, 5, 7, 9, 20)] == pytest.approx(
        [1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0]
    )
    constant = make_schedule("constant", warmup_steps=4)
    assert [constant(step) for step in (0, 3, 4, 1000)] == [0.25, 1, 1, 1]
    assert make_schedule("linear", steps=1)(0) == 1.0


def test_parameter_groups(make: Any) -> None:
    trunk = make.trunk()
    optimizer = make_optimizer(
        trunk, ["policy", "value"], learning_rate=0.01, role_learning_rates={"value": 0.002}, weight_decay=0.1
    )
    rows = [
        (group["lr"], group["weight_decay"], name) for group in optimizer.param_groups for name in group["param_names"]
    ]
    assert len(rows) == len(set(rows))
    for rate, decay, name in rows:
        of_value = name.startswith(("models.critic", "heads.value"))
        assert rate == (0.002 if of_value else 0.01)
        assert decay == (0.0 if "norm" in name else 0.1)
    named = {name for _, _, name in rows}
    for name, parameter in trunk.named_parameters():
        assert parameter.requires_grad == (name in named)
        assert (name in named) == (
            not name.startswith(("models.reference", "heads.reward", "heads.length", "models.critic.lm_head"))
        )


def test_the_schedule_moves_every_group_from_its_own_peak(make: Any) -> None:
    trunk = make.trunk()
    optimizer = make_optimizer(trunk, ["policy", "value"], learning_rate=0.01, role_learning_rates={"value": 0.002})
    state = TrainState(trunk, optimizer, make_schedule("linear", steps=4))
    groups = make.groups(2, extras=make.ppo_extras)
    for _ in range(3):
        figures = train_step(state, policy.ppo(), cut(groups, 100))
    assert figures["learning_rate"] == pytest.approx(0.005)
    assert {group["role"]: pytest.approx(group["lr"]) for group in optimizer.param_groups} == {
        "policy": 0.005,
        "value": 0.001,
    }


def test_weights_below_float32_are_not_trained(make: Any) -> None:
    trunk = make.trunk().to(torch.bfloat16)
    with pytest.raises(
        Exception, match=r"models.policy.*is bfloat16 and would be trained; weights that train are float32"
    ):
        make_optimizer(trunk, ["policy"], learning_rate=0.1)


def test_gradients_are_float32_where_bfloat16_computes(make: Any) -> None:
    trunk = make.trunk()
    trunk.compute_dtype = torch.bfloat16
    state = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.01))
    figures = train_step(state, objectives.sft(), cut(make.groups(6), 60))
    grads = [p.grad for p in trunk.parameters() if p.grad is not None]
    assert grads and all(grad.dtype == torch.float32 for grad in grads)
    exact = train_step(start(make), objectives.sft(), cut(make.groups(6), 60))
    assert figures["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert figures["loss"] != exact["loss"]


# Fit ---------------------------------------------------------------------------------------------------------------


def source(make: Any, **options: Any) -> GroupSource:
    return GroupSource(make.groups(12), batch_groups=4, row_tokens=40, batch_tokens=80, epochs=20, **options)


def test_fit_reports_every_step_and_evaluates_as_told(make: Any) -> None:
    rows: list[tuple[int, dict[str, float]]] = []
    state = fit(
        start(make),
        objectives.sft(),
        source(make),
        steps=5,
        on_step=lambda step, figures: rows.append((step, figures)),
        evaluate=lambda trunk: {"norm": 1.0},
        evaluate_every=2,
    )
    assert state.step == 5
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    assert [step for step, figures in rows if "eval/norm" in figures] == [2, 4, 5]
    assert all(figures["seconds"] > 0 for _, figures in rows)
    assert rows[-1][1]["loss"] < rows[0][1]["loss"]


def test_early_stop_ends_with_the_best_weights(make: Any, tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    seen: dict[int, Tensor] = {}
    state = start(make)

    def evaluate(trunk: nn.Module) -> dict[str, float]:
        seen[state.step] = weights(state)
        return {"loss": next(values)}

    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    stopper = EarlyStop("eval/loss", patience=2)
    options: dict[str, Any] = {"steps": 50, "evaluate": evaluate, "evaluate_every": 3, "checkpoints": store}
    fit(state, objectives.sft(), source(make), early_stop=stopper, **options)
    assert (state.step, stopper.best_step, stopper.best, state.stopped) == (12, 6, 2.0, True)
    assert torch.equal(weights(state), seen[6])
    assert not torch.equal(weights(state), seen[12])
    assert store.steps() == [6, 12]
    # the same command again does nothing more and ends with the same weights
    again = start(make)
    fit(again, objectives.sft(), source(make), early_stop=EarlyStop("eval/loss", patience=2), **options)
    assert again.step == 12
    assert torch.equal(weights(again), seen[6])


def test_an_evaluation_that_is_no_number_is_never_the_best() -> None:
    stopper = EarlyStop("eval/loss", patience=3)
    assert [
        stopper.update(step, {"eval/loss": value}) for step, value in enumerate([math.nan, -1.0, math.nan, -2.0])
    ] == [
        False,
        True,
        False,
        True,
    ]
    assert (stopper.best, stopper.best_step, stopper.waited) == (-2.0, 3, 0)


def test_early_stop_can_want_more(make: Any) -> None:
    stopper = EarlyStop("eval/accuracy", patience=1, higher_is_better=True)
    assert stopper.update(1, {"eval/accuracy": 0.5})
    assert stopper.update(2, {"eval/accuracy": 0.6})
    assert not stopper.update(3, {"eval/accuracy": 0.6})
    assert stopper.over
    with pytest.raises(CheckError, match="evaluations give no 'eval/accuracy'; choose one of eval/loss"):
        stopper.update(4, {"eval/loss": 1.0})


def test_a_caller_can_stop_and_the_run_stays_stopped(make: Any, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    options: dict[str, Any] = {"steps": 50, "checkpoints": store, "stop": lambda step, figures: step == 3}
    state = fit(start(make), objectives.sft(), source(make), **options)
    assert (state.step, state.stopped) == (3, True)
    again = fit(start(make), objectives.sft(), source(make), **options)
    assert (again.step, again.stopped) == (3, True)
    assert torch.equal(weights(again), weights(state))


def test_fit_keeps_a_failed_batch_beside_the_checkpoints(make: Any, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckError, match=r"run/failures/step-00000\d-rank-0"):
        fit(start(make), Breaks(), source(make), steps=5, checkpoints=store)
    assert len(list((tmp_path / "run" / "failures").iterdir())) == 1
