"""TRL's trainers on the same records: every loss they have and its gradients are equal in float32.

Both sides start from text. TRL templates, tokenises, pads and computes by its own code (`compute_loss` of its trainer);
Kilter goes through encoder, groups, packed trees, trunk and objective. Policy and reference differ.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from kilter.models.trunk import Trunk
from kilter.records import Demonstration, Message, PreferencePair, Ranking, Record, UnpairedFeedback
from kilter.train import objectives, preferences, rewards
from kilter.train.objectives import Objective, prepared
from kilter.train.preferences import Term
from kilter.train.reference import with_reference
from kilter.train.sources import groups_of
from kilter.tree import Group, Response, make_batches

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


def scaled(kind: Any, config: Any, seed: int, *, scale: float = 8.0) -> Any:
    """A random model whose weights are large enough that policy and reference disagree by nats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
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
    return loss_of(trunk, objective, groups_of(ChatEncoder(tokenizer), records, max_tokens=256).groups, reference)


def loss_of(
    trunk: nn.Module, objective: Objective, groups: Sequence[Group], reference: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of groups in several packed micro-batches."""
    if reference:
        groups = with_reference(trunk, groups)
    batches = prepared(objective, trunk, make_batches(groups, row_tokens=100, batch_tokens=150))
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


@pytest.mark.parametrize(("multi_turn", "loss"), [(True, "nll"), (False, "nll"), (True, "dft")])
def test_sft(multi_turn: bool, loss: Any, tokenizer: Any, tmp_path: Path) -> None:
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
        trl.SFTConfig(**options(tmp_path, len(rows), assistant_only_loss=multi_turn, loss_type=loss)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    records = [Demonstration(messages=messages) for messages in conversations]
    ours = our_loss(policy_trunk(model), objectives.sft(loss=loss), tokenizer, records)
    assert_equal(ours, trl_loss(trainer), {"": "models.policy."})


# name -> TRL's configuration, and the same in Kilter. Whatever is not said is the default of both.
DPO: dict[str, tuple[dict[str, Any], list[Term]]] = {
    "dpo": ({"beta": 0.5}, [Term("dpo", {"beta": 0.5})]),
    "dpo at its defaults": ({}, [Term("dpo")]),
    "hinge": ({"loss_type": "hinge", "beta": 0.2}, [Term("hinge", {"beta": 0.2})]),
    "ipo": ({"loss_type": "ipo"}, [Term("ipo")]),
    "exo": (
        {"loss_type": "exo_pair", "label_smoothing": 0.05},
        [Term("exo", {"label_smoothing": 0.05})],
    ),
    "nca": ({"loss_type": "nca_pair", "beta": 0.02}, [Term("nca", {"beta": 0.02})]),
    "robust": (
        {"loss_type": "robust", "label_smoothing": 0.2},
        [Term("robust", {"label_smoothing": 0.2})],
    ),
    "bco_pair": ({"loss_type": "bco_pair"}, [Term("bco_pair")]),
    "sppo": ({"loss_type": "sppo_hard", "beta": 0.02}, [Term("sppo", {"beta": 0.02})]),
    "aot": (
        {"loss_type": "aot", "label_smoothing": 0.1},
        [Term("aot", {"label_smoothing": 0.1})],
    ),
    "aot_unpaired": (
        {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
        [Term("aot_unpaired", {"label_smoothing": 0.1})],
    ),
    "apo_zero": ({"loss_type": "apo_zero"}, [Term("apo_zero")]),
    "apo_down": ({"loss_type": "apo_down"}, [Term("apo_down")]),
    "discopop": (
        {"loss_type": "discopop", "beta": 0.05, "discopop_tau": 0.5},
        [Term("discopop", {"tau": 0.5})],
    ),
    "dpo_norm": ({"loss_type": "sigmoid_norm", "beta": 2.0}, [Term("dpo_norm")]),
    "forward KL": (
        {"f_divergence_type": "forward_kl"},
        [Term("f_dpo", {"divergence": "forward_kl"})],
    ),
    "JS": ({"f_divergence_type": "js_divergence", "beta": 0.5}, [Term("f_dpo", {"beta": 0.5})]),
    "alpha divergence": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        [Term("f_dpo", {"divergence": "alpha", "alpha": 0.3})],
    ),
    "ld_dpo": ({"ld_alpha": 0.3}, [Term("ld_dpo", {"alpha": 0.3})]),
    "wpo": ({"use_weighting": True}, [Term("wpo")]),
    "a mixture": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
        [Term("dpo", weight=0.8), Term("bco_pair", weight=0.2), Term("nll", weight=1.5)],
    ),
}
# Everything TRL's trainer knows by name must stand above.
KNOWN = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


def conversational() -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected, _ in PAIRS
    ]


def two_models(tokenizer: Any, *, scale: float = 8.0) -> tuple[Any, Any]:
    """A policy and a reference that disagree."""
    model, reference = (scaled(transformers.LlamaForCausalLM, config(tokenizer), seed, scale=scale) for seed in (0, 1))
    return model, reference


def trunk_of(model: Any, reference: Any) -> Trunk:
    trunk = policy_trunk(model)
    trunk.add_model("reference", reference.requires_grad_(False))
    trunk.add_role("reference", Role("reference"))
    return trunk


@pytest.mark.parametrize("name", DPO)
def test_dpo_and_its_family(name: str, tokenizer: Any, tmp_path: Path) -> None:
    theirs, terms = DPO[name]
    model, reference = two_models(tokenizer, scale=3.0)
    rows = conversational()
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(reference).eval(),
        args=trl.DPOConfig(**options(tmp_path, len(rows), **theirs)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trunk = trunk_of(model, reference)
    ours = our_loss(trunk, preferences.mixture(terms), tokenizer, pairs(), reference=True)
    at_the_start = our_loss(
        trunk_of(model, copy.deepcopy(model)), preferences.mixture(terms), tokenizer, pairs(), reference=True
    )
    assert abs(ours[0] / at_the_start[0] - 1) > 1e-3 or "nll" in str(terms), "policy and reference are too alike"
    assert_equal(ours, trl_loss(trainer), {"": "models.policy."})


def test_no_loss_of_trl_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    asked: set[str] = set()
    for theirs, _ in DPO.values():
        kinds = theirs.get("loss_type", "sigmoid")
        asked |= {kinds} if isinstance(kinds, str) else set(kinds)
    assert asked == set(KNOWN)
    model, reference = two_models(tokenizer)
    rows = conversational()
    trainer = trl.DPOTrainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(**options(tmp_path, len(rows))),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.loss_types = ["no such loss"]
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        trl_loss(trainer)
    assert set(str(caught.value).split("one of")[1].replace("'", "").strip(" []").split(", ")) == set(KNOWN)


WEIGHTS = {"undesirable_weight": 1.7, "desirable_weight": 0.6}


@pytest.mark.parametrize(
    ("theirs", "term"),
    [
        ({"beta": 0.3}, Term("kto", {"beta": 0.3})),
        (
            {"undesirable_weight": 1.7, "desirable_weight": 0.6},
            Term("kto", {"undesirable_weight": 1.7, "desirable_weight": 0.6}),
        ),
        (
            {"loss_type": "apo_zero_unpaired", "undesirable_weight": 1.7},
            Term("apo_zero_unpaired", {"undesirable_weight": 1.7}),
        ),
    ],
    ids=["kto", "kto with weights", "apo_zero_unpaired"],
)
def test_thumbs(theirs: dict[str, Any], term: Term, tokenizer: Any, tmp_path: Path) -> None:
    """TRL borrows a mismatched completion from the row before; the same ones are borrowed here."""
    model, reference = two_models(tokenizer, scale=3.0)
    feedback = [
        (prompt, chosen if place % 3 else rejected, bool(place % 3))
        for place, (prompt, chosen, rejected, _) in enumerate(PAIRS)
    ]
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
            "label": label,
        }
        for prompt, answer, label in feedback
    ]
    trainer = trl.KTOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(reference).eval(),
        args=trl.KTOConfig(**options(tmp_path, len(rows), **theirs)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    records = [
        UnpairedFeedback(prompt=(Message("user", prompt),), response=answer, desirable=label)
        for prompt, answer, label in feedback
    ]
    groups = groups_of(ChatEncoder(tokenizer), records, max_tokens=256).groups
    own = [group.responses[0] for group in groups]
    borrowed = [own[-1], *own[:-1]]
    both = [
        replace(
            group,
            responses=tuple(
                replace(response, per_response={"desirable": mine.per_response["desirable"], "mismatched": mark})
                for response, mark in ((mine, 0.0), (other, 1.0))
            ),
        )
        for group, mine, other in zip(groups, own, borrowed, strict=True)
    ]
    trunk = trunk_of(model, reference)
    objective = preferences.mixture([term])
    assert_equal(loss_of(trunk, objective, both, reference=True), trl_loss(trainer), {"": "models.policy."})


def short_prompts(tokenizer: Any) -> tuple[list[dict[str, str]], list[Group]]:
    """Pairs below a prompt of one token, as text for TRL's older trainers and as tokens."""
    rows = [{"prompt": "<|start|>", "chosen": chosen, "rejected": rejected} for _, chosen, rejected, _ in PAIRS]
    (start,) = tokenizer("<|start|>")["input_ids"]

    def response(text: str, rank: float) -> Response:
        return Response((*tokenizer(text)["input_ids"], tokenizer.eos_token_id), per_response={"rank": rank})

    groups = [Group((start,), (response(row["chosen"], 0), response(row["rejected"], 1))) for row in rows]
    return rows, groups


CPO: dict[str, tuple[dict[str, Any], list[Term], bool]] = {
    "cpo": (
        {"beta": 0.2, "cpo_alpha": 0.7, "label_smoothing": 0.1},
        [Term("cpo", {"beta": 0.2, "nll_coef": 0.0, "label_smoothing": 0.1}), Term("nll", weight=0.7)],
        False,
    ),
    "hinge": (
        {"loss_type": "hinge", "cpo_alpha": 0.0, "beta": 0.02},
        [Term("hinge", {"beta": 0.02})],
        True,
    ),
    "ipo": ({"loss_type": "ipo", "cpo_alpha": 0.0}, [Term("ipo")], True),
    "simpo": (
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.8, "label_smoothing": 0.1},
        [Term("simpo", {"beta": 2.5, "gamma": 0.8, "label_smoothing": 0.1})],
        False,
    ),
    "alphapo": (
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.8, "alpha": 0.1},
        [Term("alphapo", {"beta": 2.5, "gamma": 0.8, "alpha": 0.1})],
        False,
    ),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo_and_simpo(name: str, tokenizer: Any, tmp_path: Path) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    theirs, terms, reference_free = CPO[name]
    model, _ = two_models(tokenizer, scale=3.0)
    rows, groups = short_prompts(tokenizer)
    trainer = cpo.CPOTrainer(
        copy.deepcopy(model),
        cpo.CPOConfig(**options(tmp_path, len(rows), **theirs) | {"max_length": 256}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    objective = preferences.mixture(terms, reference_free=reference_free)
    assert_equal(loss_of(policy_trunk(model), objective, groups), trl_loss(trainer), {"": "models.policy."})


def test_orpo(tokenizer: Any, tmp_path: Path) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    model, _ = two_models(tokenizer, scale=3.0)
    rows, groups = short_prompts(tokenizer)
    trainer = orpo.ORPOTrainer(
        copy.deepcopy(model),
        orpo.ORPOConfig(**options(tmp_path, len(rows), beta=0.3) | {"max_length": 256}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    objective = preferences.mixture([Term("orpo", {"beta": 0.3, "nll_coef": 0.0}), Term("nll")])
    assert_equal(loss_of(policy_trunk(model), objective, groups), trl_loss(trainer), {"": "models.policy."})


TPO: dict[str, tuple[dict[str, Any], Term]] = {
    "tpo": (
        {"beta": 0.2, "tpo_alpha": 0.7, "label_smoothing": 0.1},
        Term("tpo", {"beta": 0.2, "nll_coef": 0.7, "label_smoothing": 0.1}),
    ),
    "tpo at its defaults": ({}, Term("tpo")),
    "tpo_l": (
        {"loss_type": "tpo-l", "beta": 2.5, "tpo_l_gamma": 0.8},
        Term("tpo_l", {"beta": 2.5, "gamma": 0.8}),
    ),
}


@pytest.mark.parametrize("name", TPO)
def test_triples(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """The gold responses are equally long: TRL weighs their tokens, Kilter the responses."""
    tpo = pytest.importorskip("trl.experimental.tpo")
    theirs, term = TPO[name]
    model, _ = two_models(tokenizer, scale=3.0)
    golds = ["It is a rock!", "Hello to you.", "Send SIGTERM.", "Well, silent.", "No: it is 4.."]
    assert len({len(gold) for gold in golds}) == 1
    rows = [
        row | {"reference": [{"role": "assistant", "content": gold}]}
        for row, gold in zip(conversational(), golds, strict=True)
    ]
    trainer = tpo.TPOTrainer(
        copy.deepcopy(model),
        args=tpo.TPOConfig(**options(tmp_path, len(rows), **theirs)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    records = [
        Ranking(prompt=(Message("user", prompt),), responses=(chosen, gold, rejected), ranks=(1, 0, 2))
        for (prompt, chosen, rejected, _), gold in zip(PAIRS, golds, strict=True)
    ]
    ours = our_loss(policy_trunk(model), preferences.mixture([term]), tokenizer, records)
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
    objective = rewards.reward_model(options={"margin_coef": float(margins)}, centring_coef=0.05)
    ours = our_loss(load_reward_model(tmp_path / "reward"), objective, tokenizer, pairs())
    assert_equal(ours, trl_loss(trainer), {"model.": "models.reward.", "score.": "heads.reward."})
