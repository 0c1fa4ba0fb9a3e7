"""Checkpoints: a folder for a step, all of it or none of it, in safetensors and JSON.

    step-000100/  weights.safetensors      what trains, by name
                  optimizer.safetensors    its moments, `name/exp_avg`
                  state.json               step, number of processes, layout version
                  parts-0.json, .safetensors   source, generators, controllers, buffers of process 0; one pair a process

A folder is written beside, synced and renamed (`rundir.write_folder`), so a kill leaves the old ones and no half one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from kilter.errors import RunError
from kilter.models.shard import whole
from kilter.rundir import explained, write_folder
from kilter.train import distributed
from kilter.train.optimizer import trained_parameters
from kilter.tree import Batch, TokenTree

FORMAT = 2
TENSOR = "$tensor"
"""Key of a JSON object that stands for a tensor of the file beside it."""


class Stateful(Protocol):
    """Something whose state is JSON values and tensors, nested as it likes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class _State(Protocol):
    """The part of `loop.TrainState` that is saved."""

    trunk: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    stopped: bool


class GeneratorState:
    """A `torch.Generator` as something with a state."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.generator.set_state(state["state"])


# JSON beside tensors -------------------------------------------------------------------------------------------------


def to_files(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Takes the tensors out of a nested state: JSON values with `{"$tensor": name}` in their places, and the tensors.

    Raises:
        TypeError: something that is neither a JSON value nor a tensor, named by its place.
    """
    tensors: dict[str, Tensor] = {}

    def visit(item: Any, place: str) -> Any:
        if isinstance(item, Tensor):
            name = place or "value"
            tensors[name] = item.detach().cpu().contiguous().clone()
            return {TENSOR: name}
        if isinstance(item, Mapping):
            if odd := [key for key in item if not isinstance(key, str) or key == TENSOR]:
                raise TypeError(f"state at {place or 'top'}: key {odd[0]!r}; keys are strings other than {TENSOR!r}")
            return {key: visit(inner, f"{place}.{key}" if place else key) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [visit(inner, f"{place}.{number}") for number, inner in enumerate(item)]
        if item is None or isinstance(item, str | int | float | bool):
            return item
        raise TypeError(f"state at {place or 'top'}: {type(item).__name__} is neither a JSON value nor a tensor")

    return visit(value, ""), tensors


def from_files(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `to_files`; tuples come back as lists."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: from_files(item, tensors) for key, item in value.items()}
    return [from_files(item, tensors) for item in value] if isinstance(value, list) else value


def _write_state(folder: Path, name: str, value: Any) -> None:
    plain, tensors = to_files(value)
    (folder / f"{name}.json").write_text(json.dumps(plain, sort_keys=True), encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")


def _read_state(folder: Path, name: str) -> Any:
    plain = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return from_files(plain, safetensors.torch.load_file(folder / f"{name}.safetensors"))


# Checkpoints ---------------------------------------------------------------------------------------------------------


class CheckpointStore:
    """The checkpoints of one stage.

    Args:
        folder: holds `step-000100/` and so on.
        keep: how many of the latest stay; older ones are deleted.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest_step(self) -> int | None:
        """The step to go on from, or None."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:06d}"

    def save(self, state: _State, parts: Mapping[str, Stateful], *, pinned: Collection[int] = ()) -> Path:
        """Writes the checkpoint of `state.step` and deletes those that are neither among the latest nor pinned.

        All processes call it; the first one writes.
        """
        weights, moments = _weights(state), _moments(state)
        own_plain, own_tensors = to_files({name: part.state_dict() for name, part in parts.items()})
        plain = distributed.gather_bytes(json.dumps(own_plain, sort_keys=True).encode())
        tensors = distributed.gather_bytes(safetensors.torch.save(own_tensors))
        path = self.path(state.step)
        if distributed.rank() == 0:
            about = {"format": FORMAT, "step": state.step, "stopped": state.stopped, "processes": len(plain)}
            with write_folder(path) as beside:
                safetensors.torch.save_file(weights, beside / "weights.safetensors")
                safetensors.torch.save_file(moments, beside / "optimizer.safetensors")
                (beside / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
                for number, (text, held) in enumerate(zip(plain, tensors, strict=True)):
                    (beside / f"parts-{number}.json").write_bytes(text)
                    (beside / f"parts-{number}.safetensors").write_bytes(held)
            self._prune({*self.steps()[-self.keep :], *pinned, state.step})
        distributed.barrier()
        return path

    def _prune(self, kept: Collection[int]) -> None:
        with explained(self.folder):
            for step in self.steps():
                if step not in kept:
                    shutil.rmtree(self.path(step))

    def resume(self, state: _State, parts: Mapping[str, Stateful]) -> bool:
        """Goes on from the latest checkpoint; False when there is none."""
        step = self.latest_step()
        if step is None:
            return False
        self.load(step, state, parts)
        return True

    def load(self, step: int, state: _State, parts: Mapping[str, Stateful]) -> None:
        """Puts everything back as it was when the checkpoint of `step` was written.

        Raises:
            RunError: it is of another layout, of another number of processes, or of other parameters or parts.
        """
        folder = self.path(step)
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise RunError(
                f"{folder}: layout {about['format']}, this version reads {FORMAT}; start a new run directory"
            )
        if about["processes"] != distributed.world_size():
            raise RunError(
                f"{folder}: written by {about['processes']} processes, and now there are {distributed.world_size()}; "
                "go on with as many as before"
            )
        held = _read_state(folder, f"parts-{distributed.rank()}")
        if held.keys() != parts.keys():
            odd = ", ".join(sorted(held.keys() ^ parts.keys()))
            raise RunError(f"{folder}: it and this run differ in {odd}; start a new run directory")
        self.load_weights(state, step)
        _load_moments(state, safetensors.torch.load_file(folder / "optimizer.safetensors"), folder)
        for name, part in parts.items():
            part.load_state_dict(held[name])
        state.step, state.stopped = about["step"], about["stopped"]

    def load_weights(self, state: _State, step: int) -> None:
        """Puts back the weights that train, and nothing else."""
        folder = self.path(step)
        weights = safetensors.torch.load_file(folder / "weights.safetensors")
        parameters = trained_parameters(state.optimizer)
        if odd := sorted(weights.keys() ^ parameters.keys()):
            raise RunError(f"{folder}: it and this run train different weights ({odd[0]}); start a new run directory")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if weights[name].shape != parameter.shape:
                    raise RunError(
                        f"{folder}: {name} is {list(weights[name].shape)} there and {list(parameter.shape)} here; "
                        "start a new run directory"
                    )
                parameter.copy_(distributed.spread_like(weights[name], parameter))


def _weights(state: _State) -> dict[str, Tensor]:
    return {
        name: whole(parameter.detach()).cpu().contiguous()
        for name, parameter in trained_parameters(state.optimizer).items()
    }


def _moments(state: _State) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": whole(value).cpu().contiguous()
        for name, parameter in trained_parameters(state.optimizer).items()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def _load_moments(state: _State, moments: Mapping[str, Tensor], folder: Path) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for place, value in moments.items():
        name, _, key = place.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    parameters = trained_parameters(state.optimizer)
    if odd := sorted(by_name.keys() - parameters.keys()):
        raise RunError(f"{folder}: holds optimizer state of {odd[0]}, which does not train; start a new run directory")
    state.optimizer.state.clear()
    for name, parameter in parameters.items():
        # The count of steps is no share of anything; the moments lie as their parameter does.
        state.optimizer.state[parameter] = {
            key: value.to(parameter.device) if key == "step" else distributed.spread_like(value, parameter)
            for key, value in by_name.get(name, {}).items()
        }


# Batches -------------------------------------------------------------------------------------------------------------


def save_batches(folder: Path, batches: Sequence[Batch], about: Mapping[str, Any]) -> None:
    """Writes micro-batches and a few words on them as a folder that `load_batches` reads back."""
    rows = [
        {
            "tree": {spec.name: getattr(batch.tree, spec.name) for spec in fields(TokenTree)},
            "units": batch.units,
            "ref_logprobs": batch.ref_logprobs,
            "extras": batch.extras,
            "names": list(batch.names),
        }
        for batch in batches
    ]
    with write_folder(folder) as beside:
        _write_state(beside, "batches", {"about": about, "batches": rows})


def load_batches(folder: Path) -> tuple[list[Batch], dict[str, Any]]:
    """The inverse of `save_batches`: the micro-batches, and what was said of them."""
    held = _read_state(folder, "batches")
    batches = [
        Batch(TokenTree(**row["tree"]), row["units"], row["ref_logprobs"], row["extras"], tuple(row.get("names", ())))
        for row in held["batches"]
    ]
    return batches, held["about"]
