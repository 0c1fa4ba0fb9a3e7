"""The stages that learn from records: supervised fine-tuning, reward models, preference optimisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kilter import data
from kilter.config import NO_REFERENCE, CollectStage, Optim, PreferStage, Recipe, RewardStage, SftStage
from kilter.data.convert import pairs_of
from kilter.data.split import split_by_prompt
from kilter.errors import ConfigError
from kilter.losses import unusual
from kilter.models.build import policy_trunk, reward_trunk
from kilter.models.load import load_model, load_tokenizer
from kilter.models.roles import Role
from kilter.models.save import save_causal_lm, save_reward_model
from kilter.models.trunk import Trunk
from kilter.records import PreferencePair, Ranking, Record, Sample, Scorer
from kilter.scorers.check import check_scorer
from kilter.scorers.reward_model import RewardModelScorer
from kilter.stages.context import Context
from kilter.stages.heaviest import write_heaviest
from kilter.stages.snapshots import Snapshots, snapshot_places
from kilter.stages.training import (
    Equipment,
    check_tokens,
    check_trunk,
    compute_dtype,
    convert,
    equip,
    lora_of,
    source_of,
    tolerance,
    train,
)
from kilter.stats import Interval, proportion
from kilter.train.checks import check_policy_is_reference, require
from kilter.train.loop import measure
from kilter.train.objectives import reward_model, sft
from kilter.train.preferences import Comparison, Term, Thumbs, mixture
from kilter.train.reference import Cache, default_folder, with_reference
from kilter.train.sources import Pool, Score, with_mismatched
from kilter.tree import Group, make_batches

Figures = dict[str, Any]
HELD_OUT = "held_out.jsonl"
"""The pairs that a reward stage did not train on, in its folder."""


def run_sft(context: Context, stage: SftStage) -> Figures:
    """Cross-entropy of demonstrations; the result is an ordinary model folder."""
    equipment = equip(context, stage.model)
    learned, held = _split(context, equipment, stage)
    more = [Pool(_mixed(context, equipment, stage, place), source.weight) for place, source in enumerate(stage.mix)]
    trunk = policy_trunk(
        equipment.folder,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        compute_dtype=compute_dtype(stage.precision),
    )
    objective = sft(loss=stage.loss)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, learned, ends=stage.data.kind != "document")
    gap = check_trunk(context, trunk, "policy", learned, stage.precision)
    pad_id = equipment.encoder.pad_id
    source = source_of(context, learned, stage.optim, stage.epochs, pad_id, weight=stage.data.weight, more=more)
    evaluate = _evaluation(objective, held, stage.optim, pad_id)
    train(context, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    parameters = sum(parameter.numel() for parameter in trunk.models["policy"].parameters())
    figures = {"both_ways_gap": gap, "steps": source.num_steps, "parameters": parameters}
    return figures | _held_out(evaluate, trunk)


def _mixed(context: Context, equipment: Equipment, stage: SftStage, place: int) -> list[Group]:
    """The groups of one source beside the data."""
    source = stage.mix[place]
    records = context.records(f"mix[{place}]", source, source.kind)
    return convert(context, equipment, records, stage.optim, source.path, source.score).groups


def run_reward(context: Context, stage: RewardStage) -> Figures:
    """Bradley-Terry over all pairs of each prompt; the result is a sequence classifier with one label."""
    equipment = equip(context, stage.model)
    records = context.records("data", stage.data, "ranking")
    train_records, held_records = split_by_prompt(records, held_out=stage.held_out, seed=context.seed("split"))
    learned = convert(context, equipment, train_records, stage.optim, "training").groups
    held = convert(context, equipment, held_records, stage.optim, "held out").groups if held_records else []
    trunk = reward_trunk(
        equipment.folder,
        generator=context.generator("head"),
        lora=lora_of(stage.lora),
        compute_dtype=compute_dtype(stage.precision),
    )
    objective = reward_model(centring_coef=stage.centering)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, learned)
    gap = check_trunk(context, trunk, "reward", learned, stage.precision)
    source = source_of(context, learned, stage.optim, stage.epochs, equipment.encoder.pad_id)
    evaluate = _evaluation(objective, held, stage.optim, equipment.encoder.pad_id)
    train(context, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    data.write(context.folder.path / HELD_OUT, [item for record in held_records for item in _pairs(record)])
    save_reward_model(trunk, "reward", context.folder.result, equipment.template(), end_ids=equipment.encoder.stop_ids)
    scorer = RewardModelScorer(trunk.eval(), equipment.encoder)
    found: Figures = {"both_ways_gap": gap, "steps": source.num_steps, **_held_out(evaluate, trunk)}
    if held_records:
        pairs = [item for record in held_records for item in _pairs(record)]
        found["accuracy_on_labels"] = check_scorer(scorer, pairs, refuse=False).accuracy.to_dict()
        if stage.truth.path:
            truth = context.call("truth", stage.truth)
            found["accuracy"] = order_accuracy(scorer, truth, held_records).to_dict()
    return found


def check_losses(recipe: Recipe) -> list[str]:
    """Refuses a recipe whose losses nobody has, before any work; returns a line for each value outside its usual range.

    Raises:
        ConfigError: no such loss or option, a value out of its range, losses over different kinds of data, or over
            another kind than an earlier stage collects.
    """
    lines = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, PreferStage):
            try:
                objective = objective_of(stage)
            except ConfigError as err:
                raise ConfigError(f"stages.{name}: {err}") from err
            source = recipe.stages.get(stage.data.path)
            if isinstance(source, CollectStage) and source.ask == "thumbs" and isinstance(objective, Comparison):
                raise ConfigError(
                    f"stages.{name}.data is {stage.data.path!r}, which collects thumbs, and {stage.loss.name!r} reads "
                    f"comparisons; set stages.{stage.data.path}.ask to ranking, or loss.name to kto"
                )
            found = [line for loss in (stage.loss, *stage.mix) for line in unusual(loss.name, loss.options)]
            lines += [f"stages.{name}: {line}" for line in found]
    return lines


def objective_of(stage: PreferStage) -> Comparison | Thumbs:
    """The objective that a stage asks for."""
    terms = [Term(loss.name, loss.options, loss.weight) for loss in (stage.loss, *stage.mix)]
    return mixture(terms, reference_free=stage.reference == NO_REFERENCE)


def run_prefer(context: Context, stage: PreferStage) -> Figures:
    """Any preference loss or a mixture of them; the policy as it starts is the reference, unless another is named."""
    objective = objective_of(stage)
    equipment = equip(context, stage.model)
    learned, held = _split(context, equipment, stage)
    if isinstance(objective, Thumbs) and objective.needs_mismatched:
        learned = with_mismatched(learned, seed=context.seed("mismatched"))
        held = with_mismatched(held, seed=context.seed("mismatched")) if held else held
    other = stage.reference if objective.needs_reference else ""
    trunk = policy_trunk(
        equipment.folder,
        reference=objective.needs_reference and not other,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        compute_dtype=compute_dtype(stage.precision),
    )
    if other:
        _add_reference(context, trunk, other, equipment)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, learned)
    gap = check_trunk(context, trunk, "policy", learned, stage.precision)
    pad_id = equipment.encoder.pad_id
    if objective.needs_reference:
        cache = Cache.of(default_folder(), trunk) if stage.reference_cache else None
        learned = _with_reference(context, trunk, learned, cache, pad_id)
        held = _with_reference(context, trunk, held, cache, pad_id) if held else held
        if not other and isinstance(objective, Comparison):
            first = make_batches(learned[:32], row_tokens=512, batch_tokens=8192, pad_id=pad_id)
            require(*check_policy_is_reference(trunk, first, tolerance=tolerance(stage.precision)))
    source = source_of(context, learned, stage.optim, stage.epochs, pad_id)
    evaluate = _evaluation(objective, held, stage.optim, pad_id)
    places = snapshot_places(source.num_steps, stage.snapshots)
    snapshots = Snapshots(context, trunk, equipment, places)
    train(
        context,
        trunk,
        objective,
        source,
        stage.optim,
        source.num_steps,
        evaluate=evaluate,
        on_step=lambda step, _figures: snapshots.look(step),
    )
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    found = {"both_ways_gap": gap, "steps": source.num_steps, **_held_out(evaluate, trunk)}
    if isinstance(objective, Comparison) and stage.heaviest:
        found |= write_heaviest(context, trunk, objective, learned, stage, equipment)
    return found


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


def _reads(stage: SftStage | RewardStage | PreferStage) -> tuple[str, Score]:
    """The kind of records that a stage learns from, and which of their tokens are scored."""
    if isinstance(stage, SftStage):
        return stage.data.kind, stage.data.score
    thumbs = isinstance(stage, PreferStage) and isinstance(objective_of(stage), Thumbs)
    return ("feedback" if thumbs else "ranking"), "responses"


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


def first_groups(context: Context, folder: str) -> list[Group]:
    """The first groups that a stage would train on, for a dry run."""
    stage = context.stage
    assert isinstance(stage, SftStage | RewardStage | PreferStage)
    kind, score = _reads(stage)
    records = context.records("data", stage.data, kind)
    equipment = equip(context, folder)
    return convert(context, equipment, records[:2], stage.optim, "first batch", score).groups


def order_accuracy(scorer: Scorer, truth: Scorer, records: Sequence[Ranking]) -> Interval:
    """How often `scorer` orders two responses to one prompt as the true reward does; pairs that are equal in truth
    are left out, equal scores count as wrong."""
    samples = [[Sample(record.prompt, text) for text in record.responses] for record in records]
    flat = [sample for row in samples for sample in row]
    guesses = iter(scorer.score(flat))
    truths = iter(truth.score(flat))
    right = total = 0
    for row in samples:
        rated = [(next(guesses).value, next(truths).value) for _ in row]
        for at, (guess, real) in enumerate(rated):
            for other_guess, other_real in rated[:at]:
                if None in (guess, real, other_guess, other_real) or real == other_real:
                    continue
                assert guess is not None and real is not None and other_guess is not None and other_real is not None
                right += (guess - other_guess) * (real - other_real) > 0
                total += 1
    return proportion(right, total)


def _pairs(record: Record) -> list[PreferencePair]:
    return [record] if isinstance(record, PreferencePair) else list(pairs_of(record))


def _split(context: Context, equipment: Equipment, stage: SftStage | PreferStage) -> tuple[list[Group], list[Group]]:
    kind, score = _reads(stage)
    records = context.records("data", stage.data, kind)
    learned, held = split_by_prompt(records, held_out=stage.held_out, seed=context.seed("split"))
    groups = convert(context, equipment, learned, stage.optim, "training", score).groups
    return groups, convert(context, equipment, held, stage.optim, "held out", score).groups if held else []


def _evaluation(
    objective: Any, held: Sequence[Group], optim: Optim, pad_id: int
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    if not held:
        return None
    batches = make_batches(held, row_tokens=optim.row_tokens, batch_tokens=optim.batch_tokens, pad_id=pad_id)
    return lambda trunk: measure(trunk, objective, batches)


def _held_out(evaluate: Callable[[nn.Module], Mapping[str, float]] | None, trunk: nn.Module) -> Figures:
    if evaluate is None:
        return {}
    with torch.no_grad():
        return {f"held_out/{name}": value for name, value in evaluate(trunk).items()}
