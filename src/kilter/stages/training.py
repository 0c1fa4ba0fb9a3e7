"""What the stages that train share: the encoder, the checks at the start, the loop, the log, the figures at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kilter.config import Lora as LoraConfig
from kilter.config import Optim, Precision, Recipe, SamplerConfig
from kilter.data.chat import ChatEncoder
from kilter.data.split import split_by_prompt
from kilter.errors import ConfigError, ModelError
from kilter.models.check import both_ways
from kilter.models.load import DTYPES, load_tokenizer
from kilter.models.quantized import library
from kilter.models.roles import Lora
from kilter.models.trunk import Trunk
from kilter.models.vllm_sampler import NO_VLLM, has_vllm
from kilter.models.vllm_server import Served
from kilter.records import Record
from kilter.stages.context import Context
from kilter.stages.spiked import spikes_of
from kilter.train.checkpoint import CheckpointStore, Stateful
from kilter.train.checks import (
    LOW_PRECISION_TOLERANCE,
    TOLERANCE,
    check_bos,
    check_end_scored,
    check_scored,
    require,
)
from kilter.train.loop import BatchSource, EarlyStop, TrainState, fit
from kilter.train.optimizer import make_optimizer, make_schedule
from kilter.train.sources import Conversion, GroupSource, Pool, Score, groups_of
from kilter.tree import Group, make_batches

SHOWN = {
    "loss": "loss",
    "rewards/accuracy": "accuracy",
    "rollout/score": "score",
    "rollout/kl_k1": "KL",
    "rollout/length": "length",
}


@dataclass(frozen=True)
class Equipment:
    """Tokenizer and encoder of the model that a stage trains."""

    folder: str
    tokenizer: Any
    encoder: ChatEncoder

    def template(self) -> Any:
        """The tokenizer to save with the result, with the template that was used."""
        self.tokenizer.chat_template = self.encoder.template
        return self.tokenizer


def equip(context: Context, value: str) -> Equipment:
    """Load the tokenizer of a model and say what is special about its template."""
    folder = context.model(value)
    tokenizer = load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer)
    for note in encoder.notes:
        context.watch.say(f"  {folder}: {note}")
    return Equipment(folder, tokenizer, encoder)


def lora_of(config: LoraConfig) -> Lora | None:
    """The adapter that a recipe asks for."""
    if not config.rank:
        return None
    targets: Any = config.targets if config.targets == "all-linear" else ("q_proj", "k_proj", "v_proj", "o_proj")
    return Lora(config.rank, config.alpha, targets)


def compute_dtype(precision: Precision) -> torch.dtype | None:
    """The type of the forward pass; None: that of the weights, as on a processor without bfloat16 instructions, which
    emulates them only for a base that is in bfloat16 itself."""
    emulated = precision.base == "float32" and not multiplies_in_bfloat16()
    return None if precision.compute == "float32" or emulated else DTYPES[precision.compute]


def multiplies_in_bfloat16() -> bool:
    """Whether this machine gains by bfloat16: a GPU, or a processor with instructions for it; others emulate it."""
    return torch.cuda.is_available() or processor_multiplies_in_bfloat16()


def processor_multiplies_in_bfloat16() -> bool:
    """Whether the processor has instructions for it."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def held_as(precision: Precision) -> dict[str, Any]:
    """How a trunk holds its models and in what it computes: options of `kilter.models.build`."""
    return {"compute_dtype": compute_dtype(precision), "base": precision.base, "device": precision.device}


def check_machine(recipe: Recipe) -> None:
    """Refuses a recipe that asks for what this machine does not have, before any work.

    Raises:
        ConfigError, ModelError: no CUDA device, no bitsandbytes, no vLLM, or no server of it; with the stage.
    """
    for name, stage in recipe.stages.items():
        precision = getattr(stage, "precision", Precision())
        if precision.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"stages.{name}.precision.device is cuda, and torch sees no CUDA device here; set it to cpu (with base "
                "float32 and attention auto), or run where there is one"
            )
        sampler = getattr(stage, "sampler", SamplerConfig())
        if sampler.url:
            try:
                Served(sampler.url)
            except ModelError as err:
                raise ModelError(f"stages.{name}.sampler.url: {err}") from err
        elif sampler.engine == "vllm" and not has_vllm():
            raise ModelError(f"stages.{name}.{NO_VLLM}")
        if precision.base == "nf4":
            try:
                library()
            except ModelError as err:
                raise ModelError(f"stages.{name}: {err}") from err


def tolerance(precision: Precision) -> float:
    """Nats by which two forwards of the same weights may differ."""
    return TOLERANCE if compute_dtype(precision) is None else LOW_PRECISION_TOLERANCE


def check_tokens(equipment: Equipment, groups: Sequence[Group], *, ends: bool = True) -> None:
    """The checks of the first batch: scored tokens, an end token among them, BOS once.

    Args:
        ends: False for pieces of documents, of which few have an end.
    """
    batches = make_batches(groups[:32], row_tokens=512, batch_tokens=8192, pad_id=equipment.encoder.pad_id)
    stops = equipment.encoder.stop_ids
    require(
        check_scored(batches),
        *([check_end_scored(batches, stops)] if ends else []),
        check_bos(batches, equipment.tokenizer.bos_token_id, stops),
    )


