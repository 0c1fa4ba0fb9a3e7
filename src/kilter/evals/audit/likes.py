"""What a reward likes, in words: the answers it puts highest and lowest, and what each word moved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kilter.evals.audit.cases import Material
from kilter.evals.audit.run import Rewards
from kilter.records import Judgement, Ranking, Sample, Scorer

SHOWN = 5
LONGEST = 60
"""Words of which differences are told; of a longer answer the first."""


def likes(scorer: Scorer, found: Material, rewards: Rewards) -> dict[str, list[dict[str, Any]]]:
    """The SHOWN highest and lowest answers of all cases, each with its words.

    A word's difference is the reward of the answer up to it less that of the answer before it, both read as cut off: a
    reward model reads its number at the last token, so this is what the word did to it.
    """
    rated = [
        (value, Sample(case.prompt, text))
        for case, texts in zip(found.cases, found.responses, strict=True)
        for text in texts
        if (value := rewards(Sample(case.prompt, text))) is not None
    ]
    rated.sort(key=lambda item: item[0])
    chosen = {"top": rated[: -SHOWN - 1 : -1], "bottom": rated[:SHOWN]}
    return {name: [_told(scorer, value, sample) for value, sample in rows] for name, rows in chosen.items()}


def _told(scorer: Scorer, value: float, sample: Sample) -> dict[str, Any]:
    parts = re.findall(r"\s*\S+", sample.text)[:LONGEST]
    begun = [Sample(sample.messages, "".join(parts[:at]), finished=False) for at in range(1, len(parts) + 1)]
    values = [score.value for score in scorer.score(begun)]
    words = []
    for at, (part, after) in enumerate(zip(parts, values, strict=True)):
        before = values[at - 1] if at else None
        words.append((part.strip(), None if before is None or after is None else after - before))
    return {"reward": value, "prompt": sample.messages[-1].content, "answer": sample.text, "words": words}


def best_of(records: Sequence[Ranking | Judgement], rewards: Rewards) -> tuple[list[list[float]], list[list[float]]]:
    """Of each record with four or more responses their rewards, and how large a share of the others each beats.

    A tie beats one half. What best-of-n would choose among them, and how good it is by the verdicts.
    """
    proxy, gold = [], []
    for record in records:
        ranks = record.ranks
        if len(ranks) < 4 or len(set(ranks)) < 2:
            continue
        values = [rewards(Sample(record.prompt, text)) for text in record.responses]
        if any(value is None for value in values):
            continue
        proxy.append([value for value in values if value is not None])
        beaten = [sum((one < other) + 0.5 * (one == other) for other in ranks) - 0.5 for one in ranks]
        gold.append([share / (len(ranks) - 1) for share in beaten])
    return proxy, gold
