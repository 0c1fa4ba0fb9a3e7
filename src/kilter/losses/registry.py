"""The table of pair losses. A function's signature is its schema: what it takes, its options, defaults and ranges.

The positional parameters name the quantities a loss asks for (`PAIR_INPUTS`); the keyword-only ones are its options,
with their valid and usual ranges as `Annotated[float, Range(...)]`. `bind` joins options and loss with a dry call, so
that a mistake shows before any model loads.
"""

from __future__ import annotations

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
}
"""What a pair loss can ask for by naming a positional parameter. Log-probs are sums over a response's scored tokens, or
their means where the loss is registered as `length_normalized`."""


class Range(NamedTuple):
    """The values an option may take, and those people use: outside the first an error, outside the second a warning."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    usual: tuple[float, float] = (-math.inf, math.inf)

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


class PairLoss(NamedTuple):
    """A registered loss and what its signature says."""

    fn: Callable[..., Tensor]
    inputs: tuple[str, ...]
    length_normalized: bool
    """Log-probs are means over a response's tokens instead of sums."""
    defaults: dict[str, Any]
    ranges: dict[str, Any]
    """Option -> its Range, or the tuple of words it may be."""

    @property
    def needs_reference(self) -> bool:
        """True when the loss asks for the reference's log-probs."""
        return any(name.startswith("ref_") for name in self.inputs)


PAIR_LOSSES: dict[str, PairLoss] = {}


def pair_loss(name: str, *, length_normalized: bool = False) -> Callable[[LossFn], LossFn]:
    """Register a pair loss under `name`. Raises ValueError for a name taken, or a parameter nobody can fill."""

    def register(fn: LossFn) -> LossFn:
        if name in PAIR_LOSSES:
            raise ValueError(f"pair loss {name!r} is registered twice")
        parameters = inspect.signature(fn).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        inputs = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        if unknown := set(inputs) - set(PAIR_INPUTS):
            raise ValueError(
                f"pair loss {name!r} asks for {', '.join(sorted(unknown))}; there is {', '.join(PAIR_INPUTS)}"
            )
        hints = get_type_hints(fn, include_extras=True)
        PAIR_LOSSES[name] = PairLoss(
            fn,
            inputs,
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


def bind(name: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The loss `name` with its options filled in, as a function of its inputs, in the order of `PairLoss.inputs`.

    Raises:
        ValueError: no such loss, no such option, or a value outside the option's range. Callers that read options from
            a user turn it into a ConfigError.
    """
    if name not in PAIR_LOSSES:
        raise ValueError(f"loss.name is {name!r}; choose one of {', '.join(sorted(PAIR_LOSSES))}")
    loss = PAIR_LOSSES[name]
    for key, value in options.items():
        if key not in loss.ranges:
            raise ValueError(f"loss.{key}: {name!r} has no such option; it takes {', '.join(loss.ranges) or 'none'}")
        allowed = loss.ranges[key]
        if isinstance(allowed, Range):
            if isinstance(value, bool) or not isinstance(value, int | float) or not allowed.allows(value):
                raise ValueError(f"loss.{key} is {value!r}; {name!r} takes a number {allowed}")
        elif value not in allowed:
            raise ValueError(f"loss.{key} is {value!r}; choose one of {', '.join(allowed)}")
    loss.fn(*[torch.full((1,), -1.0)] * len(loss.inputs), **options)  # same with any log-prob: only shapes are tried

    def bound(*inputs: Tensor) -> Tensor:
        return loss.fn(*inputs, **options)

    return bound


def unusual(name: str, options: Mapping[str, Any]) -> list[str]:
    """One sentence for each option that is valid but outside the range people use."""
    ranges = PAIR_LOSSES[name].ranges
    return [
        f"loss.{key} is {value:g}; usual for {name!r} is {allowed.usual[0]:g} to {allowed.usual[1]:g}"
        for key, value in options.items()
        if isinstance(allowed := ranges[key], Range) and not allowed.is_usual(value)
    ]
