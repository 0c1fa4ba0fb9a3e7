"""The stage that trains a reward model: one head, an ensemble, a head for each group, or one apart from length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kilter import data
from kilter.config import RewardStage
from kilter.data.convert import pairs_of
from kilter.data.marks import standardized, thumbs_together
from kilter.errors import ConfigError, DataError
from kilter.losses import REWARD_LOSSES
from kilter.models.build import reward_trunk
from kilter.models.load import load_model, with_random_weights
from kilter.models.reward_heads import REWARD, RewardHeads
from kilter.models.save import save_reward_model
from kilter.records import Ranking, Rating, Sample, Scorer, prompt_id
from kilter.rundir import write_jsonl
from kilter.scorers.check import check_scorer
from kilter.scorers.combine import Combination
from kilter.scorers.reward_model import RewardModelScorer
from kilter.stages.audit import audit_stage
from kilter.stages.context import HELD_OUT, TRAINED_ON, Context
from kilter.stages.supervised import Figures, evaluation, held_out_figures
from kilter.stages.training import (
    Equipment,
    Read,
    check_tokens,
    check_trunk,
    equip,
    held_as,
    lora_of,
    read_split,
    source_of,
    train,
)
from kilter.stats import Interval, proportion
from kilter.train.rewards import LENGTH, RewardModel, Teaching, draw_name, reward_model
from kilter.tree import Group

TEACHING: Mapping[str, Teaching] = {"one": "all", "ensemble": "all", "groups": "own", "length": "all"}


def reward_objective(stage: RewardStage, heads: Sequence[str] = (REWARD,)) -> RewardModel:
    """The objective that a stage asks for. Raises ConfigError: no such loss or option, or one that its heads lack."""
    kind = stage.heads.kind
    made = reward_model(
        stage.loss.name,
        stage.loss.options,
        centring_coef=stage.centering,
        heads=heads,
        teaching="drawn" if kind == "ensemble" and stage.heads.bootstrap else TEACHING[kind],
        length_coef=stage.heads.length_coef if kind == "length" else 0.0,
    )
    loss = REWARD_LOSSES[made.name]
    if kind == "length" and loss.unit == "responses":
        raise ConfigError(
            f"loss.name is {made.name!r} and heads.kind length; lengths are taken apart in comparisons alone: "
            "choose bradley_terry, davidson or plackett_luce"
        )
    if kind == "groups" and "desirable" in loss.inputs:
        raise ConfigError(f"loss.name is {made.name!r} and heads.kind groups; thumbs name no group: set it to one")
    if stage.standardize != "no" and "value" not in loss.inputs:
        raise ConfigError(
            f"standardize is {stage.standardize} and loss.name {made.name!r}, which reads no values; set standardize "
            "to no, or loss.name to regression"
        )
    return made


def record_kind(stage: RewardStage) -> str:
    """The kind of records that a stage learns from."""
    inputs = REWARD_LOSSES[reward_objective(stage).name].inputs
    return "feedback" if "desirable" in inputs else "rating" if "value" in inputs else "ranking"


def _prepared(stage: RewardStage, kind: str) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
    """What is done to all records before they are split."""
    if kind == "feedback":
        return thumbs_together
    return None if stage.standardize == "no" else partial(standardized, by=stage.standardize)


def run_reward(context: Context, stage: RewardStage) -> Figures:
    """Any loss over rewards; the result is a sequence classifier with one label for each head."""
    kind = record_kind(stage)
    equipment = equip(context, stage.model)
    read = read_split(context, equipment, stage, kind, prepare=_prepared(stage, kind))
    labels = _labels(stage, read)
    heads = RewardHeads(labels)
    Combination.of(stage.heads.combine.model_dump(), labels, ())  # names a head that there is not: before any work
    read = _marked(context, stage, read, labels)
    if kind == "feedback":
        read = read._replace(groups=[*map(_thumbed, read.groups)], held=[*map(_thumbed, read.held)])
    model: Any = equipment.folder
    if stage.start == "random":
        model = with_random_weights(load_model(model), context.generator("start"))
    trunk = reward_trunk(
        model,
        generator=context.generator("head"),
        lora=lora_of(stage.lora),
        heads=(*heads.roles, LENGTH) if stage.heads.kind == "length" else heads.roles,
        own_adapters=stage.heads.own_adapters,
        **held_as(stage.precision),
    )
    objective = reward_objective(stage, heads.roles)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, read.groups)
    gap = max(check_trunk(context, trunk, role, read.groups, stage.precision) for role in _apart(stage, heads.roles))
    source = source_of(context, read.groups, stage.optim, stage.epochs, equipment.encoder.pad_id)
    evaluate = evaluation(objective, read.held, stage.optim, equipment.encoder.pad_id)
    train(context, equipment, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    pairs = [item for record in read.held_records for item in pairs_of(record)]
    data.write(context.folder.path / HELD_OUT, pairs)
    trunk.eval()
    heads = _described(stage, equipment, trunk, heads, read)
    end_ids = equipment.encoder.stop_ids
    save_reward_model(trunk, heads.roles, context.folder.result, equipment.template(), end_ids=end_ids, heads=heads)
    learned = sorted({prompt_id(record.prompt) for record in read.records})
    write_jsonl(context.folder.result / TRAINED_ON, [{"prompt_id": one} for one in learned])
    combination = Combination.of(heads.combine, heads.labels, heads.usual)
    scorer = RewardModelScorer(
        trunk, equipment.encoder, roles=heads.roles, labels=heads.labels, combination=combination
    )
    found: Figures = {"both_ways_gap": gap, "steps": source.num_steps, **held_out_figures(evaluate, trunk)}
    for role, label in zip(heads.roles, heads.labels, strict=True):
        if (accuracy := found.pop(f"held_out/{role}/accuracy", None)) is not None:
            found[f"held_out/accuracy/{label}"] = accuracy
    # Rankings tell more than their pairs: best-of-n is taken among theirs.
    found["audit"] = audit_stage(context, stage.audit, scorer, read.held_records if kind == "ranking" else pairs)
    if pairs:
        found["accuracy_on_labels"] = check_scorer(scorer, pairs, refuse=False).accuracy.to_dict()
        if stage.truth.path:
            truth = context.call("truth", stage.truth)
            found["accuracy"] = order_accuracy(scorer, truth, read.held_records).to_dict()
    return found


def _labels(stage: RewardStage, read: Read) -> tuple[str, ...]:
    """What the heads are called.

    Raises:
        DataError: a head for each group, and a record without one, or all of one.
    """
    if stage.heads.kind == "ensemble":
        return tuple(f"member {place}" for place in range(stage.heads.members))
    if stage.heads.kind != "groups":
        return (REWARD,)
    for record in (*read.records, *read.held_records):
        if not record.group:
            raise DataError(
                f"{stage.data.path}: the record {record.id} names no 'group', and heads.kind is groups; name the group "
                "of annotators (or the criterion) of every record, or set heads.kind to one"
            )
    found = sorted({record.group for record in read.records})
    if unknown := sorted({record.group for record in read.held_records} - set(found)):
        raise DataError(
            f"{stage.data.path}: all prompts of the group {unknown[0]!r} are held out; give it more, or lower held_out"
        )
    if len(found) < 2:
        raise DataError(f"{stage.data.path}: all records are of the group {found[0]!r}; set heads.kind to one")
    return tuple(found)


def _marked(context: Context, stage: RewardStage, read: Read, labels: Sequence[str]) -> Read:
    """The groups with what says which head learns how much from each."""
    if stage.heads.kind == "groups":
        sides = ((read.groups, read.places, read.records), (read.held, read.held_places, read.held_records))
        learned, held = (
            [
                _with(group, {"head": float(labels.index(records[place].group))})
                for group, place in zip(groups, places, strict=True)
            ]
            for groups, places, records in sides
        )
        return read._replace(groups=learned, held=held)
    if stage.heads.kind == "ensemble" and stage.heads.bootstrap:
        drawn = np.random.default_rng(context.seed("draws")).exponential(size=(len(read.groups), len(labels)))
        drawn /= drawn.mean(0)
        names = [draw_name(member) for member in range(len(labels))]
        learned = [
            _with(group, dict(zip(names, row, strict=True)))
            for group, row in zip(read.groups, drawn.tolist(), strict=True)
        ]
        return read._replace(groups=learned, held=[_with(group, dict.fromkeys(names, 1.0)) for group in read.held])
    return read


def _thumbed(group: Group) -> Group:
    """A group whose values are thumbs."""
    made = []
    for response in group.responses:
        thumb = {"desirable": response.per_response["value"]}
        made.append(replace(response, per_response={**response.per_response, **thumb}))
    return replace(group, responses=tuple(made))


def _with(group: Group, numbers: Mapping[str, float]) -> Group:
    """The same numbers on every response of a group."""
    return replace(
        group,
        responses=tuple(
            replace(response, per_response={**response.per_response, **numbers}) for response in group.responses
        ),
    )


def _apart(stage: RewardStage, roles: Sequence[str]) -> Sequence[str]:
    """One role for each forward: heads of one model read the same hidden states."""
    return roles if stage.heads.own_adapters else roles[:1]


def _described(stage: RewardStage, equipment: Equipment, trunk: Any, heads: RewardHeads, read: Read) -> RewardHeads:
    """The heads with what each says on average, of held-out responses where there are any."""
    if len(heads.labels) == 1:
        return heads
    scorer = RewardModelScorer(trunk, equipment.encoder, roles=heads.roles, labels=heads.labels)
    records = read.held_records or read.records
    scores = scorer.score([Sample(record.prompt, text) for record in records for text in record.responses])
    said = [score.parts for score in scores if score.value is not None]
    return RewardHeads(
        heads.labels,
        stage.heads.kind,
        tuple(float(np.mean([parts[label] for parts in said])) for label in heads.labels) if said else (),
        stage.heads.combine.model_dump(),
        equipment.folder if stage.heads.own_adapters else "",
    )


def order_accuracy(scorer: Scorer, truth: Scorer, records: Sequence[Ranking | Rating]) -> Interval:
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
