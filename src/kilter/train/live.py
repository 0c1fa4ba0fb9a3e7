"""A reference that moves: it follows the policy every few steps, so its log-probs are computed in every step.

TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656), its soft and its hard update:

    soft, every step:        reference <- mix * policy + (1 - mix) * reference
    hard, every n-th step:   reference <- policy                                  (mix = 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kilter.errors import ConfigError
from kilter.models.trunk import Trunk
from kilter.train import distributed
from kilter.train.loop import BatchSource
from kilter.tree import Batch


class ReferenceSync:
    """Moves the role "reference" towards "policy". Its weights go into the checkpoints.

    Args:
        trunk: holds both roles, of one shape and with weights of their own.
        every: steps between two moves.
        mix: in (0, 1]; share of the policy in the new reference.
    Raises:
        ConfigError: the two are of different shapes, or share weights.
    """

    def __init__(self, trunk: Trunk, *, every: int, mix: float = 1.0) -> None:
        self._every, self._mix = every, mix
        self._reference, policy = trunk.parameters_of("reference"), trunk.parameters_of("policy")
        shapes = [[parameter.shape for parameter in own] for own in (self._reference, policy)]
        if shapes[0] != shapes[1] or {id(parameter) for parameter in self._reference} & {id(one) for one in policy}:
            raise ConfigError(
                "the reference is to follow the policy and is another kind of model; name a reference of the policy's "
                "own shape, or none, and the policy as it starts is taken"
            )
        self._policy = policy

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Moves the reference when it is due, after `step` updates."""
        if step % self._every == 0:
            for own, other in zip(self._reference, self._policy, strict=True):
                own.lerp_(other, self._mix)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": [parameter.detach().clone() for parameter in self._reference]}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        with torch.no_grad():
            for own, value in zip(self._reference, state["weights"], strict=True):
                own.copy_(value)


class LiveReference:
    """A source whose batches carry the log-probs of the reference as it is in that step."""

    def __init__(self, source: BatchSource, trunk: nn.Module) -> None:
        self._source, self._trunk = source, trunk

    def next_step(self) -> Sequence[Batch] | None:
        batches = self._source.next_step()
        return None if batches is None else with_live_reference(self._trunk, batches)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._source.load_state_dict(state)


@torch.no_grad()
def with_live_reference(trunk: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with `ref_logprobs` of the role "reference" as it is now."""
    device = distributed.device_of(trunk)
    found = []
    with distributed.lowered(trunk):
        for batch in distributed.level([batch.to(device) for batch in batches], device):
            logprobs = trunk(batch.tree, {"reference": "logprobs"})["reference"]
            found.append(replace(batch, ref_logprobs=logprobs.float()))
    return found