def check_trunk(context: Context, trunk: Trunk, role: str, groups: Sequence[Group], precision: Precision) -> float:
    """Puts the trunk where it is trained and compares it both ways, on made-up groups and the first real ones; returns
    the log-prob gap in nats."""
    trunk.to(precision.device)
    trunk.attention = precision.attention
    trunk.set_checkpointing(precision.gradient_checkpointing)
    report = both_ways(trunk, groups[:32], role)
    context.watch.say(f"  {report.line}")
    return report.found.gap


def source_of(
    context: Context,
    groups: Sequence[Group],
    optim: Optim,
    epochs: float,
    pad_id: int,
    *,
    weight: float = 1.0,
    more: Sequence[Pool] = (),
) -> GroupSource:
    """Shuffled steps from groups, and from other pools beside them, resumable in the middle of an epoch."""
    return GroupSource(
        groups,
        batch_groups=optim.batch_size,
        row_tokens=optim.row_tokens,
        batch_tokens=optim.batch_tokens,
        seed=context.seed("order"),
        epochs=epochs,
        pad_id=pad_id,
        weight=weight,
        more=more,
    )


def convert(
    context: Context,
    equipment: Equipment,
    records: Sequence[Record],
    optim: Optim,
    what: str,
    score: Score = "responses",
) -> Conversion:
    """Records as groups of tokens; what was dropped or cut is said."""
    found = groups_of(
        equipment.encoder,
        records,
        max_tokens=optim.max_tokens,
        over_long=optim.over_long,
        bos_id=equipment.tokenizer.bos_token_id,
        score=score,
    )
    context.watch.say(f"  {what}: {len(records)} records, {len(found.groups)} groups, {found.tally}")
    return found


class Read(NamedTuple):
    """A stage's records and their groups, those to train on and those kept for evaluation."""

    records: Sequence[Any]
    held_records: Sequence[Any]
    groups: list[Group]
    held: list[Group]
    places: list[int]
    """Which of `records` each group came from."""
    held_places: list[int]


def read_split(
    context: Context,
    equipment: Equipment,
    stage: Any,
    kind: str,
    score: Score = "responses",
    prepare: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
) -> Read:
    """Reads `stage.data`, `prepare`d as a whole, and sets `stage.held_out` of its prompts aside."""
    records = context.records("data", stage.data, kind)
    if prepare is not None:
        records = list(prepare(records))
    learned, held = split_by_prompt(records, held_out=stage.held_out, seed=context.seed("split"))
    made = convert(context, equipment, learned, stage.optim, "training", score)
    if not held:
        return Read(learned, held, made.groups, [], made.records, [])
    kept = convert(context, equipment, held, stage.optim, "held out", score)
    return Read(learned, held, made.groups, kept.groups, made.records, kept.records)


def train(
    context: Context,
    equipment: Equipment,
    trunk: Trunk,
    objective: Any,
    source: BatchSource,
    optim: Optim,
    steps: int,
    *,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    metric: str = "eval/loss",
    role_learning_rates: Mapping[str, float] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop: Callable[[int, dict[str, float]], bool] | None = None,
    also: Mapping[str, Stateful] | None = None,
) -> TrainState:
    """Run the loop with the stage's checkpoints, its metrics, spikes and progress; goes on where it was."""
    folder = context.folder
    optimizer = make_optimizer(
        trunk,
        objective.roles,
        learning_rate=optim.learning_rate,
        role_learning_rates=role_learning_rates,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
    )
    warmup = round(steps * optim.warmup)
    state = TrainState(trunk, optimizer, make_schedule(optim.schedule, steps=steps, warmup_steps=warmup))
    store = CheckpointStore(folder.checkpoints)
    before = store.latest_step() or 0
    folder.keep_rows_until(before)
    if before:
        context.watch.say(f"  goes on from step {before} of {steps}")
    context.watch.begin(context.name, steps, before)

    def log(step: int, figures: dict[str, float]) -> None:
        if on_step is not None:
            on_step(step, figures)
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        folder.log({"step": step, **finite})
        shown = {short: figures[name] for name, short in SHOWN.items() if name in figures}
        context.watch.step(step, shown, tokens=int(figures.get("tokens", 0)))

    return fit(
        state,
        objective,
        source,
        steps=steps,
        max_grad_norm=optim.max_grad_norm,
        checkpoints=store,
        checkpoint_every=optim.checkpoint_every,
        also=also,
        on_step=log,
        stop=stop,
        evaluate=evaluate,
        evaluate_every=optim.evaluate_every,
        early_stop=EarlyStop(metric, optim.early_stop) if optim.early_stop and evaluate is not None else None,
        failures=folder.path / "failures",
        spikes=spikes_of(context, equipment.tokenizer, optim),
    )
