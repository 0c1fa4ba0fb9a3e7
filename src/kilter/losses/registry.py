"""The tables of losses that are chosen by name. A function's signature is its schema: inputs, options, their ranges.

The positional parameters name the quantities a loss asks for (`PAIR_INPUTS`, `UNPAIRED_INPUTS`, `RANKED_INPUTS`,
`REWARD_INPUTS`); the keyword-only ones are its options, with their meaning, valid and usual ranges as
`Annotated[float, Range(...)]`. `bind` joins options and loss with a dry call, so that a mistake shows before any model
loads.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

LossFn = TypeVar("LossFn", bound=Callable[..., Tensor])

PAIR_INPUTS: dict[str, str] = {
    "chosen": "float[P], log-prob of the better response under the policy, nats",
    "rejected": "float[P], log-prob of the worse response under the policy, nats",
    "ref_chosen": "float[P], `chosen` under the reference, without gradient",
    "ref_rejected": "float[P], `rejected` under the reference, without gradient",
    "chosen_tokens": "float[P], scored tokens of the better response",
    "rejected_tokens": "float[P], scored tokens of the worse response",
    "chosen_head": "float[P], `chosen` over its first min(chosen_tokens, rejected_tokens) tokens alone",
    "rejected_head": "float[P], `rejected` over as many",
    "ref_chosen_head": "float[P], `chosen_head` under the reference, without gradient",
    "ref_rejected_head": "float[P], `rejected_head` under the reference, without gradient",
    "likeness": "float[P], how likely the policy is to write the pair itself, in (0, 1], without gradient (`wpo`)",
    "ref_ranked": "float[P], over the whole step: the reference's chosen - rejected of the rank that the policy's has",
    "rejected_ranked": "float[P], over the whole step: the rejected log-ratio of the rank that the chosen one has",
    "chosen_ranked": "float[P], over the whole step: the chosen log-ratio of the rank that the rejected one has",
}
"""What a pair loss can ask for by naming a positional parameter. Log-probs are sums over a response's scored tokens, or
their means where the loss is registered as `length_normalized`."""

UNPAIRED_INPUTS: dict[str, str] = {
    "logps": "float[R], log-prob of each response under the policy, nats",
    "ref_logps": "float[R], the same under the reference, without gradient",
    "desirable": "float[R], 1 for a thumb up, 0 for a thumb down",
    "tokens": "float[R], scored tokens of each response",
    "kl": "float[], mean log-ratio of mismatched responses over the whole step, at least 0, without gradient",
    "shift": "float[], mean of the step's mean log-ratios of desirable and of undesirable responses, without gradient",
}
"""What a loss over single responses can ask for."""

RANKED_INPUTS: dict[str, str] = {
    "logps": "float[R], log-prob of each response under the policy, nats",
    "ref_logps": "float[R], the same under the reference, without gradient",
    "group": "int[R], which prompt the response answers",
    "rank": "float[R], 0 is best; equal ranks are ties",
    "tokens": "float[R], scored tokens of each response",
}
"""What a loss over whole rankings can ask for."""

REWARD_INPUTS: dict[str, str] = {
    "rewards": "float[R], what the reward model says of each response",
    "group": "int[R], which prompt the response answers",
    "rank": "float[R], 0 is best; equal ranks are ties",
    "margin": "float[P] >= 0, how much better the winner is said to be, in the order of `ops.pairs_in_groups(group)`",
    "value": "float[R], the number that somebody gave the response",
    "error": "float[R] >= 0, the standard error of `value`; 0: not known",
    "desirable": "float[R], 1 for a thumb up, 0 for a thumb down",
}
"""What a loss of reward models can ask for."""


class Range(NamedTuple):
    """The values an option may take, and those people use: outside the first an error, outside the second a warning."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    usual: tuple[float, float] = (-math.inf, math.inf)
    what: str = ""
    """The option in words, for `--help` and the reference page."""

    def allows(self, value: float) -> bool:
        """True inside the valid range; never for NaN."""
        return value > self.above and self.at_least <= value < self.below

    def is_usual(self, value: float) -> bool:
        """True inside the range that people use."""
        low, high = self.usual
        return low <= value <= high

    def __str__(self) -> str:
        parts = [f"> {self.above:g}"] if self.above > -math.inf else []
        parts += [f">= {self.at_least:g}"] if self.at_least > -math.inf else []
        parts += [f"< {self.below:g}"] if self.below < math.inf else []
        return " and ".join(parts) or "any finite number"


Unit = Literal["pairs", "prompts", "responses", "chosen_tokens"]
"""What a loss is a mean over, through the whole step."""


class PreferenceLoss(NamedTuple):
    """A registered loss and what its signature says."""

    fn: Callable[..., Tensor]
    inputs: tuple[str, ...]
    unit: Unit
    length_normalized: bool
    """Log-probs are means over a response's tokens instead of sums."""
    defaults: dict[str, Any]
    ranges: dict[str, Any]
    """Option -> its Range, or the tuple of words it may be."""

    @property
    def needs_reference(self) -> bool:
        """True when the loss asks for the reference's log-probs."""
        return any(name.startswith("ref_") for name in self.inputs)


