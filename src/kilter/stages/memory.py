"""What a stage holds in the memory of its device, part by part, and what to change when that is too much.

Arithmetic from the models' configurations, nothing measured: the libraries, the kernels' own workspace and what the
allocator cannot use come on top, about 1 to 2 GiB on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kilter.config import OnlineStage, PreferStage, RewardStage, RlStage, SftStage
from kilter.report.needs import GIB, LORA_RANK, TRAINED_BYTES, Shape
from kilter.rollout.algorithms import ALGORITHMS
from kilter.stages.guard import PUTS_BACK
from kilter.stages.prefer import objective_of
from kilter.stages.scoring import is_model, models_in, rewards_in

Trains = SftStage | RewardStage | PreferStage | OnlineStage | RlStage
FLOAT32_BYTES = 4
FEW_TOKENS, FEW_ANSWERS = 2048, 16
"""What a step's rows and the answers at once are brought down to."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something that lies in memory, in bytes; `passing`: only while the policy samples or a step runs."""

    name: str
    size: float
    passing: bool = False


def device_gib(stage: Trains) -> float:
    """Memory of the device that a stage names, where it is here; otherwise of this machine."""
    if stage.precision.device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory) / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def parts(stage: Trains, shape: Shape, reward: Shape | None, available: float) -> list[Part]:
    """Everything that the stage holds.

    Args:
        shape: of the model that it trains.
        reward: of the reward model that pays or scores; None: there is none, or a rule.
        available: GiB of the device, of which vLLM takes a share.
    """
    lora, held = stage.lora.rank, stage.precision.base
    found: list[Part] = []
    copied = 0  # weights in float32, of which a step holds copies to compute with

    def add(name: str, of: Shape) -> None:
        """A model that trains, whole or as an adapter on a frozen one."""
        nonlocal copied
        copied += (of.adapter(lora) if lora else 0) + (of.parameters if held == "float32" else 0)
        if lora:
            kind = "4 bits" if held == "nf4" else held
            found.append(Part(f"{name}, frozen in {kind}", of.base_bytes(held)))
            found.append(Part(f"{name}: adapter, gradient, AdamW", TRAINED_BYTES * of.adapter(lora)))
        else:
            found.append(Part(f"{name}: weights, gradient, AdamW", TRAINED_BYTES * of.parameters))

    add("reward model" if isinstance(stage, RewardStage) else "policy", shape)
    if _has_reference(stage):
        found.append(Part("reference, frozen", shape.base_bytes("float32")))
        copied += shape.parameters
    if isinstance(stage, RlStage) and ALGORITHMS[stage.algorithm].critic and stage.policy.value_from != "shared":
        if reward is not None and stage.policy.value_from == "reward":
            add("value, from the reward model", reward)
        elif lora:
            found.append(Part("value: adapter on the policy's model", TRAINED_BYTES * shape.adapter(lora)))
            copied += shape.adapter(lora)
        else:
            add("value", shape)
    if reward is not None:
        found.append(Part("reward model that scores, frozen", reward.base_bytes("float32")))
    if more := further_models(stage):
        found.append(Part(f"further reward models, {more}, frozen", more * shape.base_bytes("float32")))
    if isinstance(stage, RlStage) and PUTS_BACK & {stage.guard.action, *stage.guard.actions.values()}:
        kept = shape.adapter(lora) if lora else shape.parameters
        found.append(Part("copy of the policy that the guard keeps", FLOAT32_BYTES * kept))
    if isinstance(stage, RlStage | OnlineStage) and stage.sampler.engine == "vllm" and not stage.sampler.url:
        found.append(_engine(stage, shape, available))
    if stage.precision.compute == "bfloat16":
        found.append(Part("copies in bfloat16, while it computes", 2 * copied, passing=True))
    return [*found, _widest(stage, shape)]


def _engine(stage: RlStage | OnlineStage, shape: Shape, available: float) -> Part:
    if stage.precision.device == "cuda":
        return Part(f"vLLM, sampler.memory {stage.sampler.memory:g} of the GPU", stage.sampler.memory * available * GIB)
    number = 2 if stage.sampler.dtype == "bfloat16" else FLOAT32_BYTES
    return Part("vLLM's own weights, beside its keys and values", number * shape.parameters)


def further_models(stage: Trains) -> int:
    """Reward models beside that which is the stage's `reward`; each counts as large as the policy."""
    named = [value for place, value, _ in rewards_in(stage) if place != "reward" or not is_model(value)]
    return sum(len(models_in(value)) for value in named)


def _has_reference(stage: Trains) -> bool:
    """Whether the reference is a model of its own, not the policy's without its adapter."""
    if isinstance(stage, RlStage):
        return not stage.lora.rank
    if isinstance(stage, SftStage | RewardStage) or not objective_of(stage).needs_reference:
        return False
    return not stage.lora.rank or bool(stage.reference)


