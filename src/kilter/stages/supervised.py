"""The stages that learn from records: supervised fine-tuning, reward models, preference optimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kilter import data
from kilter.config import Optim, PreferStage, RewardStage, SftStage
from kilter.data.convert import pairs_of
from kilter.data.split import split_by_prompt
from kilter.losses import PAIR_LOSSES
from kilter.models.build import policy_trunk, reward_trunk
from kilter.models.save import save_causal_lm, save_reward_model
from kilter.records import PreferencePair, Ranking, Record, Sample, Scorer
from kilter.scorers.check import check_scorer
from kilter.scorers.reward_model import RewardModelScorer
from kilter.stages.context import Context
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
from kilter.train.objectives import pair, reward_model, sft
from kilter.train.sources import with_reference
from kilter.tree import Group, make_batches

Figures = dict[str, Any]
HELD_OUT = "held_out.jsonl"
"""The pairs that a reward stage did not train on, in its folder."""


def run_sft(context: Context, stage: SftStage) -> Figures:
    """Cross-entropy of demonstrations; the result is an ordinary model folder."""
    equipment = equip(context, stage.model)
    learned, held = _split(context, equipment, context.records("data", stage.data, "demonstration"), stage)
    trunk = policy_trunk(
        equipment.folder,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        compute_dtype=compute_dtype(stage.precision),
    )
    objective = sft()
    trunk.train_only(*objective.roles)
    check_tokens(equipment, learned)
    gap = check_trunk(context, trunk, "policy", learned, stage.precision)
    source = source_of(context, learned, stage.optim, stage.epochs, equipment.encoder.pad_id)
    evaluate = _evaluation(objective, held, stage.optim, equipment.encoder.pad_id)
    train(context, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    parameters = sum(parameter.numel() for parameter in trunk.models["policy"].parameters())
    figures = {"both_ways_gap": gap, "steps": source.num_steps, "parameters": parameters}
    return figures | _held_out(evaluate, trunk)


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


def run_prefer(context: Context, stage: PreferStage) -> Figures:
    """A pair loss by name; the model at the start is the reference."""
    objective = pair(stage.loss.name, stage.loss.options())
    equipment = equip(context, stage.model)
    learned, held = _split(context, equipment, context.records("data", stage.data, "ranking"), stage)
    needs_reference = PAIR_LOSSES[stage.loss.name].needs_reference
    trunk = policy_trunk(
        equipment.folder,
        reference=needs_reference,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        compute_dtype=compute_dtype(stage.precision),
    )
    trunk.train_only(*objective.roles)
    check_tokens(equipment, learned)
    gap = check_trunk(context, trunk, "policy", learned, stage.precision)
    pad_id = equipment.encoder.pad_id
    if needs_reference:
        context.watch.say("  log-probs of the reference")
        learned = with_reference(trunk, learned, pad_id=pad_id)
        held = with_reference(trunk, held, pad_id=pad_id) if held else held
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
    return {"both_ways_gap": gap, "steps": source.num_steps, **_held_out(evaluate, trunk)}


def first_groups(context: Context, folder: str) -> list[Group]:
    """The first groups that a stage would train on, for a dry run."""
    stage = context.stage
    kinds = {SftStage: "demonstration", RewardStage: "ranking", PreferStage: "ranking"}
    assert isinstance(stage, SftStage | RewardStage | PreferStage)
    records = context.records("data", stage.data, kinds[type(stage)])
    equipment = equip(context, folder)
    return convert(context, equipment, records[:2], stage.optim, "first batch").groups


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


def _split(
    context: Context, equipment: Equipment, records: Sequence[Record], stage: SftStage | PreferStage
) -> tuple[list[Group], list[Group]]:
    learned, held = split_by_prompt(records, held_out=stage.held_out, seed=context.seed("split"))
    groups = convert(context, equipment, learned, stage.optim, "training").groups
    return groups, convert(context, equipment, held, stage.optim, "held out").groups if held else []


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