PAIR_LOSSES: dict[str, PreferenceLoss] = {}
"""Losses over a chosen and a rejected response."""
UNPAIRED_LOSSES: dict[str, PreferenceLoss] = {}
"""Losses over single responses with a thumb up or down."""
RANKED_LOSSES: dict[str, PreferenceLoss] = {}
"""Losses over all responses to a prompt at once."""
REWARD_LOSSES: dict[str, PreferenceLoss] = {}
"""Losses of reward models over all responses to a prompt."""


def preference_losses() -> dict[str, PreferenceLoss]:
    """The tables of losses over log-probs as one."""
    return PAIR_LOSSES | UNPAIRED_LOSSES | RANKED_LOSSES


def all_losses() -> dict[str, PreferenceLoss]:
    """Every table as one."""
    return preference_losses() | REWARD_LOSSES


def pair_loss(name: str, *, length_normalized: bool = False, unit: Unit = "pairs") -> Callable[[LossFn], LossFn]:
    """Register a pair loss under `name`. Raises ValueError for a name taken, or a parameter nobody can fill."""
    return _register(PAIR_LOSSES, PAIR_INPUTS, name, unit, length_normalized)


def unpaired_loss(name: str, *, length_normalized: bool = False) -> Callable[[LossFn], LossFn]:
    """Register a loss over single responses under `name`, as `pair_loss` does."""
    return _register(UNPAIRED_LOSSES, UNPAIRED_INPUTS, name, "prompts", length_normalized)


def ranked_loss(name: str, *, length_normalized: bool = False) -> Callable[[LossFn], LossFn]:
    """Register a loss over whole rankings under `name`, as `pair_loss` does; a prompt's loss is the sum over its
    responses."""
    return _register(RANKED_LOSSES, RANKED_INPUTS, name, "prompts", length_normalized)


def reward_loss(name: str, *, unit: Unit) -> Callable[[LossFn], LossFn]:
    """Register a loss of reward models under `name`, as `pair_loss` does."""
    return _register(REWARD_LOSSES, REWARD_INPUTS, name, unit, False)


def _register(
    table: dict[str, PreferenceLoss], known: Mapping[str, str], name: str, unit: Unit, length_normalized: bool
) -> Callable[[LossFn], LossFn]:
    def register(fn: LossFn) -> LossFn:
        if name in all_losses():
            raise ValueError(f"loss {name!r} is registered twice")
        parameters = inspect.signature(fn).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        inputs = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        if unknown := set(inputs) - set(known):
            raise ValueError(f"loss {name!r} asks for {', '.join(sorted(unknown))}; there is {', '.join(known)}")
        hints = get_type_hints(fn, include_extras=True)
        table[name] = PreferenceLoss(
            fn,
            inputs,
            unit,
            length_normalized,
            {p.name: p.default for p in options},
            {p.name: _range_of(hints[p.name]) for p in options},
        )
        return fn

    return register


def _range_of(hint: Any) -> Range | tuple[str, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((extra for extra in get_args(hint) if isinstance(extra, Range)), Range())


def bind(
    name: str, options: Mapping[str, Any], *, table: Mapping[str, PreferenceLoss] | None = None
) -> Callable[..., Tensor]:
    """The loss `name` with its options filled in, as a function of its inputs, in the order of `PreferenceLoss.inputs`.

    Args:
        table: the losses to choose from; None: `preference_losses()`.
    Raises:
        ValueError: no such loss, no such option, or a value outside the option's range. Callers that read options from
            a user turn it into a ConfigError.
    """
    table = preference_losses() if table is None else table
    if name not in table:
        close = difflib.get_close_matches(name, table)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"loss.name is {name!r}; {hint}choose one of {', '.join(sorted(table))}")
    loss = table[name]
    for key, value in options.items():
        if key not in loss.ranges:
            close = difflib.get_close_matches(key, loss.ranges)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join(loss.ranges) or "none"
            raise ValueError(f"loss.{key}: {name!r} has no such option; {hint}it takes {known}")
        allowed = loss.ranges[key]
        if isinstance(allowed, Range):
            if isinstance(value, bool) or not isinstance(value, int | float) or not allowed.allows(value):
                raise ValueError(f"loss.{key} is {value!r}; {name!r} takes a number {allowed}")
        elif value not in allowed:
            raise ValueError(f"loss.{key} is {value!r}; choose one of {', '.join(allowed)}")
    number = torch.full((1,), -1.0)  # same with any log-prob: only shapes are tried
    example = {"group": torch.zeros_like(number, dtype=torch.int64)}
    loss.fn(*[example.get(given, number) for given in loss.inputs], **options)

    def bound(*inputs: Tensor) -> Tensor:
        return loss.fn(*inputs, **options)

    return bound


def unusual(name: str, options: Mapping[str, Any]) -> list[str]:
    """One sentence for each option that is valid but outside the range people use."""
    ranges = all_losses()[name].ranges
    return [
        f"loss.{key} is {value:g}; usual for {name!r} is {allowed.usual[0]:g} to {allowed.usual[1]:g}"
        for key, value in options.items()
        if isinstance(allowed := ranges[key], Range) and not allowed.is_usual(value)
    ]
