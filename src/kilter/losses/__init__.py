"""Losses: pure functions of log-probs, values and rewards. One screen each, with the paper's equation.

`pair` holds the losses over a chosen and a rejected response, by name in `PAIR_LOSSES`; losses over single responses
come into `UNPAIRED_LOSSES`; `reward` trains reward models; `policy` is PPO's; `sft` is next-token cross-entropy. A new
preference loss is a function with `@pair_loss(name)` or `@unpaired_loss(name)` and a golden row in its test.
"""

from kilter.losses.pair import dpo
from kilter.losses.policy import ppo_clip, value_clip
from kilter.losses.registry import (
    PAIR_LOSSES,
    UNPAIRED_LOSSES,
    PreferenceLoss,
    Range,
    bind,
    pair_loss,
    unpaired_loss,
    unusual,
)
from kilter.losses.reward import bradley_terry, centring
from kilter.losses.sft import nll

__all__ = [
    "PAIR_LOSSES",
    "UNPAIRED_LOSSES",
    "PreferenceLoss",
    "Range",
    "bind",
    "bradley_terry",
    "centring",
    "dpo",
    "nll",
    "pair_loss",
    "ppo_clip",
    "unpaired_loss",
    "unusual",
    "value_clip",
]
