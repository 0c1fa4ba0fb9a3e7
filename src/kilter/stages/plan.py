"""`--dry-run`: the resolved recipe, the memory each stage needs, and its first batch token by token."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kilter.config import OnlineStage, PreferStage, Recipe, RewardStage, RlStage, SftStage, dump
from kilter.errors import KilterError
from kilter.models.load import load_config, load_tokenizer
from kilter.report.needs import GIB, Shape, memory
from kilter.rollout.algorithms import ALGORITHMS
from kilter.rundir import RunDir
from kilter.stages import rewards
from kilter.stages.context import Context
from kilter.stages.memory import Trains, device_gib, further_models, parts, remedies, total
from kilter.stages.prefer import objective_of, record_kind
from kilter.stages.progress import Watch
from kilter.stages.scoring import is_model
from kilter.stages.training import convert, equip
from kilter.tree import Group

SHOWN_TOKENS = 120


def plan(recipe: Recipe, memory_gib: float | None = None) -> str:
    """The text of a dry run. Nothing is left behind and nothing trained.

    Args:
        memory_gib: of the device to plan for; None: of the stage's, or of this machine.
    """
    parts = ["# the resolved recipe", dump(recipe).rstrip()]
    with Watch() as watch, TemporaryDirectory() as folder:  # bad rows are set aside into it, and go with it
        for name, stage in recipe.stages.items():
            context = Context(recipe, RunDir(Path(folder)), name, watch)
            parts += ["", f"# stage {name} ({stage.stage})", *_stage(context, memory_gib)]
    return "\n".join(parts)


def _stage(context: Context, memory_gib: float | None) -> list[str]:
    stage = context.stage
    if not isinstance(stage, Trains):
        return ["trains nothing"]
    if stage.model in context.recipe.stages:
        return [f"starts from stage {stage.model!r}, which has not run: its memory is that of the stage's model"]
    folder = context.model(stage.model)
    shape = shape_of(load_config(folder))
    return [*_memory(shape), *_fit(context, stage, shape, memory_gib), *_first_batch(context, folder)]


def _memory(shape: Shape) -> list[str]:
    """GiB of weights in three ways of holding the roles; formulas in `kilter.report.needs`."""
    four, two, one = memory(shape)
    return [
        f"memory of weights, gradients and AdamW, {shape.parameters / 1e6:,.1f} million parameters:",
        f"  as four full models    {four:8.3f} GiB",
        f"  as two full models     {two:8.3f} GiB",
        f"  as roles on one trunk  {one:8.3f} GiB   (LoRA rank 16)",
        f"  beside them, for activations or the cache of a rollout, about {shape.working_bytes / GIB:.3f} GiB",
    ]


def _fit(context: Context, stage: Trains, shape: Shape, memory_gib: float | None) -> list[str]:
    """Every part of what the stage holds, and what to change where that is more than the device has."""
    reward, note = _reward_shape(context, stage, shape)
    available = memory_gib or device_gib(stage)
    found = parts(stage, shape, reward, available)
    needed = total(found)
    standing = total([part for part in found if not part.passing])
    more = further_models(stage)
    beside = f"; {more} further reward model{'s' * (more > 1)}, as large as the policy" if more else ""
    lines = [f"resident in this stage: {_resident(stage)}{beside}: {standing:.3f} GiB{note}"]
    lines += [f"  {part.size / GIB:8.3f} GiB  {part.name}" for part in found]
    lines += [f"  {needed:8.3f} GiB  in all, beside the libraries"]
    if needed <= available:
        return [*lines, f"it fits into {available:.1f} GiB"]
    return [
        *lines,
        f"it does not fit into {available:.1f} GiB; change, in this order, until it does:",
        *remedies(stage, shape, reward, available),
    ]


def _reward_shape(context: Context, stage: Trains, shape: Shape) -> tuple[Shape | None, str]:
    """Of the reward model, where one pays, and what has to be said of that."""
    if not isinstance(stage, RlStage | OnlineStage) or not is_model(stage.reward):
        return None, ""
    if stage.reward not in context.recipe.stages:
        with contextlib.suppress(KilterError):
            return shape_of(load_config(context.model(stage.reward))), ""
    return shape, "; the reward model is not there to be looked at and is taken to be as large as the policy"


def _resident(stage: Trains) -> str:
    """The models that a stage holds, in words; of a preference loss, as many as it asks for."""
    lora = bool(stage.lora.rank)
    if isinstance(stage, RlStage):
        return _roles(stage)
    if isinstance(stage, RewardStage):
        return "one model: the reward model"
    scorer = isinstance(stage, OnlineStage)
    beside = ", and the reward model" if scorer else ""
    if isinstance(stage, SftStage) or not objective_of(stage).needs_reference:
        return f"one model: the policy{beside}"
    if lora and not stage.reference:
        return f"one trunk: the policy's adapter on the reference{beside}"
    return f"two models: policy and reference{beside}"


def _roles(stage: RlStage) -> str:
    """The models of a policy gradient, those that several roles stand on first."""
    lora, start = bool(stage.lora.rank), stage.policy.value_from
    on_one, apart = ["policy"], list[str]()
    (on_one if lora else apart).append("reference")
    if ALGORITHMS[stage.algorithm].critic:
        from_policy = start == "policy" or not is_model(stage.reward)
        (on_one if start == "shared" or (lora and from_policy) else apart).append("value")
    first = f"{', '.join(on_one[:-1])} and {on_one[-1]} on one" if len(on_one) > 1 else "policy"
    models = [first, *apart, *["reward"] * is_model(stage.reward)]
    return f"{('', 'one', 'two', 'three', 'four')[len(models)]} model{'s' * (len(models) > 1)}: {', '.join(models)}"


def shape_of(config: Any) -> Shape:
    """The dimensions of a decoder from its configuration, whatever names its family gives them."""
    heads = config.num_attention_heads
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    return Shape(
        name=config.model_type,
        layers=config.num_hidden_layers,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


def _first_batch(context: Context, folder: str) -> list[str]:
    try:
        groups = _first_groups(context, folder)
    except KilterError as err:
        return [f"no first batch: {err}"]
    tokenizer = load_tokenizer(folder)
    lines = ["the first batch, token by token; [brackets] are scored:"]
    for group in groups:
        lines += _shown(tokenizer, group)
    return lines


def _first_groups(context: Context, folder: str) -> list[Group]:
    """The first groups that a stage would train on; of one that samples, the prompts it would answer."""
    stage = context.stage
    equipment = equip(context, folder)
    if isinstance(stage, RlStage | OnlineStage):
        prompts = context.records("prompts", stage.prompts, "prompt")[:2]
        return [Group(equipment.encoder.prompt(prompt.prompt), ()) for prompt in prompts]
    assert isinstance(stage, SftStage | RewardStage | PreferStage)
    if isinstance(stage, SftStage):
        records = context.records("data", stage.data, stage.data.kind)
        return convert(context, equipment, records[:2], stage.optim, "first batch", stage.data.score).groups
    kind = record_kind(stage) if isinstance(stage, PreferStage) else rewards.record_kind(stage)
    records = context.records("data", stage.data, kind)
    return convert(context, equipment, records[:2], stage.optim, "first batch").groups


def _shown(tokenizer: Any, group: Group) -> list[str]:
    def text(ids: tuple[int, ...]) -> list[str]:
        return [repr(tokenizer.decode([token]))[1:-1] for token in ids]

    lines = ["  prompt    " + "|".join(text(group.prompt)[-SHOWN_TOKENS:])]
    for response in group.responses:
        spans = response.spans or ((0, len(response.ids)),)
        scored = {place for start, end in spans for place in range(start, end)}
        words = [f"[{word}]" if at in scored else word for at, word in enumerate(text(response.ids))]
        lines.append("  response  " + "".join(words[:SHOWN_TOKENS]) + (" ..." if len(words) > SHOWN_TOKENS else ""))
    return lines
