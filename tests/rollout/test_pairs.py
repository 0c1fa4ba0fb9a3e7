"""Online preference optimisation's source: what it compares, how pairs weigh, what it says, and that it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kilter.errors import CheckError
from kilter.models.generation import NativeSampler
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Sample, Score
from kilter.rollout.pairs import PairSource
from kilter.train.checkpoint import CheckpointStore
from kilter.train.live import ReferenceSync
from kilter.train.loop import TrainState, fit
from kilter.train.optimizer import make_optimizer
from kilter.train.preferences import preference
from kilter.tree import Group

Make = Callable[..., Any]
DPO = preference("dpo", {"beta": 0.5})


@pytest.fixture
def make_pairs(encoder: Any, prompts: list[Prompt], likes_one_word: Any) -> Callable[..., PairSource]:
    """Eight prompts a round with four answers each; one step a round."""

    def make(trunk: Trunk, *, seed: int = 0, **changes: Any) -> PairSource:
        given: dict[str, Any] = {
            "encoder": encoder,
            "prompts": prompts,
            "scorer": likes_one_word(),
            "sampler": NativeSampler(trunk, "policy"),
            "sampling": Sampling(max_new_tokens=8),
            "prompts_per_rollout": 8,
            "num_samples": 4,
            "epochs": 1,
            "minibatches": 1,
            "generator": torch.Generator().manual_seed(seed),
        }
        return PairSource(trunk, **(given | changes))

    return make


def moved(trunk: Trunk) -> Trunk:
    """Policy and reference differ, so that nothing cancels."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trunk.parameters_of("policy"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trunk


def train_state(trunk: Trunk, learning_rate: float = 5e-3) -> TrainState:
    return TrainState(trunk, make_optimizer(trunk, DPO.roles, learning_rate=learning_rate))


def scores_of(source: PairSource) -> dict[tuple[int, ...], list[tuple[tuple[int, ...], float]]]:
    """Prompt -> its answers and their scores, from the rollouts alone."""
    found: dict[tuple[int, ...], list[tuple[tuple[int, ...], float]]] = {}
    for rollout in source.rollouts:
        ids = rollout.completion.ids
        found.setdefault(rollout.completion.prompt, []).append((ids, 4.0 * ids.count(5) / len(ids)))
    return found


def groups_of(source: PairSource) -> list[Group]:
    return list(source._groups)


@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_it_learns_what_it_is_scored_for_and_ends_when_there_is_nothing_left_to_learn(
    pairing: str, make_trunk: Make, make_pairs: Make
) -> None:
    trunk, seen = make_trunk(), []
    source = make_pairs(trunk, pairing=pairing)
    state = train_state(trunk)
    fit(state, DPO, source, steps=60, on_step=lambda step, _: seen.append(source.figures))
    assert seen[0]["rollout/score"] < 0.5 and abs(seen[0]["rollout/kl_k1"]) < 1e-5
    assert seen[-1]["rollout/score"] > 3.0 and seen[-1]["rollout/kl_k1"] > 2.0  # 4 is all there is
    assert state.stopped and state.step == len(seen) < 60
    assert source.stopped and "tells the answers apart (by 0 or more) to only 0 of 8 prompts" in source.stopped


def test_best_and_worst_are_compared(make_trunk: Make, make_pairs: Make) -> None:
    source = make_pairs(make_trunk())
    source.next_step()
    answers = scores_of(source)
    kept = {group.prompt: group for group in groups_of(source)}
    for prompt, rows in answers.items():
        best, worst = max(score for _, score in rows), min(score for _, score in rows)
        assert (prompt in kept) == (best > worst)
        if prompt in kept:
            one, other = kept[prompt].responses
            found = dict(rows)
            assert (found[one.ids], found[other.ids]) == (best, worst)
            assert (one.per_response, other.per_response) == ({"rank": 0.0}, {"rank": 1.0})
    assert 0 < len(kept) < 8
    assert source.figures["rollout/prompts_kept"] == len(kept) / 8


def test_all_pairs_weigh_by_their_gap_and_the_mean_weight_is_one(make_trunk: Make, make_pairs: Make) -> None:
    trunk = moved(make_trunk())
    source = make_pairs(trunk, pairing="all")
    (batch,) = source.next_step()
    out = DPO(trunk, batch)
    answers, gaps, losses = scores_of(source), [], []
    for group in groups_of(source):
        assert len(group.responses) == 4
        found = dict(answers[group.prompt])
        for one, other in combinations(group.responses, 2):
            gap = found[one.ids] - found[other.ids]
            better, worse = (one, other) if gap >= 0 else (other, one)
            ratio = [log_ratio(trunk, group.prompt, response.ids) for response in (better, worse)]
            gaps.append(abs(gap))
            losses.append(abs(gap) * -F.logsigmoid(torch.tensor(0.5 * (ratio[0] - ratio[1]))).item())
    total, unit = out.terms["dpo"]
    assert unit == "pairs" and batch.units["pairs"] == len(gaps) == 6 * len(groups_of(source))
    assert total.item() == pytest.approx(sum(losses) / fmean(gaps), rel=1e-4)


