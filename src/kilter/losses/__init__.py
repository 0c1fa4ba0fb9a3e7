"""Losses: pure functions of log-probs, values and rewards. One screen each, with the paper's equation.

Preference losses stand by name in three tables: `PAIR_LOSSES` (a chosen and a rejected response; `pair`,
`reference_free`), `UNPAIRED_LOSSES` (thumbs; `unpaired`), `RANKED_LOSSES` (whole rankings; `ranked`); those of reward
models in `REWARD_LOSSES` (`reward`). `policy` holds those of policy gradients, `sft` is next-token cross-entropy. A new
preference or reward loss is a function with `@pair_loss(name)`, `@unpaired_loss(name)`, `@ranked_loss(name)` or
`@reward_loss(name)` and a golden row in its test.
"""

from kilter.losses.pair import dpo
from kilter.losses.policy import (
    KlEstimator,
    cispo,
    gspo,
    importance_weights,
    kl_penalty,
    ppo_clip,
    reinforce,
    response_clip,
    value_clip,
)
from kilter.losses.ranked import dpo_pl
from kilter.losses.reference_free import orpo
from kilter.losses.registry import (
    PAIR_INPUTS,
    PAIR_LOSSES,
    RANKED_INPUTS,
    RANKED_LOSSES,
    REWARD_INPUTS,
    REWARD_LOSSES,
    UNPAIRED_INPUTS,
    UNPAIRED_LOSSES,
    PreferenceLoss,
    Range,
    all_losses,
    bind,
    pair_loss,
    preference_losses,
    ranked_loss,
    reward_loss,
    unpaired_loss,
    unusual,
)
from kilter.losses.reward import bradley_terry, centring, davidson, plackett_luce, regression, thumbs
from kilter.losses.sft import dft, nll
from kilter.losses.unpaired import kto

__all__ = [
    "PAIR_INPUTS",
    "PAIR_LOSSES",
    "RANKED_INPUTS",
    "RANKED_LOSSES",
    "REWARD_INPUTS",
    "REWARD_LOSSES",
    "UNPAIRED_INPUTS",
    "UNPAIRED_LOSSES",
    "KlEstimator",
    "PreferenceLoss",
    "Range",
    "all_losses",
    "bind",
    "bradley_terry",
    "centring",
    "cispo",
    "davidson",
    "dft",
    "dpo",
    "dpo_pl",
    "gspo",
    "importance_weights",
    "kl_penalty",
    "kto",
    "nll",
    "orpo",
    "pair_loss",
    "plackett_luce",
    "ppo_clip",
    "preference_losses",
    "ranked_loss",
    "regression",
    "reinforce",
    "response_clip",
    "reward_loss",
    "thumbs",
    "unpaired_loss",
    "unusual",
    "value_clip",
]
