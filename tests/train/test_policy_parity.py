"""TRL's GRPOTrainer and RLOOTrainer on the same rollouts: loss, every gradient and the advantages are equal in float32.

TRL pads, masks and computes by its own code (`compute_loss` of its trainer, on tensors made here); Kilter goes through
groups, packed trees, trunk and objective. Policy, old policy and reference differ, and the clip bites. The advantages
are those of answers that TRL draws itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_parity
import torch
import transformers
from test_parity import PAIRS, assert_equal, config, loss_of, scaled, trunk_of, two_models
from torch import Tensor

from kilter import ops
from kilter.losses import importance_weights
from kilter.train.policy import PolicyGradient, policy_gradient
from kilter.tree import Group, Response

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

tokenizer = test_parity.tokenizer
_offline = test_parity._offline

LONGEST = 70
"""More than any of these answers has tokens."""


class Rollout(NamedTuple):
    """An answer, and what is known of its tokens when it is learned from."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    advantage: float
    old_logprobs: Tensor
    ref_logprobs: Tensor
    importance: Tensor


def logprobs_of(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """float[tokens of the answer] by the plain forward of an unpadded row."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        table = model.eval()(ids).logits[0].float().log_softmax(-1)
    return table[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def moved(model: Any) -> Any:
    """A copy whose weights are a little off."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return other


def rollouts_of(tokenizer: Any, model: Any, reference: Any, old: Any = None) -> list[Rollout]:
    """Two answers of different length to each prompt, written by a policy that was a little off, or by `old`."""
    old, generator = old or moved(model), torch.Generator().manual_seed(3)
    found = []
    for question, chosen, rejected, _ in PAIRS:
        asked = [{"role": "user", "content": question}]
        prompt = tuple(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
        for text in (chosen, rejected):
            answer = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
            old_logprobs = logprobs_of(old, prompt, answer)
            sampler = old_logprobs + 0.5 * torch.randn(len(answer), generator=generator)
            found.append(
                Rollout(
                    prompt,
                    answer,
                    float(torch.randn((), generator=generator)),
                    old_logprobs,
                    logprobs_of(reference, prompt, answer),
                    importance_weights(old_logprobs, sampler, cap=1.5)[0],
                )
            )
    return found


def padded(rows: list[Any], *, left: bool = False) -> Tensor:
    """Rows of different lengths in one tensor, 0 elsewhere."""
    rows = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")


def for_trl(rollouts: list[Rollout]) -> dict[str, Tensor]:
    """What TRL's `_generate_and_score_completions` hands to its loss."""
    answers = [rollout.answer for rollout in rollouts]
    return {
        "prompt_ids": padded([rollout.prompt for rollout in rollouts], left=True),
        "prompt_mask": padded([torch.ones(len(rollout.prompt), dtype=torch.int64) for rollout in rollouts], left=True),
        "completion_ids": padded(answers),
        "completion_mask": padded([torch.ones(len(answer), dtype=torch.int64) for answer in answers]),
        "advantages": torch.tensor([rollout.advantage for rollout in rollouts]),
        "old_per_token_logps": padded([rollout.old_logprobs for rollout in rollouts]),
        "old_logps": torch.stack([rollout.old_logprobs.sum() for rollout in rollouts]),
        "ref_per_token_logps": padded([rollout.ref_logprobs for rollout in rollouts]),
        "importance_sampling_ratio": padded([rollout.importance for rollout in rollouts]),
        "num_items_in_batch": torch.tensor(sum(map(len, answers))),
    }


def for_kilter(rollouts: list[Rollout]) -> list[Group]:
    """The same as groups of two."""
    return [
        Group(
            pair[0].prompt,
            tuple(
                Response(
                    rollout.answer,
                    per_token={
                        "old_logprobs": rollout.old_logprobs,
                        "advantages": torch.full_like(rollout.old_logprobs, rollout.advantage),
                        "ref_logprobs": rollout.ref_logprobs,
                        "importance": rollout.importance,
                    },
                )
                for rollout in pair
            ),
        )
        for pair in zip(rollouts[::2], rollouts[1::2], strict=True)
    ]


def trainer_of(kind: str, tokenizer: Any, folder: Path, model: Any, reward: Any = None, **theirs: Any) -> Any:
    """A trainer of TRL that never trains: its model is read from a folder, as its reference has to be."""
    model.save_pretrained(folder / "policy")
    options = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 10,
        "num_generations": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_completion_length": LONGEST,
        **theirs,
    }
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt, *_ in PAIRS]
    trainer = getattr(trl, f"{kind}Trainer")(
        str(folder / "policy"),
        reward_funcs=reward or (lambda prompts, completions, **_: [0.0] * len(completions)),
        args=getattr(trl, f"{kind}Config")(**options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    trainer.model.train()
    return trainer


def trl_loss(trainer: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


# What GRPOConfig says, and the same in Kilter; TRL's beta is 0 where nothing is said.
CONSTANT: dict[str, Any] = {"aggregate": "constant", "constant_length": LONGEST}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"aggregate": "sequence"}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dapo": ({"loss_type": "dapo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, CONSTANT),
}
LEVELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token": ({"epsilon": 0.1}, {"clip_range": 0.1}),
    "sequence": (
        {"importance_sampling_level": "sequence", "epsilon": 0.01},
        {"loss": "gspo", "clip_range": 0.01},
    ),
}
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no kl": ({}, {}),
    "kl": ({"beta": 0.3, "use_bias_correction_kl": False}, {"kl_coef": 0.3}),
    "higher": ({"epsilon_high": 0.012}, {"clip_range_high": 0.012}),
}
GRPO = {
    f"{kind}, {level}, {more}": tuple(KINDS[kind][at] | LEVELS[level][at] | MORE[more][at] for at in (0, 1))
    for kind in KINDS
    for level in LEVELS
    for more in MORE
} | {
    "corrected kl": (
        {"loss_type": "grpo", "beta": 0.3, "epsilon": 0.1},
        {"aggregate": "sequence", "kl_coef": 0.3, "kl_corrected": True, "clip_range": 0.1},
    ),
    "corrected kl and higher": (
        {"loss_type": "dapo", "beta": 0.04, "epsilon": 0.1, "epsilon_high": 0.15},
        {"kl_coef": 0.04, "kl_corrected": True, "clip_range": 0.1, "clip_range_high": 0.15},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.05},
        {"loss": "cispo", "clip_range": 1.0, "clip_range_high": 0.05},
    ),
}


