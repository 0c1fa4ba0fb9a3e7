"""`--dry-run`: the resolved recipe, the memory each stage needs, and its first batch token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kilter.config import PreferStage, Recipe, RewardStage, RlStage, SftStage, Stage, dump
from kilter.errors import KilterError
from kilter.models.load import load_config, load_tokenizer
from kilter.report.needs import GIB, Shape, memory
from kilter.rundir import RunDir
from kilter.stages.context import Context
from kilter.stages.progress import Watch
from kilter.stages.supervised import first_groups, objective_of
from kilter.tree import Group

SHOWN_TOKENS = 120


def plan(recipe: Recipe) -> str:
    """The text of a dry run. Nothing is written and nothing trained."""
    parts = ["# the resolved recipe", dump(recipe).rstrip()]
    with Watch() as watch:
        for name, stage in recipe.stages.items():
            context = Context(recipe, RunDir(Path("unused")), name, watch)
            parts += ["", f"# stage {name} ({stage.stage})", *_stage(context)]
    return "\n".join(parts)


def _stage(context: Context) -> list[str]:
    stage = context.stage
    if not isinstance(stage, SftStage | RewardStage | PreferStage | RlStage):
        return ["trains nothing"]
    if stage.model in context.recipe.stages:
        return [f"starts from stage {stage.model!r}, which has not run: its memory is that of the stage's model"]
    folder = context.model(stage.model)
    return [*_memory(stage, load_config(folder)), *_first_batch(context, folder)]


def _memory(stage: Stage, config: Any) -> list[str]:
    """GiB of weights in three ways of holding the roles; formulas in `kilter.report.needs`."""
    shape = shape_of(config)
    four, two, one = memory(shape)
    lines = [
        f"memory of weights, gradients and AdamW, {shape.parameters / 1e6:,.1f} million parameters:",
        f"  as four full models    {four:8.3f} GiB",
        f"  as two full models     {two:8.3f} GiB",
        f"  as roles on one trunk  {one:8.3f} GiB   (LoRA rank 16)",
        f"  beside them, for activations or the cache of a rollout, about {shape.working_bytes / GIB:.3f} GiB",
    ]
    return [*lines, f"resident in this stage: {_resident(stage)}"]


def _resident(stage: Stage) -> str:
    """The models that a stage holds; of a preference loss, as many as it asks for."""
    if isinstance(stage, RlStage):
        return "four models: policy, reference, value, reward (one trunk with LoRA)"
    if isinstance(stage, RewardStage):
        return "one model: the reward model"
    if isinstance(stage, SftStage) or not (isinstance(stage, PreferStage) and objective_of(stage).needs_reference):
        return "one model: the policy"
    if stage.lora.rank and not stage.reference:
        return "one trunk: the policy's adapter on the reference"
    return "two models: policy and reference"


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
        groups = first_groups(context, folder)
    except KilterError as err:
        return [f"no first batch: {err}"]
    tokenizer = load_tokenizer(folder)
    lines = ["the first batch, token by token; [brackets] are scored:"]
    for group in groups:
        lines += _shown(tokenizer, group)
    return lines


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