def _widest(stage: Trains, shape: Shape) -> Part:
    """A step's activations, a rollout's keys and values, or the check at the start, whichever is most: they are not
    there at the same time."""
    number, optim = 2 if stage.precision.compute == "bfloat16" else FLOAT32_BYTES, stage.optim
    size = shape.activation_bytes(optim.batch_tokens, number, checkpointing=stage.precision.gradient_checkpointing)
    found = [Part(f"activations of {optim.batch_tokens} tokens, in a step", size, passing=True)]
    if stage.lora.rank and stage.precision.base == "float32":
        merged = "a copy with the adapter merged and its gradient, for the check at the start"
        found.append(Part(merged, 2 * FLOAT32_BYTES * shape.linear, passing=True))
    elif stage.lora.rank:
        tables = "copies of embeddings and head in float32, for the check at the start"
        found.append(Part(tables, FLOAT32_BYTES * (shape.parameters - shape.linear), passing=True))
    if isinstance(stage, RlStage | OnlineStage) and stage.sampler.engine == "native":
        found.append(_cache(stage, shape, number if stage.precision.device == "cuda" else FLOAT32_BYTES))
    return max(found, key=lambda part: part.size)


def _cache(stage: RlStage | OnlineStage, shape: Shape, number: int) -> Part:
    """Keys and values of the answers at once; a CPU holds them in float32, see `models.segments`."""
    answers, each = stage.sampling.batch_size, stage.samples if isinstance(stage, RlStage) else stage.num_samples
    longest = stage.sampling.max_new_tokens
    prompt = max(stage.optim.max_tokens - longest, 0)
    tokens = answers * longest + -(-answers // each) * prompt
    name = f"keys and values of {answers} answers at once, prompts of up to {prompt} tokens"
    return Part(name, shape.cache_bytes(tokens, number), passing=True)


def total(found: list[Part]) -> float:
    """GiB."""
    return sum(part.size for part in found) / GIB


Change = tuple[str, Callable[[Trains], Trains]]


def _set(stage: Trains, place: str, **values: object) -> Trains:
    part = getattr(stage, place)
    return stage.model_copy(update={place: part.model_copy(update=values)})


def _least(place: str, name: str, most: int) -> Callable[[Trains], Trains]:
    def change(stage: Trains) -> Trains:
        held = getattr(stage, place, None)
        return stage if held is None else _set(stage, place, **{name: min(most, getattr(held, name))})

    return change


def _in_bfloat16(stage: Trains) -> Trains:
    if not _takes_a_base(stage) or stage.precision.base != "float32":
        return stage
    return _set(stage, "precision", base="bfloat16", compute="bfloat16")


def _takes_a_base(stage: Trains) -> bool:
    """Adapters alone train, and not each with a head of its own."""
    return bool(stage.lora.rank) and not (isinstance(stage, RewardStage) and stage.heads.own_adapters)


def _in_4_bits(stage: Trains) -> Trains:
    if not _takes_a_base(stage):
        return stage
    return _set(stage, "precision", base="nf4", compute="bfloat16", device="cuda")


def _from_reward(stage: Trains) -> bool:
    return isinstance(stage, RlStage) and stage.policy.value_from == "reward"


CHANGES: tuple[Change, ...] = (
    (f"lora.rank {LORA_RANK}", lambda stage: stage if stage.lora.rank else _set(stage, "lora", rank=LORA_RANK)),
    ("precision.base bfloat16, with precision.compute bfloat16", _in_bfloat16),
    ("precision.base nf4, with precision.compute bfloat16 and precision.device cuda", _in_4_bits),
    (
        "policy.value_from policy: the value's adapter on the policy's model",
        lambda stage: _set(stage, "policy", value_from="policy") if _from_reward(stage) else stage,
    ),
    ("precision.gradient_checkpointing true", lambda stage: _set(stage, "precision", gradient_checkpointing=True)),
    (f"optim.batch_tokens {FEW_TOKENS}: shorter rows", _least("optim", "batch_tokens", FEW_TOKENS)),
    (f"sampling.batch_size {FEW_ANSWERS}: fewer answers at once", _least("sampling", "batch_size", FEW_ANSWERS)),
)
"""What saves memory, in the order in which it costs least."""


def remedies(stage: Trains, shape: Shape, reward: Shape | None, available: float) -> list[str]:
    """What to change, one after another until it fits, each with the GiB that it saves."""
    needed = total(parts(stage, shape, reward, available))
    lines = []
    for words, change in CHANGES * 2:  # what lies below a larger thing of another moment saves only once that is gone
        if needed <= available:
            break
        changed = change(stage)
        saved = needed - total(parts(changed, shape, reward, available))
        if saved > 0:
            stage, needed = changed, needed - saved
            lines.append(f"  {words}: {saved:.2f} GiB less, {needed:.2f} in all")
    if needed > available:
        smaller = " and reward model" if reward is not None else ""
        lines.append(f"  even so it does not fit: take a smaller model{smaller}, or a device with more memory")
    return lines
