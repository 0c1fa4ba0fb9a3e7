"""Tiny random models of each family that Kilter claims, and the untouched answer to compare with.

Weights are scaled up so that attention is sharp and a wrong mask, window, cap or scale cannot hide; heads are grouped;
the window is shorter than a row; every softcap, logits scaling and logit scale that a family knows is set.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from kilter.models.attention import has_attention_softcap
from kilter.models.load import remove_dropout
from kilter.tree import Batch, Group, Response, scored

VOCAB, WINDOW = 61, 7
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = COMMON | {"num_key_value_heads": 2, "intermediate_size": 48}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_jitter_noise": 0.1}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED}),
    "qwen3": (
        "Qwen3Config",
        GROUPED | {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3Config", GROUPED | {"sliding_window": WINDOW, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": (
        "SmolLM3Config",
        GROUPED
        | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED, "no_rope_layers": [1, 0]},
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
        | {"eos_token_id": 2, "pad_token_id": 0},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        COMMON | {"intermediate_size": 48, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    ),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "layerdrop": 0.1}),
    "granite": (
        "GraniteConfig",
        GROUPED
        | {"logits_scaling": 0.3, "residual_multiplier": 0.7, "attention_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.3, "use_qk_norm": True}),
    "mixtral": ("MixtralConfig", GROUPED | EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GROUPED
        | EXPERTS
        | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "use_sliding_window": True}
        | {"sliding_window": WINDOW, "mlp_only_layers": [0]},
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
    ),
}
PACKED = [name for name in CONFIGS if name not in ("bloom", "mamba")]
UNROLLED = ["bloom", "mamba"]
SEGMENTED = [name for name in PACKED if name != "gemma2"]  # which caps its scores: eager
SCALES = {"opt": 0.7, "mamba": 1.0}  # above, their own float32 noise against float64 passes the bound of the tests


def config_of(family: str) -> Any:
    name, options = CONFIGS[family]
    return getattr(transformers, name)(**options)


def untouched_model(family: str, *, seed: int = 0, scale: float | None = None, **changes: Any) -> Any:
    """The family's causal model in its own default attention (eager where scores are capped), in eval mode."""
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    attention = "eager" if has_attention_softcap(config) else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # Mamba draws some of its biases
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(
                    std=(scale or SCALES.get(family, 1.5)) / parameter.shape[-1] ** 0.5, generator=generator
                )
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def some_groups(num_groups: int = 16, *, seed: int = 0) -> list[Group]:
    """Groups of one to three responses, most longer than the window; some scored in spans, as several turns are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    groups = []
    for i in range(num_groups):
        responses = []
        for _ in range(1 + i % 3):
            length = draw(3, 9)
            spans = ((0, 2), (length - 1, length)) if i % 4 == 3 else None
            responses.append(Response(ids(length), spans))
        groups.append(Group(ids(draw(1, 8)), tuple(responses)))
    return groups


def mixed(groups: list[Group], *, seed: int = 1) -> list[Group]:
    """The groups with a random weight on every scored token, so that no mistake can cancel in the sum."""
    generator = torch.Generator().manual_seed(seed)

    def with_mix(response: Response) -> Response:
        return replace(response, per_token={"mix": torch.randn(scored(response), generator=generator)})

    return [replace(group, responses=tuple(map(with_mix, group.responses))) for group in groups]


def untouched_logprobs(model: Any, groups: list[Group]) -> list[Tensor]:
    """Log-probs of the scored tokens, one tensor per response, each from its own forward of the untouched model."""
    found = []
    for group in groups:
        for response in group.responses:
            row = torch.tensor([group.prompt + response.ids])
            logprobs = model(input_ids=row).logits[0, :-1].float().log_softmax(-1)
            logprobs = logprobs.gather(1, row[0, 1:, None])[:, 0][len(group.prompt) - 1 :]
            spans = response.spans or ((0, len(response.ids)),)
            found.append(torch.cat([logprobs[start:end] for start, end in spans]))
    return found


@functools.cache
def expected(family: str) -> tuple[list[Group], dict[str, Tensor], dict[str, Tensor]]:
    """Sixteen groups, and of the untouched model: its weights and its gradient of the sum of mixed log-probs."""
    model = untouched_model(family)
    groups = mixed(some_groups())
    logprobs = untouched_logprobs(model, groups)
    mixes = [response.per_token["mix"] for group in groups for response in group.responses]
    torch.stack([(mix * row).sum() for mix, row in zip(mixes, logprobs, strict=True)]).sum().backward()
    return groups, copy.deepcopy(model.state_dict()), gradients(model)


def trained_model(family: str) -> Any:
    """The family's model as Kilter holds it for training: the weights of `expected`, dropout removed, training mode."""
    config = config_of(family)
    remove_dropout(config)
    attention = "eager" if has_attention_softcap(config) else None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.load_state_dict(expected(family)[1])
    return model.train()


def attending(trunk: Any, way: str) -> Any:
    """The trunk with every tree attended to in one way, whatever its width: dense or segments."""
    trunk.dense_up_to = 0 if way == "segments" else 10**9
    return trunk


def mixed_loss(trunk: Any, batch: Batch) -> Tensor:
    """The sum of the policy's mixed log-probs."""
    return (trunk(batch.tree, {"policy": "logprobs"})["policy"] * batch.extras["mix"]).sum()


def gradient_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest `|delta_p| / max(|g_p|, 1e-3 |g|)` over the parameters, and where it is."""
    assert ours.keys() == theirs.keys()
    whole = sum(float(grad.double().square().sum()) for grad in theirs.values()) ** 0.5
    worst, where = 0.0, ""
    for name, their_grad in theirs.items():
        delta = float((ours[name].double() - their_grad.double()).norm())
        gap = delta / max(float(their_grad.double().norm()), 1e-3 * whole)
        if not gap <= worst:
            worst, where = gap, name
    return worst, where


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients by name; zeros where there is none."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
