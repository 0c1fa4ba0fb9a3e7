"""Adapter folders: one role's LoRA weights and head, in peft's layout, tied to the trunk they were trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from kilter.errors import ModelError
from kilter.models.heads import ScalarHead
from kilter.models.load import weights_hash, whole
from kilter.models.roles import Lora, Role, add_adapter, lora_layers
from kilter.models.trunk import Trunk, hidden_size
from kilter.rundir import write_folder, write_json

WEIGHTS, HEAD = "adapter_model.safetensors", "head.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter's folder holds, gathered from all processes and ready to be written by one."""

    weights: dict[str, Tensor]
    head: Tensor | None
    config: Any
    about: dict[str, str]

    def write(self, folder: Path) -> None:
        """Into a folder that is made here."""
        folder.mkdir(exist_ok=True)
        save_file(self.weights, folder / WEIGHTS, metadata={"format": "pt"})
        if self.head is not None:
            save_file({"score.weight": self.head}, folder / HEAD)
        self.config.save_pretrained(str(folder))
        write_json(folder / "kilter.json", self.about)


def gather_adapter(trunk: Trunk, role: str) -> AdapterFiles:
    """A role's adapter and head; of a sharded trunk on every process, which all must ask.

    Raises:
        ModelError: the role is held without an adapter.
    """
    held = trunk.roles[role]
    if held.adapter is None:
        raise ModelError(f"role {role!r} is no adapter; save it as a whole model")
    model: Any = trunk.models[held.model]
    prefix = _prefix(model)
    layers = {name: layer for name, layer in lora_layers(model).items() if held.adapter in layer.lora_A}
    weights = {}
    for name, layer in layers.items():
        for part, module in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            value = module[held.adapter].weight.detach()
            weights[f"base_model.model.{prefix}{name}.{part}.weight"] = whole(value).contiguous()
    first = next(iter(layers.values()))
    config = peft.LoraConfig(
        r=first.r[held.adapter],
        lora_alpha=first.lora_alpha[held.adapter],
        target_modules=[prefix + name for name in layers],
        fan_in_fan_out=first.fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    head: Any = None if held.head is None else trunk.heads[held.head]
    about = {"role": role, "trunk": weights_hash(model)}
    return AdapterFiles(weights, None if head is None else whole(head.weight.detach()), config, about)


def save_adapter(trunk: Trunk, role: str, folder: str | Path) -> None:
    """Writes a role's adapter (and head) alone; plain peft loads it on the same base model."""
    files = gather_adapter(trunk, role)
    if is_writer():
        with write_folder(Path(folder)) as beside:
            files.write(beside)


def is_writer() -> bool:
    """Whether this process writes files: the first one, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def trained_on(folder: Path) -> str | None:
    """The hash of the trunk that the adapter in a folder was trained on; None: no adapter of Kilter's is there."""
    about = folder / "kilter.json"
    return json.loads(about.read_text(encoding="utf-8")).get("trunk") if about.is_file() else None


def load_adapter(trunk: Trunk, role: str, folder: str | Path, *, model: str, adapter: str | None = None) -> None:
    """Puts a saved adapter (and its head) on a model of the trunk, as a new role.

    Args:
        role: the new role's name; also of its head, if it has one.
        model: the name of the trunk's model it goes on.
        adapter: the adapter's name there; None: the role's.
    Raises:
        ModelError: no adapter of Kilter's in that folder, or it was trained on another trunk.
    """
    folder = Path(folder)
    base: Any = trunk.models[model]
    for file in ("kilter.json", "adapter_config.json", WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(f"{folder}: no {file} in it; give a folder that holds an adapter saved by Kilter")
    there, here = trained_on(folder), weights_hash(base)
    if there != here:
        raise ModelError(
            f"{folder}: this adapter was trained on the trunk {str(there)[:12]}, and here it would go on "
            f"{here[:12]}; load the model it was trained on, or use the merged model beside it"
        )
    config = peft.LoraConfig.from_pretrained(str(folder))
    prefix = _prefix(base)
    name = adapter or role
    targets = tuple(target.removeprefix(prefix) for target in sorted(config.target_modules))
    add_adapter(base, name, Lora(config.r, config.lora_alpha, targets), torch.Generator())
    weights = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for layer_name, layer in lora_layers(base).items():
            if name in layer.lora_A:
                stem = f"base_model.model.{prefix}{layer_name}"
                layer.lora_A[name].weight.copy_(weights.pop(f"{stem}.lora_A.weight"))
                layer.lora_B[name].weight.copy_(weights.pop(f"{stem}.lora_B.weight"))
        if weights:
            raise ModelError(f"{folder}: {sorted(weights)[0]} belongs to no layer of this trunk")
        head = None
        if (folder / HEAD).is_file():
            head = ScalarHead(hidden_size(base))
            head.weight.copy_(load_file(folder / HEAD)["score.weight"])
    trunk.add_role(role, Role(model, name, role if head is not None else None), head)


def _prefix(model: Any) -> str:
    """What comes before a layer's name in a causal language model, for a model that is only its decoder."""
    return "" if model.get_output_embeddings() is not None else f"{model.base_model_prefix}."
