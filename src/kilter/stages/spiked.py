"""What a stage writes of steps with an unusual gradient: the rows behind each, as texts."""

from __future__ import annotations

from typing import Any

from kilter.config import Optim
from kilter.stages.context import Context
from kilter.train.spikes import Row, Spike, Spikes


def spikes_of(context: Context, tokenizer: Any, optim: Optim) -> Spikes | None:
    """Watches the gradient as a recipe asks, and writes what it sees into the stage's spikes.jsonl; None: not asked."""
    if not optim.spike:
        return None

    def tell(spike: Spike) -> None:
        rows = [_told(tokenizer, row) for row in spike.rows]
        context.folder.log_spike({"step": spike.step, "grad_norm": spike.norm, "usual": spike.usual, "rows": rows})

    return Spikes(optim.spike, tell)


def _told(tokenizer: Any, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "share": row.share,
        "norm": row.norm,
        "prompt": tokenizer.decode(row.texts[0][0]),
        "responses": [tokenizer.decode(response) for _, response in row.texts],
    }
