"""The embedded world: a small town in which the true reward of any answer to any prompt is computable.

A wind tunnel: `prompts` asks, `demonstrations` and `panel` are people of known skill and bias, `true_reward` and
`measure` judge, `MODEL_PATH` is a base model that speaks its language. The names below are also what recipes give, as
`kilter.world:panel`. Nothing here loads torch; `kilter.world.pretrain` does.
"""

from __future__ import annotations

from pathlib import Path

from kilter.world import town
from kilter.world.annotators import panel, society
from kilter.world.demonstrators import demonstrations
from kilter.world.evaluation import is_sentences, measure, oracle, sides, true_reward
from kilter.world.grammar import KINDS, find, prompts

MODEL_PATH = Path(__file__).parent / "base"
"""The shipped base model: an ordinary model folder."""

AUDIT_WORDS = {
    "filler": (*town.RAMBLE, *town.FILLERS),
    "restated": "",
    "header": "",
    "flattery": town.FLATTERY,
    "apology_first": "",
    "apology_last": "",
    "confident": (),
    "english": False,
}
"""Its own words for the copies of `kilter reward audit`; nobody in it apologises, says to be sure, or writes lists."""

__all__ = [
    "AUDIT_WORDS",
    "KINDS",
    "MODEL_PATH",
    "demonstrations",
    "find",
    "is_sentences",
    "measure",
    "oracle",
    "panel",
    "prompts",
    "sides",
    "society",
    "true_reward",
]