def log_ratio(trunk: Trunk, prompt: tuple[int, ...], ids: tuple[int, ...]) -> float:
    """log p / q of an answer, from one forward of each bare model."""
    with torch.no_grad():
        found = []
        for name in ("policy", "reference"):
            logits = trunk.models[name](torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            found.append(sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)))
    return found[0] - found[1]


def test_the_figures_are_those_of_all_answers(make_trunk: Make, make_pairs: Make) -> None:
    trunk = moved(make_trunk())
    source = make_pairs(trunk)
    source.next_step()
    rollouts, figures = source.rollouts, source.figures
    ratios = [log_ratio(trunk, one.completion.prompt, one.completion.ids) for one in rollouts]
    scores = [score for rows in scores_of(source).values() for _, score in rows]
    for name, values in (("kl_k1", ratios), ("score", scores)):
        column = torch.tensor(values, dtype=torch.float64)
        assert figures[f"rollout/{name}"] == pytest.approx(float(column.mean()), abs=1e-5)
        assert figures[f"rollout/{name}_sem"] == pytest.approx(float(column.std()) / math.sqrt(len(column)), abs=1e-5)
    assert figures["rollout/samples"] == len(rollouts) == 32 and figures["rollout/unscored"] == 0
    surprisal = [-logprob for one in rollouts for logprob in one.completion.logprobs]
    assert figures["rollout/entropy"] == pytest.approx(fmean(surprisal))
    assert figures["rollout/distinct"] == len({one.text for one in rollouts}) / 32
    gaps = [max(s for _, s in rows) - min(s for _, s in rows) for rows in scores_of(source).values()]
    assert figures["rollout/margin"] == pytest.approx(fmean(gap for gap in gaps if gap))


def test_no_kl_is_said_where_it_cannot_be_known(make_trunk: Make, make_pairs: Make) -> None:
    warm = make_pairs(make_trunk(), sampling=Sampling(temperature=0.7, max_new_tokens=8))
    free = make_pairs(make_trunk(), reference=False)
    for source in (warm, free):
        source.next_step()
        assert "rollout/kl_k1" not in source.figures and "rollout/score" in source.figures
    assert "ref_logprobs" not in groups_of(free)[0].responses[0].per_token


def test_close_calls_are_left_out(make_trunk: Make, make_pairs: Make) -> None:
    plain, strict = make_pairs(make_trunk()), make_pairs(make_trunk(), min_margin=0.6)
    plain.next_step()
    strict.next_step()
    answers = scores_of(strict)
    spread = {prompt: max(s for _, s in rows) - min(s for _, s in rows) for prompt, rows in answers.items()}
    assert {group.prompt for group in groups_of(strict)} == {p for p, gap in spread.items() if gap >= 0.6}
    assert 0 < len(groups_of(strict)) < len(groups_of(plain))
    with pytest.raises(CheckError, match=r"tells the answers apart \(by 99 or more\) to only 0 of 8 prompts"):
        make_pairs(make_trunk(), min_margin=99.0).next_step()


def test_an_answer_that_was_cut_pays_for_it(make_trunk: Make, make_pairs: Make) -> None:
    source = make_pairs(make_trunk(), truncation_penalty=100.0)
    source.next_step()
    cut = {one.completion.ids for one in source.rollouts if not one.completion.finished}
    rows = [[response.ids in cut for response in group.responses] for group in groups_of(source)]
    assert [True, False] not in rows and [False, True] in rows
    assert source.figures["rollout/score"] >= 0  # the score itself is reported without it


def test_unscored_answers_are_compared_with_nothing(make_trunk: Make, make_pairs: Make) -> None:
    class Picky:
        name = "picky"

        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [Score(float(at) if at % 4 else None) for at in range(len(samples))]

    source = make_pairs(make_trunk(), scorer=Picky(), pairing="all")
    source.next_step()
    assert source.figures["rollout/unscored"] == 8
    assert {len(group.responses) for group in groups_of(source)} == {3}


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_killed_run_goes_on_to_the_same_bits(at: int, make_trunk: Make, make_pairs: Make, tmp_path: Path) -> None:
    """Killed within a round (1, 5) and at its end (2); the reference follows the policy at every other step."""

    def run(folder: Path, steps: int, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        trunk = make_trunk()
        source = make_pairs(trunk, seed=seed, pairing="all", epochs=2)
        sync = ReferenceSync(trunk, every=2, mix=0.5)
        fit(
            train_state(trunk),
            DPO,
            source,
            steps=steps,
            checkpoints=CheckpointStore(folder),
            also={"reference": sync},
            on_step=lambda step, _: sync.look(step),
        )
        return dict(trunk.state_dict()), source.state_dict()

    whole = run(tmp_path / "whole", 7, seed=0)
    run(tmp_path / "cut", at, seed=0)
    again = run(tmp_path / "cut", 7, seed=99)  # a resumed run takes nothing from its own seed
    assert all(torch.equal(whole[0][name], again[0][name]) for name in whole[0])
    assert str(whole[1]) == str(again[1])
    assert any(not torch.equal(make_trunk().state_dict()[name], whole[0][name]) for name in whole[0] if "ref" in name)
