"""Preference optimisation as stages: from records, and online from the policy's own answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from kilter.config import NO_REFERENCE, CollectStage, OnlineStage, PreferStage, Recipe, RewardStage
from kilter.data.convert import can_convert
from kilter.errors import ConfigError
from kilter.losses import unusual
from kilter.models.build import policy_trunk
from kilter.models.load import load_model, load_tokenizer
from kilter.models.roles import Role, add_adapter
from kilter.models.sampling import Sampling
from kilter.models.save import save_causal_lm
from kilter.models.trunk import Trunk
from kilter.records import Prompt
from kilter.rollout.pairs import PairSource
from kilter.stages.audit import check_audit
from kilter.stages.context import Context
from kilter.stages.heaviest import write_heaviest
from kilter.stages.probe import run_probe
from kilter.stages.reinforce import check_reward, prompt_groups
from kilter.stages.rewards import record_kind as reward_kind
from kilter.stages.samplers import sampler_of
from kilter.stages.scoring import reward_of, scorer_of
from kilter.stages.snapshots import Snapshots, snapshot_places
from kilter.stages.supervised import Figures, evaluation, held_out_figures
from kilter.stages.training import (
    Equipment,
    check_tokens,
    check_trunk,
    compute_dtype,
    equip,
    held_as,
    lora_of,
    read_split,
    source_of,
    tolerance,
    train,
)
from kilter.train.checks import check_policy_is_reference, require
from kilter.train.live import LiveReference, ReferenceSync, with_live_reference
from kilter.train.loop import measure
from kilter.train.preferences import Comparison, Term, Thumbs, mixture
from kilter.train.reference import Cache, default_folder, with_reference
from kilter.train.sources import with_mismatched
from kilter.tree import Group, make_batches


def check_losses(recipe: Recipe) -> list[str]:
    """Refuses a recipe whose losses nobody has, before any work; returns a line for each value outside its usual range.

    Raises:
        ConfigError: no such loss or option, a value out of its range, losses over different kinds of data, or over
            another kind than an earlier stage collects or an online stage makes; no reference that could follow.
    """
    lines = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, PreferStage | OnlineStage):
            try:
                _check_loss(recipe, stage)
            except ConfigError as err:
                raise ConfigError(f"stages.{name}: {err}") from err
            found = [line for loss in (stage.loss, *stage.mix) for line in unusual(loss.name, loss.options)]
            lines += [f"stages.{name}: {line}" for line in found]
        elif isinstance(stage, RewardStage):
            try:
                _check_source(recipe, stage, reward_kind(stage))
            except ConfigError as err:
                raise ConfigError(f"stages.{name}: {err}") from err
            lines += [f"stages.{name}: {line}" for line in unusual(stage.loss.name, stage.loss.options)]
    return lines


def _check_loss(recipe: Recipe, stage: PreferStage | OnlineStage) -> None:
    objective = objective_of(stage)
    if stage.sync_every and not objective.needs_reference:
        raise ConfigError(f"sync_every is {stage.sync_every} and {stage.loss.name!r} has no reference; set it to 0")
    if isinstance(stage, OnlineStage):
        if isinstance(objective, Thumbs):
            raise ConfigError(f"loss.name is {stage.loss.name!r}, over thumbs; an online stage makes comparisons")
        return
    _check_source(recipe, stage, record_kind(stage))


READS = {"ranking": "comparisons", "feedback": "thumbs", "rating": "ratings"}
COLLECTS = {"ranking": "ranking", "thumbs": "feedback", "ratings": "rating"}
"""What a collect stage asks for -> the kind of records it leaves."""


def _check_source(recipe: Recipe, stage: PreferStage | RewardStage, kind: str) -> None:
    """Refuses data that an earlier stage collects in another form than the loss reads."""
    source = recipe.stages.get(stage.data.path)
    if not isinstance(source, CollectStage) or can_convert(COLLECTS[source.ask], kind):
        return
    wanted = next(ask for ask, found in COLLECTS.items() if found == kind)
    raise ConfigError(
        f"data is {stage.data.path!r}, which collects {source.ask}, and {stage.loss.name!r} reads {READS[kind]}; set "
        f"stages.{stage.data.path}.ask to {wanted}, or loss.name to one that reads {READS[COLLECTS[source.ask]]}"
    )


def objective_of(stage: PreferStage | OnlineStage) -> Comparison | Thumbs:
    """The objective that a stage asks for."""
    terms = [Term(loss.name, loss.options, loss.weight) for loss in (stage.loss, *stage.mix)]
    return mixture(terms, reference_free=stage.reference == NO_REFERENCE)


def record_kind(stage: PreferStage) -> str:
    """The kind of records that a stage learns from."""
    return "feedback" if isinstance(objective_of(stage), Thumbs) else "ranking"


def run_prefer(context: Context, stage: PreferStage) -> Figures:
    """Any preference loss or a mixture of them; the policy as it starts is the reference, unless another is named."""
    objective = objective_of(stage)
    equipment = equip(context, stage.model)
    pad_id = equipment.encoder.pad_id
    read = read_split(context, equipment, stage, record_kind(stage))
    learned, held = read.groups, read.held
    if isinstance(objective, Thumbs) and objective.needs_mismatched:
        learned = with_mismatched(learned, seed=context.seed("mismatched"))
        held = with_mismatched(held, seed=context.seed("mismatched")) if held else held
    trunk, sync = _trunk(context, stage, objective, equipment)
    check_tokens(equipment, learned)
    gap = check_trunk(context, trunk, "policy", learned, stage.precision)
    if objective.needs_reference and sync is None:
        cache = Cache.of(default_folder(), trunk) if stage.reference_cache else None
        learned = _with_reference(context, trunk, learned, cache, pad_id)
        held = _with_reference(context, trunk, held, cache, pad_id) if held else held
    if objective.needs_reference and not stage.reference and isinstance(objective, Comparison):
        first = make_batches(learned[:32], row_tokens=512, batch_tokens=8192, pad_id=pad_id)
        first = first if sync is None else with_live_reference(trunk, first)
        require(*check_policy_is_reference(trunk, first, tolerance=tolerance(stage.precision)))
    source = source_of(context, learned, stage.optim, stage.epochs, pad_id)
    evaluate = evaluation(objective, held, stage.optim, pad_id)
    if sync is not None and held:
        evaluate = _live_evaluation(objective, held, stage, pad_id)
    snapshots = Snapshots(context, trunk, equipment, snapshot_places(source.num_steps, stage.snapshots))
    train(
        context,
        equipment,
        trunk,
        objective,
        source if sync is None else LiveReference(source, trunk),
        stage.optim,
        source.num_steps,
        evaluate=evaluate,
        on_step=_after_step(snapshots, sync),
        also={} if sync is None else {"reference": sync},
    )
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    found = {"both_ways_gap": gap, "steps": source.num_steps, **held_out_figures(evaluate, trunk)}
    if isinstance(objective, Comparison) and stage.heaviest and sync is None:
        found |= write_heaviest(context, trunk, objective, learned, stage, equipment)
    prompts = [Prompt(prompt=record.prompt) for record in read.held_records or read.records]
    return found | run_probe(context, trunk, equipment, stage, prompts)


def run_online(context: Context, stage: OnlineStage) -> Figures:
    """Rounds of sampling, scoring, pairing and updating; the policy as it starts is the reference."""
    objective = objective_of(stage)
    equipment = equip(context, stage.model)
    prompts: list[Prompt] = context.records("prompts", stage.prompts, "prompt")
    reward = reward_of(context, stage.reward)
    audited = check_audit(context, stage, reward)
    scorer = scorer_of(
        reward, combine=stage.combine, dtype=compute_dtype(stage.precision), device=stage.precision.device
    )
    trunk, sync = _trunk(context, stage, objective, equipment)
    accuracy = check_reward(context, stage, scorer, prompts)
    gap = check_trunk(context, trunk, "policy", prompt_groups(equipment, prompts), stage.precision)
    source = PairSource(
        trunk,
        equipment.encoder,
        prompts,
        scorer,
        sampler=sampler_of(stage, trunk, equipment),
        sampling=Sampling.of(stage.sampling),
        prompts_per_rollout=stage.prompts_per_round,
        num_samples=stage.num_samples,
        epochs=stage.epochs,
        minibatches=stage.minibatches,
        generator=context.generator("rollouts"),
        pairing=stage.pairing,
        min_margin=stage.min_margin,
        truncation_penalty=stage.truncation_penalty,
        reference=objective.needs_reference,
        row_tokens=stage.optim.row_tokens,
        batch_tokens=stage.optim.batch_tokens,
    )
    a_round = source.steps_per_rollout
    places = {place * a_round for place in snapshot_places(stage.rounds, stage.snapshots)}
    look = _after_step(Snapshots(context, trunk, equipment, places), sync)

    def on_step(step: int, figures: dict[str, float]) -> None:
        if step % a_round == 0:
            figures |= source.figures
        look(step, figures)

    also = {} if sync is None else {"reference": sync}
    steps = stage.rounds * a_round
    state = train(context, equipment, trunk, objective, source, stage.optim, steps, on_step=on_step, also=also)
    if source.stopped:
        context.watch.say(f"  stopped after step {state.step}: {source.stopped}")
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    found: Figures = {
        "both_ways_gap": gap,
        "reward_accuracy": accuracy,
        "reward_audit": audited,
        "steps": state.step,
        "stopped": source.stopped,
        "dropped": source.num_dropped,
    }
    return found | run_probe(context, trunk, equipment, stage, prompts)


def _trunk(
    context: Context, stage: PreferStage | OnlineStage, objective: Comparison | Thumbs, equipment: Equipment
) -> tuple[Trunk, ReferenceSync | None]:
    """The policy, its reference where the loss asks for one, and what moves that where it is to follow."""
    other = stage.reference if objective.needs_reference else ""
    trunk = policy_trunk(
        equipment.folder,
        reference=objective.needs_reference and not other,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        **held_as(stage.precision),
    )
    if other:
        _add_reference(context, trunk, other, equipment)
    sync = None
    if stage.sync_every and objective.needs_reference:
        lora = lora_of(stage.lora)
        if lora is not None and not other:  # the policy's adapter has to be copied somewhere
            add_adapter(trunk.models["policy"], "reference", lora, context.generator("adapter"))
            trunk.add_role("reference", Role("policy", "reference"))
        steps = stage.sync_every * (stage.epochs * stage.minibatches if isinstance(stage, OnlineStage) else 1)
        try:
            sync = ReferenceSync(trunk, every=steps, mix=stage.sync_mix)
        except ConfigError as err:
            raise ConfigError(f"stages.{context.name}.sync_every: {err}") from err
    trunk.train_only(*objective.roles)
    return trunk, sync


def _after_step(snapshots: Snapshots, sync: ReferenceSync | None) -> Callable[[int, dict[str, float]], None]:
    def after(step: int, _figures: dict[str, float]) -> None:
        snapshots.look(step)
        if sync is not None:
            sync.look(step)

    return after


def _live_evaluation(
    objective: Comparison | Thumbs, held: Sequence[Group], stage: PreferStage, pad_id: int
) -> Callable[[nn.Module], Mapping[str, float]]:
    """Measures a trunk on held-out groups against its reference as it is then."""
    budget = {"row_tokens": stage.optim.row_tokens, "batch_tokens": stage.optim.batch_tokens}
    batches = make_batches(held, **budget, pad_id=pad_id)
    return lambda trunk: measure(trunk, objective, with_live_reference(trunk, batches))


def _with_reference(
    context: Context, trunk: Trunk, groups: Sequence[Group], cache: Cache | None, pad_id: int
) -> list[Group]:
    """Log-probs of the reference, computed or read; says how long it took."""
    begun = time.perf_counter()
    context.watch.begin(f"{context.name}: reference", len(groups))
    held = with_reference(
        trunk,
        groups,
        pad_id=pad_id,
        cache=cache,
        progress=lambda done, _: context.watch.step(done),
    )
    context.watch.say(f"  log-probs of the reference for {len(groups)} prompts: {time.perf_counter() - begun:.1f} s")
    return held


def _add_reference(context: Context, trunk: Trunk, value: str, equipment: Equipment) -> None:
    """Another model as the reference; it has to read the same tokens as the policy."""
    folder = context.model(value)
    if load_tokenizer(folder).get_vocab() != equipment.tokenizer.get_vocab():
        raise ConfigError(
            f"stages.{context.name}.reference: {folder} has another vocabulary than {equipment.folder}, so log-probs "
            "of the same tokens cannot be compared; name a model with the policy's tokenizer"
        )
    trunk.add_model("reference", load_model(folder).requires_grad_(False))
    trunk.add_role("reference", Role("reference"))
