"""The one loop. `train_step` holds the only `backward` of Kilter; `fit` repeats it, evaluates, saves and resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kilter.errors import CheckError
from kilter.models.shard import whole
from kilter.train import distributed
from kilter.train.checkpoint import CheckpointStore, Stateful, save_batches
from kilter.train.objectives import LossOutput, Objective, finished, prepared
from kilter.train.optimizer import Schedule, constant, set_learning_rate, trained_parameters
from kilter.train.spikes import Row, Spike, Spikes, rows_behind
from kilter.tree import Batch


class BatchSource(Protocol):
    """Where the micro-batches of each step come from: records, rollouts, activations."""

    def next_step(self) -> Sequence[Batch] | None:
        """The next step's micro-batches; none where there is nothing more to learn from, and training ends.

        None: this step is left out. It counts, so that the schedule and all that goes by steps stay as planned, and
        changes no weight and no moment.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass
class TrainState:
    """All that training changes. The trunk may be wrapped by DDP or FSDP2."""

    trunk: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule = constant
    step: int = 0
    stopped: bool = False
    """Ended before its last step, by an early stop or because the caller said so."""


class _Sums:
    """Adds up the micro-batches of a step, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, out: LossOutput, units: Mapping[str, float]) -> None:
        """One micro-batch; `units` are the whole step's, so that each term's mean is over the step."""
        for name, (value, unit) in out.terms.items():
            self._put(f"loss/{name}", value.detach())
            # Every process holds the step's units; the sum over processes is to count them once.
            self._weights[f"loss/{name}"] = units[unit] / distributed.world_size()
        for name, (value, weight) in out.metrics.items():
            self._put(name, value)
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def _put(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()

    def means(self, *more: Tensor) -> tuple[dict[str, float], list[float]]:
        """Means over all processes, and the given numbers as they are. The step's one wait for the device.

        A figure that nothing was counted for is left out: not measured is never 0.
        """
        names = sorted(self._sums)
        rows = [self._sums[name] for name in names] + [self._weights[name] for name in names]
        packed = distributed.total(self._row(rows))
        values = torch.cat([packed, self._row(more)]).tolist()
        count = len(names)
        found = zip(names, values[:count], values[count : 2 * count], strict=True)
        return {name: value / weight for name, value, weight in found if weight}, values[2 * count :]

    def _row(self, numbers: Sequence[Tensor | float]) -> Tensor:
        zero = torch.zeros(0, dtype=torch.float64, device=self.device)
        own = [torch.as_tensor(number, dtype=torch.float64, device=self.device).detach() for number in numbers]
        return torch.cat([zero, *(number.reshape(1) for number in own)])


def train_step(
    state: TrainState,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float = 1.0,
    failures: Path | None = None,
    spikes: Spikes | None = None,
) -> dict[str, float]:
    """One update from the micro-batches of one step. The same batches cut otherwise give the same gradient.

    Args:
        batches: this process's micro-batches; processes may have different numbers of them.
        max_grad_norm: the gradient is scaled down to this norm.
        failures: where the batches are saved when the gradient is not finite.
        spikes: told of the gradient's norm, and of the rows behind it when it is unusual.
    Returns:
        Figures of the step: `loss`, `loss/<term>`, the objective's, `grad_norm` (before clipping), `learning_rate`,
        `tokens` (scored, over all processes).
    Raises:
        CheckError: nothing to divide by, or a loss or gradient that is not finite: the update is not applied.
    """
    device = distributed.device_of(state.trunk)
    state.trunk.train()
    local = [batch.to(device) for batch in distributed.level(batches, device)]
    sums = _Sums(device)
    state.optimizer.zero_grad(set_to_none=True)
    with distributed.adding_in_place(state.trunk), distributed.lowered(state.trunk):
        local = list(prepared(objective, state.trunk, local))
        units = distributed.total_units(local, device)
        for place, batch in enumerate(local):
            with distributed.exchange(state.trunk, last=place == len(local) - 1):
                out = objective(state.trunk, batch)
                # DDP and FSDP2 average over processes; the gradient is a sum over them.
                (_loss(out, units, state.step) * distributed.world_size()).backward()  # type: ignore[no-untyped-call]
            sums.add(out, units)
    gradients = [p.grad for p in trained_parameters(state.optimizer).values() if p.grad is not None]
    grad_norm = whole(get_total_norm(gradients))
    means, (norm,) = sums.means(grad_norm)
    if not math.isfinite(norm + _total(means)):
        raise CheckError(_report_failure(state.step, norm, means, local, failures))
    if spikes is not None and (usual := spikes.usual(norm)) is not None:
        spikes.tell(Spike(state.step + 1, norm, usual, _rows_behind(state, objective, local, units)))
    clip_grads_with_norm_(trained_parameters(state.optimizer).values(), max_grad_norm, grad_norm)
    learning_rate = set_learning_rate(state.optimizer, state.schedule(state.step))
    state.optimizer.step()
    state.step += 1
    figures = finished(objective, means | {"loss": _total(means)})
    return figures | {"grad_norm": norm, "learning_rate": learning_rate, "tokens": float(units["tokens"])}


def _loss(out: LossOutput, units: Mapping[str, float], step: int) -> Tensor:
    parts = []
    for name, (value, unit) in out.terms.items():
        if not units.get(unit):
            raise CheckError(
                f"step {step}: the loss {name!r} is a mean over {unit}, and the step has none; "
                "look at the data: nothing in it is scored, or no prompt has two responses"
            )
        parts.append(value / units[unit])
    return torch.stack(parts).sum()


def _rows_behind(
    state: TrainState, objective: Objective, batches: Sequence[Batch], units: Mapping[str, float]
) -> list[Row]:
    if distributed.world_size() > 1:
        return []
    parameters = list(trained_parameters(state.optimizer).values())
    with distributed.lowered(state.trunk):
        return rows_behind(state.trunk, objective, batches, lambda out: _loss(out, units, state.step), parameters)


def _total(means: Mapping[str, float]) -> float:
    return sum(value for name, value in means.items() if name.startswith("loss/"))


def _report_failure(
    step: int, norm: float, means: Mapping[str, float], batches: Sequence[Batch], folder: Path | None
) -> str:
    saved = "the batches were not saved, no folder was given"
    if folder is not None:
        path = folder / f"step-{step:06d}-rank-{distributed.rank()}"
        save_batches(path, batches, {"step": step, "grad_norm": str(norm), **{k: str(v) for k, v in means.items()}})
        saved = f"its batches are in {path}"
    terms = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if name.startswith("loss/"))
    return (
        f"step {step}: gradient norm is {norm} ({terms}); the update was not applied and {saved}; "
        "lower the learning rate, compute in float32, or take out the rows of that batch"
    )


@torch.no_grad()
def measure(trunk: nn.Module, objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """The objective's figures on batches that are not trained on, each divided once by all of them."""
    device = distributed.device_of(trunk)
    training = trunk.training
    trunk.eval()
    local = [batch.to(device) for batch in distributed.level(batches, device)]
    sums = _Sums(device)
    with distributed.lowered(trunk):
        local = list(prepared(objective, trunk, local))
        units = distributed.total_units(local, device)
        for batch in local:
            sums.add(objective(trunk, batch), units)
    trunk.train(training)
    means, _ = sums.means()
    return finished(objective, means | {"loss": _total(means)})


