"""A model small enough to learn in seconds, an encoder without a tokenizer, and a scorer that likes one word."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

from kilter.config import PolicyConfig
from kilter.models.generation import NativeSampler
from kilter.models.heads import ScalarHead
from kilter.models.roles import Lora, Role, add_adapter
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Conversation, Message, Prompt, Sample, Score
from kilter.rollout import PolicySource

VOCAB, END, LIKED = 16, 2, 5


class TinyEncoder:
    """Tokens are numbers and words are their names."""

    stop_ids = (END,)
    pad_id = 0

    def prompt(self, messages: Conversation) -> tuple[int, ...]:
        return (1, *(3 + ord(char) % 13 for char in messages[-1].content))

    def response(self, messages: Conversation, text: str) -> tuple[int, ...]:
        return (*(int(word) for word in text.split()), END)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids if token != END)


class LikesOneWord:
    """Pays `scale` times the share of tokens that are the liked one."""

    name = "likes one word"

    def __init__(self, scale: float = 4.0) -> None:
        self.scale = scale

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self.scale * sample.ids.count(LIKED) / len(sample.ids)) for sample in samples]


def tiny_model(**changes: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0} | changes
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "lm_head" in name else 0.1, generator=generator)
    return model


def tiny_trunk(kind: str = "copies") -> Trunk:
    """PPO's roles as whole copies, as adapters of one model, or with the value's head on the policy's adapter."""
    model = tiny_model()
    head = {"value": ScalarHead(32)}
    if kind == "copies":
        models = {"policy": model, "reference": copy.deepcopy(model), "value": copy.deepcopy(model.model)}
        roles = {name: Role(name, head=name if name == "value" else None) for name in models}
        return Trunk(models, roles, head)
    generator = torch.Generator().manual_seed(1)
    add_adapter(model, "policy", Lora(rank=8), generator)
    if kind == "adapters":
        add_adapter(model, "value", Lora(rank=8), generator)
    value = Role("m", "value" if kind == "adapters" else "policy", "value")
    return Trunk({"m": model}, {"policy": Role("m", "policy"), "reference": Role("m"), "value": value}, head)


def some_prompts(num_prompts: int = 20) -> list[Prompt]:
    return [Prompt(prompt=(Message("user", "ab" * (1 + at % 3) + chr(97 + at)),)) for at in range(num_prompts)]


PLAIN: dict[str, Any] = {"kl_coef": 0.01, "kl_controller": "fixed", "truncation_penalty": 0.0}


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def make_trunk() -> Callable[..., Trunk]:
    return tiny_trunk


@pytest.fixture
def prompts() -> list[Prompt]:
    return some_prompts()


@pytest.fixture
def likes_one_word() -> type[LikesOneWord]:
    return LikesOneWord


@pytest.fixture
def make_source(encoder: TinyEncoder) -> Callable[..., PolicySource]:
    """A source of 8 prompts x 2 samples in two minibatches and two epochs; `ppo` are changes of its config."""

    def make(trunk: Trunk, *, seed: int = 0, ppo: dict[str, Any] | None = None, **changes: Any) -> PolicySource:
        given: dict[str, Any] = {
            "encoder": encoder,
            "prompts": some_prompts(),
            "scorer": LikesOneWord(),
            "sampler": NativeSampler(trunk, "policy"),
            "sampling": Sampling(max_new_tokens=8),
            "config": PolicyConfig(**(PLAIN | (ppo or {}))),
            "prompts_per_rollout": 8,
            "num_samples": 2,
            "row_tokens": 40,
            "batch_tokens": 160,
            "generator": torch.Generator().manual_seed(seed),
        }
        return PolicySource(trunk, **(given | changes))

    return make
