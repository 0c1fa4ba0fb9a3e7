"""Tiny models and random groups for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from kilter.models.heads import ScalarHead
from kilter.models.roles import Role
from kilter.models.trunk import Trunk
from kilter.tree import Group, Response

VOCAB = 23


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_llama(seed: int = 0, *, scale: float = 10.0, vocab: int = VOCAB, hidden: int = 16, layers: int = 2) -> Any:
    """A Llama with weights scaled up, so that two seeds are two clearly different policies."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return model.train()


def full_trunk(seed: int = 0) -> Trunk:
    """Policy, a reference that differs from it, and a critic with heads for value, reward and length."""
    models = {name: tiny_llama(seed + number) for number, name in enumerate(("policy", "reference", "critic"))}
    models["reference"].requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    heads = {name: ScalarHead(16, std=0.3, generator=generator) for name in ("value", "reward", "length")}
    roles = {
        "policy": Role("policy"),
        "reference": Role("reference"),
        "value": Role("critic", head="value"),
        "reward": Role("critic", head="reward"),
        "length": Role("critic", head="length"),
    }
    return Trunk(models, roles, heads)


def random_groups(
    count: int, *, k: int = 2, seed: int = 0, extras: Callable[[int, torch.Generator], dict[str, Any]] | None = None
) -> list[Group]:
    """Groups of k responses of 2 to 6 tokens below prompts of 2 to 7, ranked in order with a tie now and then."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    groups = []
    for place in range(count):
        responses = []
        for rank in range(k):
            own = (*ids(number(1, 6)), 2)
            while any(
                own == other.ids for other in responses
            ):  # equal responses would be exact ties or not by rounding
                own = (*ids(number(1, 6)), 2)
            per_token = extras(len(own), generator) if extras else {}
            ranked = 0 if place % 5 == 4 else rank
            responses.append(Response(own, per_token=per_token, per_response={"rank": float(ranked), "margin": 0.0}))
        groups.append(Group((1, *ids(number(1, 7))), tuple(responses)))
    return groups


def ppo_extras(length: int, generator: torch.Generator) -> dict[str, Any]:
    """What PPO's objective reads, random: log-probs about those of a small vocabulary."""
    return {
        "old_logprobs": -3 + 0.3 * torch.randn(length, generator=generator),
        "old_values": torch.randn(length, generator=generator),
        "advantages": torch.randn(length, generator=generator),
        "returns": torch.randn(length, generator=generator),
    }


@pytest.fixture
def make() -> Any:
    """The helpers of this file, for tests that want more than one of what they make."""

    class Make:
        llama = staticmethod(tiny_llama)
        trunk = staticmethod(full_trunk)
        groups = staticmethod(random_groups)
        ppo_extras = staticmethod(ppo_extras)
        vocab = VOCAB

    return Make
