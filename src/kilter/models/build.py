"""Builds the trunks that the stages train: a policy, a reward model, and PPO's three roles, whole or as adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from kilter.errors import ModelError
from kilter.models.adapters import load_adapter, trained_on
from kilter.models.heads import ScalarHead
from kilter.models.load import load_classifier, load_config, load_model, origin_config, read_tensor, weights_hash
from kilter.models.quantized import Base, cast_base
from kilter.models.reward_heads import REWARD, heads_of
from kilter.models.roles import Lora, Role, add_adapter, base_parameters, linear_layers
from kilter.models.save import sequence_classifier
from kilter.models.trunk import Trunk, hidden_size

Source = Any
"""A loaded Hugging Face model, or the folder or hub name of one."""


def policy_trunk(
    model: Source,
    *,
    reference: bool = False,
    lora: Lora | None = None,
    generator: torch.Generator | None = None,
    compute_dtype: torch.dtype | None = None,
    base: Base = "float32",
    device: str = "cpu",
) -> Trunk:
    """One trainable model as `policy`.

    Args:
        reference: also hold the model as it is now, frozen, as `reference`: a copy, or with `lora` the same model with
            its adapter off, which costs nothing and is always there.
        lora: train an adapter on the frozen model.
        generator: draws the adapter's first values; needed with `lora`.
        base: with `lora`, how the frozen model is held: "bfloat16", or "nf4" in 4 bits (`quantized`); a model that is
            loaded already is changed in place.
        device: where its weights in 4 bits are made; all else stays where it is.
    Raises:
        ModelError: a `base` in fewer bits without `lora`: weights are trained in float32.
    """
    model = _loaded(model, base, device, lora)
    if lora is not None:
        _freeze_with_adapter(model, "policy", lora, generator)
        roles = {"policy": Role("policy", "policy"), "reference": Role("policy")}
        return Trunk({"policy": model}, roles, compute_dtype=compute_dtype)
    models, roles = {"policy": model}, {"policy": Role("policy")}
    if reference:
        models["reference"] = copy.deepcopy(model).requires_grad_(False)
        roles["reference"] = Role("reference")
    return Trunk(models, roles, compute_dtype=compute_dtype)


def reward_trunk(
    model: Source,
    *,
    generator: torch.Generator,
    head_std: float | None = None,
    lora: Lora | None = None,
    heads: Sequence[str] = ("reward",),
    own_adapters: bool = False,
    compute_dtype: torch.dtype | None = None,
    base: Base = "float32",
    device: str = "cpu",
) -> Trunk:
    """A reward model from a language model: its decoder and new scalar heads, a role each.

    Args:
        generator: draws the heads' first values (and the adapters').
        head_std: their standard deviation; None: `1 / sqrt(hidden size + 1)` (Stiennon et al. 2020, arXiv 2009.01325);
            0: every reward starts at 0.
        lora: train an adapter (and the heads) on the frozen model, which is then kept whole so that roles can share it.
        heads: the roles' names; the heads have the same.
        own_adapters: with `lora`, an adapter for each head instead of one for all.
        base, device: see `policy_trunk`.
    Raises:
        ModelError: the result could not be saved, because transformers has no sequence classifier of this kind.
    """
    model = _loaded(model, base, device, lora)
    sequence_classifier(model.config)
    width = hidden_size(model)
    std = (width + 1) ** -0.5 if head_std is None else head_std
    made = {name: ScalarHead(width, std=std, generator=generator) for name in heads}
    roles = {name: Role("reward", None, name) for name in heads}
    if lora is not None:
        roles = {name: Role("reward", name if own_adapters else "reward", name) for name in heads}
        for adapter in dict.fromkeys(str(role.adapter) for role in roles.values()):
            _freeze_with_adapter(model, adapter, lora, generator)
    held = without_head(model) if lora is None else model
    return Trunk({"reward": held}, roles, made, compute_dtype=compute_dtype)


def load_reward_model(folder: str | Path, *, compute_dtype: torch.dtype | None = None, dtype: str = "float32") -> Trunk:
    """A reward model from a folder or hub name of an `AutoModelForSequenceClassification` with one label, also foreign.

    One that Kilter saved with several heads has as many labels, and the roles of `heads_of`. Of one whose heads have
    adapters of their own, it is the average.

    Args:
        dtype: of its weights; its heads stay in float32.
    Raises:
        ModelError: it has another number of labels, or is not a decoder with one linear `score` without bias.
    """
    config = load_config(folder)
    said = heads_of(folder)
    names = (REWARD,) if said.base else said.roles
    if config.num_labels != len(names):
        raise ModelError(f"{folder}: has {config.num_labels} labels; a reward model has one")
    model = load_classifier(folder, dtype=dtype)
    score: Any = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or getattr(score, "bias", None) is not None or model.base_model is model:
        raise ModelError(
            f"{folder}: {type(model).__name__} does not end with one linear layer `score` without bias; "
            "Kilter reads reward models that are decoders, such as LlamaForSequenceClassification"
        )
    heads = {name: ScalarHead(score.in_features) for name in names}
    weight = score.weight if dtype == "float32" else read_tensor(folder, "score.weight")
    with torch.no_grad():
        for row, head in zip(weight, heads.values(), strict=True):
            head.weight.copy_(row[None])
    roles = {name: Role("reward", None, name) for name in names}
    return Trunk({"reward": without_head(model)}, roles, heads, compute_dtype=compute_dtype)


def ppo_trunk(
    policy: Source,
    reward: str | Path | None,
    *,
    lora: Lora | None = None,
    value: Literal["own", "policy"] = "own",
    generator: torch.Generator | None = None,
    compute_dtype: torch.dtype | None = None,
    base: Base = "float32",
    device: str = "cpu",
) -> Trunk:
    """PPO's roles: `policy`, `reference` (the policy as it is now, frozen) and `value` (from the reward model).

    Whole copies without `lora`. With it, policy and reference are one model with an adapter on and off; the value is a
    second adapter on it where the reward model was an adapter on the same trunk (its folder says so by hash), and
    otherwise an adapter on the reward model.

    Args:
        reward: the reward model's folder: its decoder and head start the value. None: the value starts as the policy
            with a head of zeros.
        value: "own": as above; "policy": only a head, of zeros, on the policy's own hidden states.
        base, device: see `policy_trunk`; also of the reward model below a value's adapter.
    """
    held: dict[str, Any] = {"base": base, "device": device, "compute_dtype": compute_dtype}
    trunk = policy_trunk(policy, reference=True, lora=lora, generator=generator, **held)
    model: Any = trunk.models["policy"]
    adapter = None if lora is None else "value"
    if value == "policy":
        role, head = Role("policy", trunk.roles["policy"].adapter, "value"), ScalarHead(hidden_size(model))
    elif reward is None:
        head = ScalarHead(hidden_size(model))
        if lora is None:
            role = Role("value", None, "value")
            trunk.add_model("value", copy.deepcopy(without_head(model)))
        else:
            role = Role("policy", "value", "value")
            _freeze_with_adapter(model, "value", lora, generator)
    elif lora is not None and trained_on(Path(reward) / "adapter") == weights_hash(model):
        load_adapter(trunk, "value", Path(reward) / "adapter", model="policy")
        return trunk
    else:
        role = Role("value", adapter, "value")
        scorer = load_reward_model(reward, dtype=_dtype_of(base))
        backbone: Any = scorer.models["reward"]
        if lora is not None:
            cast_base(backbone, base, linear_layers(backbone), device)
            _freeze_with_adapter(backbone, "value", lora, generator)
        trunk.add_model("value", backbone)
        head = mean_head(scorer)
    trunk.add_role("value", role, head)
    return trunk


def mean_head(trunk: Trunk) -> ScalarHead:
    """A head that says the mean of what all heads of a reward model say."""
    head, *others = (cast(ScalarHead, head) for head in trunk.heads.values())
    if others:
        with torch.no_grad():
            head.weight.copy_(torch.stack([head.weight, *(other.weight for other in others)]).mean(0))
    return head


def without_head(model: Any) -> Any:
    """The decoder of a model, which remembers the configuration that the model was published with."""
    bare = model.base_model
    bare.kilter_origin = origin_config(model)
    return bare


def _loaded(model: Source, base: Base, device: str, lora: Lora | None) -> Any:
    if base != "float32" and lora is None:
        raise ModelError(f"base is {base} and there is no lora; weights are trained in float32: train an adapter")
    found = load_model(model, dtype=_dtype_of(base)) if isinstance(model, str | Path) else model
    return cast_base(found, base, linear_layers(found), device)


def _dtype_of(base: Base) -> str:
    """What a model is loaded in: also what is no weight, as Gemma's scale of embeddings, is then rounded as it is by
    transformers."""
    return "float32" if base == "float32" else "bfloat16"


def _freeze_with_adapter(model: Any, name: str, lora: Lora, generator: torch.Generator | None) -> None:
    """Freezes the model's own parameters and puts a trainable adapter on it."""
    assert generator is not None, "an adapter's first values are drawn from the caller's generator"
    for parameter in base_parameters(model):
        parameter.requires_grad_(False)
    add_adapter(model, name, lora, generator)
