"""Supervised fine-tuning as a stage, and what stages measure on held-out groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kilter.config import Optim, SftStage
from kilter.models.build import policy_trunk
from kilter.models.save import save_causal_lm
from kilter.stages.context import Context
from kilter.stages.training import (
    Equipment,
    check_tokens,
    check_trunk,
    convert,
    equip,
    held_as,
    lora_of,
    read_split,
    source_of,
    train,
)
from kilter.train.loop import measure
from kilter.train.objectives import sft
from kilter.train.sources import Pool
from kilter.tree import Group, make_batches

Figures = dict[str, Any]


def run_sft(context: Context, stage: SftStage) -> Figures:
    """Cross-entropy of demonstrations; the result is an ordinary model folder."""
    equipment = equip(context, stage.model)
    read = read_split(context, equipment, stage, stage.data.kind, stage.data.score)
    more = [Pool(_mixed(context, equipment, stage, place), source.weight) for place, source in enumerate(stage.mix)]
    trunk = policy_trunk(
        equipment.folder,
        lora=lora_of(stage.lora),
        generator=context.generator("adapter"),
        **held_as(stage.precision),
    )
    objective = sft(loss=stage.loss)
    trunk.train_only(*objective.roles)
    check_tokens(equipment, read.groups, ends=stage.data.kind != "document")
    gap = check_trunk(context, trunk, "policy", read.groups, stage.precision)
    pad_id = equipment.encoder.pad_id
    source = source_of(context, read.groups, stage.optim, stage.epochs, pad_id, weight=stage.data.weight, more=more)
    evaluate = evaluation(objective, read.held, stage.optim, pad_id)
    train(context, equipment, trunk, objective, source, stage.optim, source.num_steps, evaluate=evaluate)
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    parameters = sum(parameter.numel() for parameter in trunk.models["policy"].parameters())
    figures = {"both_ways_gap": gap, "steps": source.num_steps, "parameters": parameters}
    return figures | held_out_figures(evaluate, trunk)


def _mixed(context: Context, equipment: Equipment, stage: SftStage, place: int) -> list[Group]:
    """The groups of one source beside the data."""
    source = stage.mix[place]
    records = context.records(f"mix[{place}]", source, source.kind)
    return convert(context, equipment, records, stage.optim, source.path, source.score).groups


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