def check(name: str, rollouts: list[Rollout], model: Any, reference: Any, ours: PolicyGradient, trainer: Any) -> None:
    """Loss and gradients of both: on several packed micro-batches here, on one padded batch there."""
    trunk = trunk_of(copy.deepcopy(model), reference)
    own, theirs = loss_of(trunk, ours, for_kilter(rollouts)), trl_loss(trainer, for_trl(rollouts))
    print(f"{name}: loss differs by {abs(own[0] - theirs[0]):.1e}")
    assert abs(own[0] - theirs[0]) < 1e-4
    assert_equal(own, theirs, {"": "models.policy."})


@pytest.mark.parametrize("name", GRPO)
def test_grpo(name: str, tokenizer: Any, tmp_path: Path) -> None:
    theirs, ours = GRPO[name]
    model, reference = two_models(tokenizer, scale=3.0)
    rollouts = rollouts_of(tokenizer, model, reference)
    trainer = trainer_of("GRPO", tokenizer, tmp_path, model, **theirs)
    check(name, rollouts, model, reference, policy_gradient(**ours), trainer)


@pytest.mark.parametrize("level", LEVELS)
def test_weights_of_another_sampler(level: str, tokenizer: Any, tmp_path: Path) -> None:
    """TRL's correction is bound to vLLM, which is not run here: the switch is set when the trainer stands."""
    theirs, ours = LEVELS[level]
    model, reference = two_models(tokenizer, scale=3.0)
    rollouts = rollouts_of(tokenizer, model, reference)
    trainer = trainer_of("GRPO", tokenizer, tmp_path, model, loss_type="grpo", **theirs)
    trainer.use_vllm = True
    objective = policy_gradient(aggregate="sequence", weighted=True, **ours)
    check(level, rollouts, model, reference, objective, trainer)


@pytest.mark.parametrize("higher", [None, 0.4])
def test_rloo(higher: float | None, tokenizer: Any, tmp_path: Path) -> None:
    model, reference = two_models(tokenizer, scale=3.0)
    rollouts = rollouts_of(tokenizer, model, reference)
    trainer = trainer_of("RLOO", tokenizer, tmp_path, model, epsilon_high=higher)
    objective = policy_gradient(loss="response_clip", aggregate="sequence", clip_range=0.2, clip_range_high=higher)
    check("rloo", rollouts, model, reference, objective, trainer)


