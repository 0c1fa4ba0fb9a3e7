"""Which pairs a preference loss still pulls at hardest when training ends: often those whose labels are wrong.

DPO weighs a pair's gradient by sigmoid(r_rejected - r_chosen) (Rafailov et al. 2023, arXiv 2305.18290, below eq. 7):
1/2 at the start, near 0 once the pair is learned, near 1 where the policy has learned the opposite from all the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kilter.config import PreferStage
from kilter.models.trunk import Trunk
from kilter.rundir import write_jsonl
from kilter.stages.context import Context
from kilter.stages.training import Equipment
from kilter.train import distributed
from kilter.train.preferences import Comparison
from kilter.tree import Group, make_batches, numbered

BINS = 10
FILE = "heaviest.jsonl"
PLACE = "place"


def write_heaviest(
    context: Context,
    trunk: Trunk,
    objective: Comparison,
    groups: Sequence[Group],
    stage: PreferStage,
    equipment: Equipment,
) -> dict[str, Any]:
    """Writes the heaviest training pairs of a trained policy; returns the weights' mean and histogram."""
    optim, encoder = stage.optim, equipment.encoder
    context.watch.say("  weights of the training pairs")
    rows = pair_weights(
        trunk,
        objective,
        groups,
        row_tokens=optim.row_tokens,
        batch_tokens=optim.batch_tokens,
        pad_id=encoder.pad_id,
    )
    if not rows:
        return {}
    heaviest = sorted(rows, key=lambda row: -row[0])[: stage.heaviest]
    write_jsonl(
        context.folder.path / FILE,
        [
            {
                "weight": weight,
                "margin": margin,
                "prompt": equipment.tokenizer.decode(list(groups[number].prompt)),
                "chosen": encoder.decode(groups[number].responses[better].ids),
                "rejected": encoder.decode(groups[number].responses[worse].ids),
            }
            for weight, margin, number, better, worse in heaviest
        ],
    )
    weights = [row[0] for row in rows]
    counts = [0] * BINS
    for weight in weights:
        counts[min(int(weight * BINS), BINS - 1)] += 1
    return {"pair_weights/mean": sum(weights) / len(weights), "pair_weights/histogram": counts}


def pair_weights(
    trunk: Trunk, objective: Comparison, groups: Sequence[Group], *, row_tokens: int, batch_tokens: int, pad_id: int = 0
) -> list[tuple[float, float, int, int, int]]:
    """(weight, margin, group, better, worse) of every pair of every group that is no tie; ties in margin keep the order
    of the groups, whatever the packing."""
    training = trunk.training
    trunk.eval()
    places = [(number, place) for number, group in enumerate(groups) for place in range(len(group.responses))]
    found = []
    with distributed.lowered(trunk):
        for batch in make_batches(
            numbered(groups, PLACE), row_tokens=row_tokens, batch_tokens=batch_tokens, pad_id=pad_id
        ):
            held = batch.extras[PLACE].long().tolist()
            for better, worse, margin in zip(*(side.tolist() for side in objective.margins(trunk, batch)), strict=True):
                (number, good), (_, bad) = places[held[better]], places[held[worse]]
                found.append((1 / (1 + math.exp(min(margin, 700.0))), margin, number, good, bad))
    trunk.train(training)
    return sorted(found, key=lambda row: row[2:])
