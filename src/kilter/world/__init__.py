"""The embedded world: a small town in which the true reward of any answer to any prompt is computable.

A wind tunnel: `prompts` asks, `demonstrations` and `panel` are people of known skill and bias, `true_reward` and
`measure` judge, `MODEL_PATH` is a base model that speaks its language. The names below are also what recipes give, as
`kilter.world:panel`. Nothing here loads torch; `kilter.world.pretrain` does.
"""

from __future__ import annotations

from pathlib import Path

from kilter.world.annotators import panel, society
from kilter.world.demonstrators import demonstrations
from kilter.world.evaluation import is_sentences, measure, oracle, true_reward
from kilter.world.grammar import KINDS, find, prompts

MODEL_PATH = Path(__file__).parent / "base"
"""The shipped base model: an ordinary model folder."""

__all__ = [
    "KINDS",
    "MODEL_PATH",
    "demonstrations",
    "find",
    "is_sentences",
    "measure",
    "oracle",
    "panel",
    "prompts",
    "society",
    "true_reward",
]
