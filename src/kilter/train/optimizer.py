"""AdamW with parameter groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from kilter.errors import ModelError
from kilter.train.distributed import device_of, unwrap

Schedule = Callable[[int], float]
"""Step (from 0) -> factor on every group's learning rate for that step's update."""


def constant(step: int) -> float:  # noqa: ARG001
    """The schedule that changes nothing."""
    return 1.0


def make_schedule(
    kind: Literal["constant", "linear", "cosine"] = "constant", *, steps: int = 0, warmup_steps: int = 0
) -> Schedule:
    """Linear warm-up, then constant, or a decay towards 0 after the last step.

    The first update already moves: step s of a warm-up over w steps has the factor (s + 1) / w. The decay's factor at
    step s is that of its start, (s - w) / (steps - w) of the way down; after `steps` it is 0.

    Args:
        kind: shape of the decay.
        steps: length of the whole run; needed by `linear` and `cosine`.
        warmup_steps: steps in which the rate rises.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if kind == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def make_optimizer(
    trunk: nn.Module,
    roles: Sequence[str],
    *,
    learning_rate: float,
    role_learning_rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the parameters of the roles that train; all others are frozen from now on.

    Vectors (norms, biases) have no weight decay. A parameter that two roles share follows the first of them.

    Args:
        trunk: a Trunk, wrapped or not.
        roles: who trains, for example `objective.roles`.
        learning_rate: peak rate, per update.
        role_learning_rates: role -> its own peak rate: `{"value": 1e-5}`.
        weight_decay: decoupled, per unit of learning rate (Loshchilov and Hutter 2019, arXiv 1711.05101).
    Raises:
        ModelError: a parameter that trains is not float32. Moments and updates below it lose what a step adds.
    """
    bare: Any = unwrap(trunk)
    bare.train_only(*roles)
    names = {id(parameter): name for name, parameter in bare.named_parameters()}
    taken: set[int] = set()
    groups: list[dict[str, Any]] = []
    for role in roles:
        rate = (role_learning_rates or {}).get(role, learning_rate)
        own = [p for p in bare.parameters_of(role) if id(p) not in taken]
        taken |= {id(p) for p in own}
        for decays in (True, False):
            members = [(names[id(p)], p) for p in own if (p.ndim >= 2) == decays]
            for name, parameter in members:
                if parameter.dtype != torch.float32:
                    raise ModelError(
                        f"{name} is {str(parameter.dtype).removeprefix('torch.')} and would be trained; "
                        "weights that train are float32: load with dtype float32 and compute in bfloat16 instead"
                    )
            if members:
                decay = weight_decay if decays else 0.0
                groups.append({"params": members, "lr": rate, "initial_lr": rate, "weight_decay": decay, "role": role})
    fused = device_of(bare).type in ("cpu", "cuda")  # one kernel a step: 4 times less time on a CPU
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Multiply every group's peak rate by the schedule's factor; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def trained_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Name -> parameter, of everything the optimizer trains."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