def test_rloo_at_the_first_pass_is_reinforce(tokenizer: Any, tmp_path: Path) -> None:
    """The same gradient; the loss is another number, -A log p in the place of -A."""
    model, reference = two_models(tokenizer, scale=3.0)
    rollouts = rollouts_of(tokenizer, model, reference, old=model)
    objective = policy_gradient(loss="reinforce", aggregate="constant", constant_length=1)
    _, ours = loss_of(trunk_of(copy.deepcopy(model), reference), objective, for_kilter(rollouts))
    theirs = trl_loss(trainer_of("RLOO", tokenizer, tmp_path, model), for_trl(rollouts))
    assert_equal((theirs[0], ours), theirs, {"": "models.policy."})


# Advantages ----------------------------------------------------------------------------------------------------------

REWARDS = [0.3, 1.7, -2.0, 5.0, 5.0, 5.0, 0.0, 0.0, 1.0, 1000.1, 1000.3, 1000.2]
GROUPS = torch.arange(4).repeat_interleave(3)


def drawn(trainer: Any) -> dict[str, Any]:
    """Three answers of TRL's own to each of four prompts, scored and credited by it."""
    rows = [{"prompt": [{"role": "user", "content": PAIRS[place][0]}]} for place in GROUPS.tolist()]
    found: dict[str, Any] = trainer._generate_and_score_completions(rows)
    return found


def paid(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    assert len(prompts) == len(completions) == len(REWARDS)
    return REWARDS


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = scaled(transformers.LlamaForCausalLM, config(tokenizer), 0, scale=3.0)
    options = {"num_generations": 3, "per_device_train_batch_size": 12, "max_completion_length": 4}
    trainer = trainer_of("GRPO", tokenizer, tmp_path, model, paid, scale_rewards=scale, **options)
    theirs = drawn(trainer)["advantages"]
    ours = ops.group_advantages(torch.tensor(REWARDS), GROUPS, scale=scale)
    assert theirs.abs().max() > 1e-3
    # TRL's sums are in float32: at rewards of 1000 they err by 6e-5, where the standard deviation is 0.1
    gap = (ours - theirs).abs()
    print(f"{scale}: differ by {gap[:9].max():.1e}, at rewards of 1000 by {gap[9:].max():.1e}")
    assert gap[:9].max() < 1e-5 * theirs[:9].abs().max()
    assert gap[9:].max() < 2e-3


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_advantages(beta: float, tokenizer: Any, tmp_path: Path) -> None:
    """With the KL (k1, summed over the answer) in the rewards."""
    model, reference = two_models(tokenizer, scale=3.0)
    options = {"num_generations": 3, "per_device_train_batch_size": 12, "max_completion_length": 4}
    trainer = trainer_of("RLOO", tokenizer, tmp_path, reference, paid, beta=beta, **options)
    trainer.model.load_state_dict(model.state_dict())
    found = drawn(trainer)
    kl = []
    for row in range(12):
        prompt = tuple(found["prompt_ids"][row][found["prompt_mask"][row].bool()].tolist())
        answer = tuple(found["completion_ids"][row][found["completion_mask"][row].bool()].tolist())
        policy, base = (logprobs_of(which, prompt, answer) for which in (model, reference))
        assert policy.sum().item() == pytest.approx(found["old_logps"][row].item(), abs=1e-4)
        kl.append(float(ops.kl_k1(policy, base).sum()))
    assert max(map(abs, kl)) > 0.1
    ours = ops.leave_one_out(torch.tensor(REWARDS) - beta * torch.tensor(kl), GROUPS)
    gap = (ours - found["advantages"]).abs()
    print(f"beta {beta}: differ by {gap[:9].max():.1e}, at rewards of 1000 by {gap[9:].max():.1e}")
    assert gap[:9].max() < 1e-5 * ours[:9].abs().max()
    assert gap[9:].max() < 1e-3


def test_the_rollouts_try_both_sides_of_the_clip(tokenizer: Any) -> None:
    """The parity above would show little if no ratio left its range."""
    model, reference = two_models(tokenizer, scale=3.0)
    for limit, level in ((0.1, "token"), (0.01, "mean"), (0.2, "sum")):
        sides = set()
        for rollout in rollouts_of(tokenizer, model, reference):
            gaps = logprobs_of(model, rollout.prompt, rollout.answer) - rollout.old_logprobs
            gaps = {"token": gaps, "mean": gaps.mean(), "sum": gaps.sum()}[level]
            for ratio in gaps.exp().reshape(-1).tolist():
                sides.add(((ratio > 1 + limit) - (ratio < 1 - limit), rollout.advantage > 0))
        assert len(sides) == 6, f"{level}: below, inside and above, paid and not, but {sorted(sides)}"