@dataclass
class EarlyStop:
    """Stops after `patience` evaluations without a better value of `metric`; the best weights are kept."""

    metric: str
    patience: int
    higher_is_better: bool = False
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def update(self, step: int, figures: Mapping[str, float]) -> bool:
        """Takes an evaluation in; True when it is the best so far."""
        if self.metric not in figures:
            raise CheckError(
                f"early stop: evaluations give no {self.metric!r}; choose one of {', '.join(sorted(figures))}"
            )
        value = figures[self.metric]
        gain = value - (self.best or 0.0) if self.higher_is_better else (self.best or 0.0) - value
        better = math.isfinite(value) and (self.best is None or gain > 0)
        if better:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better

    @property
    def over(self) -> bool:
        """True once patience has run out."""
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


def fit(
    state: TrainState,
    objective: Objective,
    source: BatchSource,
    *,
    steps: int,
    max_grad_norm: float = 1.0,
    checkpoints: CheckpointStore | None = None,
    checkpoint_every: int = 0,
    also: Mapping[str, Stateful] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop: Callable[[int, dict[str, float]], bool] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    early_stop: EarlyStop | None = None,
    failures: Path | None = None,
    spikes: Spikes | None = None,
) -> TrainState:
    """Trains to `steps` steps, going on from the last checkpoint where there is one.

    A kill at any moment loses at most the steps since the last checkpoint; the same call then ends with the same bits.
    Rows that `on_step` wrote for lost steps are written again: drop those after `checkpoints.latest_step()` first.

    Args:
        steps: number of steps in all, those of an earlier process and those that the source leaves out included.
        checkpoint_every: steps between checkpoints; one more is made at the end. 0: at the end only.
        also: other things with a state that training changes, saved and resumed under these names.
        on_step: called after each step with its number (from 1) and its figures.
        stop: ends training after a step for which it returns True; remembered, so a resumed run stays ended.
        evaluate: of the trunk; its figures are added to the step's as `eval/...`. It must leave no trace.
        evaluate_every: steps between evaluations; one more is made at the end. 0: at the end only.
        early_stop: looks at the evaluations; the best weights so far are kept and are those that training ends with.
        failures: where batches with a gradient that is not finite are saved; default: beside the checkpoints.
        spikes: told of steps with an unusual gradient.
    """
    parts: dict[str, Stateful] = {"source": source, **(also or {})}
    if early_stop is not None:
        parts["early_stop"] = early_stop
    if spikes is not None:
        parts["spikes"] = spikes
    if checkpoints is not None:
        checkpoints.resume(state, parts)
        failures = failures or checkpoints.folder.parent / "failures"
    while state.step < steps and not state.stopped:
        start = time.perf_counter()
        batches = source.next_step()
        figures: dict[str, float] = {}
        if batches is None:
            state.step += 1
        elif batches:
            figures = train_step(
                state, objective, batches, max_grad_norm=max_grad_norm, failures=failures, spikes=spikes
            )
        else:
            state.stopped = True
            break
        figures["seconds"] = time.perf_counter() - start
        ended = state.step == steps
        best_so_far = False
        if evaluate is not None and (ended or _due(state.step, evaluate_every)):
            figures |= {f"eval/{name}": value for name, value in evaluate(state.trunk).items()}
            if early_stop is not None:
                best_so_far = early_stop.update(state.step, figures)
                state.stopped = early_stop.over
        if stop is not None and stop(state.step, figures):
            state.stopped = True
        if on_step is not None:
            on_step(state.step, figures)
        if checkpoints is not None and (ended or state.stopped or best_so_far or _due(state.step, checkpoint_every)):
            checkpoints.save(state, parts, pinned=[early_stop.best_step] if early_stop else [])
    if checkpoints is not None and early_stop is not None and early_stop.best_step not in (0, state.step):
        checkpoints.load_weights(state, early_stop.best_step)
    return state


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
