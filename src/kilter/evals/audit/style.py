"""Style against substance: RM-Bench's matrix, from answers of three styles to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kilter.records import Ranking, Record, Sample, prompt_id
from kilter.stats import Interval, clustered_share

STYLES = ("plain", "verbose", "formatted")
"""The order in which RM-Bench's rows hold them, of right and of wrong answers."""
RANKS = (0, 0, 0, 1, 1, 1)


def style_matrix(records: Sequence[Record], reward: Callable[[Sample], float | None]) -> dict[str, Any] | None:
    """How often the right answer in one style is above the wrong one in another.

    `easy`: the right one is in the richer style, `normal`: both are in the same, `hard`: the wrong one is. Liu et al.
    2024, arXiv 2410.16184. Equal rewards count one half.

    Args:
        records: of RM-Bench's layout; others are left out.
    Returns:
        {"accuracy": {right style: {wrong style: interval}}, "easy", "normal", "hard": interval}; None: no such records.
    """
    cells: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for record in records:
        if not isinstance(record, Ranking) or record.ranks != RANKS:
            continue
        values = [reward(Sample(record.prompt, text)) for text in record.responses]
        for right, one in enumerate(values[:3]):
            for wrong, other in enumerate(values[3:]):
                if one is not None and other is not None:
                    won = 0.5 if one == other else float(one > other)
                    cells.setdefault((right, wrong), []).append((won, prompt_id(record.prompt)))
    if len(cells) < len(STYLES) ** 2:
        return None
    parts = {
        name: [
            row for (right, wrong), rows in cells.items() if (right > wrong) - (right < wrong) == sign for row in rows
        ]
        for name, sign in (("easy", 1), ("normal", 0), ("hard", -1))
    }
    matrix = {
        one: {other: _share(cells[right, wrong]).to_dict() for wrong, other in enumerate(STYLES)}
        for right, one in enumerate(STYLES)
    }
    return {"accuracy": matrix, **{name: _share(rows).to_dict() for name, rows in parts.items()}}


def _share(rows: Sequence[tuple[float, str]]) -> Interval:
    return clustered_share([won for won, _ in rows], [prompt for _, prompt in rows])
