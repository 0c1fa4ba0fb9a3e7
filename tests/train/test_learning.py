"""Training changes behaviour the right way, on a tiny model in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kilter import ops
from kilter.models.heads import ScalarHead
from kilter.models.roles import Role
from kilter.models.trunk import Trunk
from kilter.train import objectives, policy, preferences, rewards
from kilter.train.loop import TrainState, fit, measure
from kilter.train.optimizer import make_optimizer
from kilter.train.reference import with_reference
from kilter.train.sources import GroupSource
from kilter.tree import Batch, Group, Response, make_batch, make_batches

TOKEN = 7
PROMPTS = [(1, first, second) for first in range(3, 11) for second in (11, 12)]


class Rollouts:
    """Answers of three tokens from the policy, paid 1 for each that is TOKEN, credited by GAE; two epochs on each."""

    def __init__(self, trunk: Trunk, seed: int = 0) -> None:
        self.trunk = trunk
        self.generator = torch.Generator().manual_seed(seed)
        self.scores: list[float] = []
        self.held: list[list[Batch]] = []

    @torch.no_grad()
    def sample(self) -> list[tuple[int, ...]]:
        model: Any = self.trunk.models["policy"]
        ids = torch.tensor(PROMPTS)
        for _ in range(3):
            probabilities = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=self.generator)], dim=1)
        return [tuple(row) for row in ids[:, 3:].tolist()]

    @torch.no_grad()
    def next_step(self) -> Sequence[Batch]:
        if not self.held:
            groups = [Group(prompt, (Response(answer),)) for prompt, answer in zip(PROMPTS, self.sample(), strict=True)]
            batch = make_batch([groups])
            rewards = (batch.tree.target == TOKEN).float()
            self.scores.append(float(rewards.sum()) / len(PROMPTS))
            answers = self.trunk(batch.tree, {"policy": "logprobs", "value": "values"})
            advantages, returns = ops.gae(rewards, answers["value"], batch.tree.leaf)
            columns = {
                "old_logprobs": answers["policy"],
                "old_values": answers["value"],
                "advantages": ops.whiten(advantages),
                "returns": returns,
            }
            batch = Batch(batch.tree, batch.units, None, columns)
            self.held = [[batch], [batch]]
        return self.held.pop()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        pass


def test_ppo_paid_for_saying_a_token_says_it(make: Any) -> None:
    model = make.llama(0, scale=3.0)
    roles = {"policy": Role("policy"), "value": Role("policy", head="value")}
    trunk = Trunk({"policy": model}, roles, {"value": ScalarHead(16)})
    optimizer = make_optimizer(trunk, ["policy", "value"], learning_rate=0.02)
    source = Rollouts(trunk)
    rows: list[dict[str, float]] = []
    fit(
        TrainState(trunk, optimizer),
        policy.ppo(),
        source,
        steps=80,
        on_step=lambda _, figures: rows.append(figures),
    )
    assert source.scores[0] < 0.6
    assert sum(source.scores[-5:]) / 5 > 2.5
    assert rows[0]["policy/ratio"] == 1.0
    assert all(0.5 < row["policy/ratio"] < 2 for row in rows)


def test_dpo_raises_the_margin_on_what_it_saw_and_on_what_it_did_not(make: Any) -> None:
    """Preferred: answers that repeat the prompt's first token."""

    def groups(prompts: Sequence[tuple[int, ...]]) -> list[Group]:
        found = []
        for prompt in prompts:
            good, bad = (prompt[1], prompt[1], 2), (prompt[2], 13, 2)
            responses = [Response(ids, per_response={"rank": float(rank)}) for rank, ids in enumerate((good, bad))]
            found.append(Group(prompt, tuple(responses)))
        return found

    trunk = make.trunk()
    trunk.models["reference"].load_state_dict(trunk.models["policy"].state_dict())
    seen, unseen = (with_reference(trunk, groups(part)) for part in (PROMPTS[:12], PROMPTS[12:]))
    held_out = make_batches(unseen, row_tokens=64, batch_tokens=256)
    objective = preferences.preference("dpo", {"beta": 0.2})
    before = measure(trunk, objective, held_out)
    assert abs(before["loss"] - 0.6931) < 1e-3
    assert before["rewards/accuracy"] in (0.0, 0.5, 1.0) or abs(before["rewards/margin"]) < 1e-4
    source = GroupSource(seen, batch_groups=6, row_tokens=64, batch_tokens=256, epochs=20)
    rows: list[dict[str, float]] = []
    state = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.003))
    fit(state, objective, source, steps=40, on_step=lambda _, figures: rows.append(figures))
    after = measure(trunk, objective, held_out)
    assert rows[-1]["rewards/margin"] > 1
    assert after["rewards/margin"] > 0.5
    assert after["rewards/accuracy"] == 1.0
    assert after["loss"] < before["loss"]


def test_a_reward_model_learns_an_order_from_rankings(make: Any) -> None:
    """Better: more of one token. Three answers a prompt, the middle one tied with the best on some prompts."""
    generator = torch.Generator().manual_seed(0)

    def group(prompt: tuple[int, ...]) -> Group:
        responses = []
        for count in (3, 1, 0):
            ids = [TOKEN] * count + torch.randint(8, 20, (4 - count,), generator=generator).tolist()
            order = torch.randperm(4, generator=generator).tolist()
            responses.append(Response((*(ids[i] for i in order), 2), per_response={"rank": float(3 - count)}))
        return Group(prompt, tuple(responses))

    trunk = make.trunk()
    train, held_out = [group(prompt) for prompt in PROMPTS * 2], [group(prompt) for prompt in PROMPTS]
    source = GroupSource(train, batch_groups=16, row_tokens=64, batch_tokens=512, epochs=50)
    objective = rewards.reward_model()
    batches = make_batches(held_out, row_tokens=64, batch_tokens=512)
    before = measure(trunk, objective, batches)["rewards/accuracy"]
    fit(TrainState(trunk, make_optimizer(trunk, ["reward"], learning_rate=0.01)), objective, source, steps=60)
    after = measure(trunk, objective, batches)
    assert before < 0.75
    assert after["rewards/accuracy"] > 0.9
    assert after["rewards/margin"] > 0.5


def test_sft_learns_what_it_is_shown_and_only_the_scored_part(make: Any) -> None:
    """The scored tokens follow from the prompt; the unscored one is always the same and is not learned all the same."""

    def group(prompt: tuple[int, ...], spans: tuple[tuple[int, int], ...]) -> Group:
        return Group(prompt, (Response((20, prompt[1], 2), spans),))

    def cut(spans: tuple[tuple[int, int], ...]) -> list[Batch]:
        return make_batches([group(p, spans) for p in PROMPTS], row_tokens=64, batch_tokens=512)

    trunk = make.trunk()
    scored, unscored = ((1, 3),), ((0, 1),)
    before = measure(trunk, objectives.sft(), cut(unscored))["loss"]
    source = GroupSource(
        [group(p, scored) for p in PROMPTS], batch_groups=8, row_tokens=64, batch_tokens=512, epochs=50
    )
    fit(TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.01)), objectives.sft(), source, steps=60)
    assert measure(trunk, objectives.sft(), cut(scored))["loss"] < 0.3
    assert measure(trunk, objectives.sft(), cut(unscored))["loss"] > before - 0.5
