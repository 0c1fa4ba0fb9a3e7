"""The stages that learn from records without a reference: supervised fine-tuning and reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kilter import data
from kilter.config import Optim, RewardStage, SftStage
from kilter.data.convert import pairs_of
from kilter.models.build import policy_trunk, reward_trunk
from kilter.models.save import save_causal_lm, save_reward_model
from kilter.records import PreferencePair, Ranking, Record, Sample, Scorer
from kilter.scorers.check import check_scorer
from kilter.scorers.reward_model import RewardModelScorer
from kilter.stages.context import Context
from kilter.stages.training import (
    Equipment,
    check_tokens,
    check_trunk,
    compute_dtype,
    convert,
    equip,
    lora_of,
    read_split,
    source_of,
    train,
)
from kilter.stats import Interval, proportion
from kilter.train.loop import measure
from kilter.train.objectives import reward_model, sft
from kilter.train.sources import Pool
from kilter.tree import Group, make_batches

Figures = dict[str, Any]
HELD_OUT = "held_out.jsonl"
"""The pairs that a reward stage did not train on, in its folder."""


def run_sft(context: Context, stage: SftStage) -> Figures:
    """Cross-entropy of demonstrations; the result is an ordinary model folder."""
    equipment = equip(context, stage.model)
    read = read_split(context, equipment, stage, stage.data.kind, stage.data.score)
    more = [Pool(_mixed(context, equipment, stage, place), source.weight) for place, source in enumerate(stage.mix)]
    trunk = policy_trunk(
        equipment.folder,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        compute_dtype=compute_dtype(stage.precision),
    )
    objective = sft(loss=stage.loss)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, read.groups, ends=stage.data.kind != "document")
    gap = check_trunk(context, trunk, "policy", read.groups, stage.precision)
    pad_id = equipment.encoder.pad_id
    source = source_of(context, read.groups, stage.optim, stage.epochs, pad_id, weight=stage.data.weight, more=more)
    evaluate = evaluation(objective, read.held, stage.optim, pad_id)
    train(context, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    parameters = sum(parameter.numel() for parameter in trunk.models["policy"].parameters())
    figures = {"both_ways_gap": gap, "steps": source.num_steps, "parameters": parameters}
    return figures | held_out_figures(evaluate, trunk)


def _mixed(context: Context, equipment: Equipment, stage: SftStage, place: int) -> list[Group]:
    """The groups of one source beside the data."""
    source = stage.mix[place]
    records = context.records(f"mix[{place}]", source, source.kind)
    return convert(context, equipment, records, stage.optim, source.path, source.score).groups


def run_reward(context: Context, stage: RewardStage) -> Figures:
    """Bradley-Terry over all pairs of each prompt; the result is a sequence classifier with one label."""
    equipment = equip(context, stage.model)
    read = read_split(context, equipment, stage, "ranking")
    trunk = reward_trunk(
        equipment.folder,
        generator=context.generator("head"),
        lora=lora_of(stage.lora),
        compute_dtype=compute_dtype(stage.precision),
    )
    objective = reward_model(centring_coef=stage.centering)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, read.groups)
    gap = check_trunk(context, trunk, "reward", read.groups, stage.precision)
    source = source_of(context, read.groups, stage.optim, stage.epochs, equipment.encoder.pad_id)
    evaluate = evaluation(objective, read.held, stage.optim, equipment.encoder.pad_id)
    train(context, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    pairs = [item for record in read.held_records for item in _pairs(record)]
    data.write(context.folder.path / HELD_OUT, pairs)
    save_reward_model(trunk, "reward", context.folder.result, equipment.template(), end_ids=equipment.encoder.stop_ids)
    scorer = RewardModelScorer(trunk.eval(), equipment.encoder)
    found: Figures = {"both_ways_gap": gap, "steps": source.num_steps, **held_out_figures(evaluate, trunk)}
    if pairs:
        found["accuracy_on_labels"] = check_scorer(scorer, pairs, refuse=False).accuracy.to_dict()
        if stage.truth.path:
            truth = context.call("truth", stage.truth)
            found["accuracy"] = order_accuracy(scorer, truth, read.held_records).to_dict()
    return found


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


def evaluation(
    objective: Any, held: Sequence[Group], optim: Optim, pad_id: int
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Measures a trunk on held-out groups; None where there are none."""
    if not held:
        return None
    batches = make_batches(held, row_tokens=optim.row_tokens, batch_tokens=optim.batch_tokens, pad_id=pad_id)
    return lambda trunk: measure(trunk, objective, batches)


def held_out_figures(evaluate: Callable[[nn.Module], Mapping[str, float]] | None, trunk: nn.Module) -> Figures:
    """What `evaluate` says when training has ended."""
    if evaluate is None:
        return {}
    with torch.no_grad():
        return {f"held_out/{name}": value for name, value in evaluate(trunk).items()}
