"""TRL's trainers on the same records: losses and gradients of SFT, DPO and reward models are equal in float32.

Both sides start from text. TRL templates, tokenises, pads and computes by its own code (`compute_loss` of its trainer);
Kilter goes through encoder, groups, packed trees, trunk and objective. Policy and reference differ.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from kilter.data.chat import ChatEncoder
from kilter.models.build import load_reward_model, policy_trunk
from kilter.models.roles import Role
from kilter.records import Demonstration, Message, PreferencePair, Record
from kilter.train import objectives
from kilter.train.objectives import Objective
from kilter.train.sources import groups_of, with_reference
from kilter.tree import make_batches

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of TRL and accelerate, about things that are not asked for here
]

TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)

CONVERSATIONS = [
    ["What is a stone?", "A stone is a small piece of rock.", "And a rock?", "A large stone."],
    ["Hi", "Hello! What can I do for you today?"],
    ["Say nothing.", "No."],
    [
        "Count to five, please.",
        "One, two, three, four, five.",
        "Backwards!",
        "Five, four, three.",
        "Go on",
        "Two, one.",
    ],
]
PAIRS = [
    ("What is a stone?", "A small piece of rock.", "I do not know, and I do not care, and you should not ask.", 0.5),
    ("Hi", "Hello! What can I do for you today?", "What?", 1.0),
    ("How do I kill a process?", "Use kill with its number.", "I cannot help with violence.", 0.25),
    ("Say nothing.", "...", "Nothing, nothing, nothing.", 2.0),
    ("Is two and two five, as I think it is?", "No, it is four.", "Yes, you are so right, it is five!", 0.0),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, and the template's control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|start|>", "<|end|>"]
    vocab = {token: number for number, token in enumerate([*special, *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    made.chat_template = TEMPLATE
    return made


def config(tokenizer: Any, **more: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def scaled(kind: Any, config: Any, seed: int) -> Any:
    """A random model whose weights are large enough that policy and reference disagree by nats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model.train()


def options(tmp_path: Path, size: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": size,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        **more,
    }


def trl_loss(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of TRL's own compute_loss on its first batch, and its gradients by name."""
    (inputs,) = list(trainer.get_train_dataloader())
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def our_loss(
    trunk: nn.Module, objective: Objective, tokenizer: Any, records: Sequence[Record], *, reference: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """The same through encoder, groups, three packed micro-batches or more, trunk and objective."""
    groups = groups_of(ChatEncoder(tokenizer), records, max_tokens=256).groups
    if reference:
        groups = with_reference(trunk, groups)
    batches = make_batches(groups, row_tokens=100, batch_tokens=150)
    assert len(batches) >= 2
    units = {unit: sum(batch.units[unit] for batch in batches) for unit in batches[0].units}
    trunk.zero_grad()
    total = 0.0
    for batch in batches:
        loss = torch.stack([value / units[unit] for value, unit in objective(trunk, batch).terms.values()]).sum()
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in trunk.named_parameters() if p.grad is not None}


def assert_equal(
    ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], names: Mapping[str, str]
) -> None:
    """Loss and every parameter's gradient within 1e-4 relative (of a thousandth of the whole where it is nearly 0)."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    renamed = {}
    for name, value in theirs[1].items():
        for old, new in names.items():
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = value
    assert renamed.keys() == ours[1].keys()
    whole = torch.cat([value.flatten() for value in renamed.values()]).norm()
    assert whole > 1e-3
    gaps = {n: (ours[1][n] - g).norm().item() / max(g.norm(), 1e-3 * whole).item() for n, g in renamed.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    print(f"loss {ours[0]:.6f}, TRL {theirs[0]:.6f}; worst gradient {gaps[worst]:.1e} at {worst}")
    assert gaps[worst] <= 1e-4, worst


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    warnings.simplefilter("ignore")


def turns(texts: Sequence[str]) -> tuple[Message, ...]:
    return tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(texts))


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("multi_turn", [True, False])
def test_sft(multi_turn: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Several spans a conversation (TRL's assistant_only_loss), and the last answer alone (prompt and completion)."""
    model = scaled(transformers.LlamaForCausalLM, config(tokenizer), 0)
    texts = CONVERSATIONS if multi_turn else [conversation[:2] for conversation in CONVERSATIONS]
    conversations = [turns(conversation) for conversation in texts]
    if multi_turn:
        rows = [{"messages": plain(messages)} for messages in conversations]
    else:
        rows = [{"prompt": plain(messages[:1]), "completion": plain(messages[1:])} for messages in conversations]
    trainer = trl.SFTTrainer(
        copy.deepcopy(model),
        trl.SFTConfig(**options(tmp_path, len(rows), assistant_only_loss=multi_turn)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    records = [Demonstration(messages=messages) for messages in conversations]
    ours = our_loss(policy_trunk(model), objectives.sft(), tokenizer, records)
    assert_equal(ours, trl_loss(trainer), {"": "models.policy."})


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo(beta: float, tokenizer: Any, tmp_path: Path) -> None:
    model, reference = (scaled(transformers.LlamaForCausalLM, config(tokenizer), seed) for seed in (0, 1))
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected, _ in PAIRS
    ]
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(reference).eval(),
        args=trl.DPOConfig(**options(tmp_path, len(rows), beta=beta)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trunk = policy_trunk(model)
    trunk.add_model("reference", reference.requires_grad_(False))
    trunk.add_role("reference", Role("reference"))
    objective = objectives.pair("dpo", {"beta": beta})
    ours = our_loss(trunk, objective, tokenizer, pairs(), reference=True)
    assert abs(ours[0] - 0.6931) > 0.01, "policy and reference are too alike for this test to see a fault"
    assert_equal(ours, trl_loss(trainer), {"": "models.policy."})


def pairs() -> list[PreferencePair]:
    return [
        PreferencePair(prompt=(Message("user", prompt),), chosen=chosen, rejected=rejected, margin=margin)
        for prompt, chosen, rejected, margin in PAIRS
    ]


@pytest.mark.parametrize("margins", [False, True])
def test_reward_model(margins: bool, tokenizer: Any, tmp_path: Path) -> None:
    model = scaled(transformers.LlamaForSequenceClassification, config(tokenizer, num_labels=1), 0)
    model.save_pretrained(tmp_path / "reward")
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            **({"margin": margin} if margins else {}),
        }
        for prompt, chosen, rejected, margin in PAIRS
    ]
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(**options(tmp_path, len(rows), center_rewards_coefficient=0.05)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    objective = objectives.reward_model(centring_coef=0.05, margin_coef=1.0 if margins else 0.0)
    ours = our_loss(load_reward_model(tmp_path / "reward"), objective, tokenizer, pairs())
    assert_equal(ours, trl_loss(trainer), {"model.": "models.reward.", "score.": "heads.reward."})
