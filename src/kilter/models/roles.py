"""Roles: policy, reference, value and reward as names for (model, adapter, head), however they are held.

A role may be a full copy, a LoRA adapter on a shared trunk, the trunk with its adapters off, or a head on another
role's adapter. No algorithm knows which. Which adapter runs is an argument of the forward: it is captured in every
checkpointed function, so that the recomputation in the backward uses the adapter of its own forward (seen with peft's
`set_adapter`: it does not, and gradients are wrong by 100% without an error). No `requires_grad` is touched on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kilter.errors import ModelError
from kilter.models.load import whole
from kilter.models.low_rank import fuse_adapters
from kilter.models.quantized import dequantized, low_precision_layers, quantized_layers

ALL_LINEAR: Literal["all-linear"] = "all-linear"


@dataclass(frozen=True, slots=True)
class Role:
    """Where a role's numbers come from: a model of the trunk, an adapter on it (None: all off), maybe a scalar head."""

    model: str
    adapter: str | None = None
    head: str | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank adapter: `W + (alpha / rank) B A`, B zero at the start (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | Literal["all-linear"] = ALL_LINEAR
    """Names of layers that get one; "all-linear": every linear layer but the language head (not experts' weights)."""


class AdapterSwitch:
    """The one place that says which adapter the LoRA layers of a model use: all of them read the same list."""

    def __init__(self) -> None:
        self._active: list[str] = []

    def attach(self, model: nn.Module) -> None:
        """Makes the LoRA layers of `model` read this switch; call it again after adding an adapter."""
        layers = list(lora_layers(model).values())
        for layer in layers:
            layer._active_adapter = self._active
            layer._disable_adapters = False
        fuse_adapters(layers)

    @property
    def active(self) -> str | None:
        return self._active[0] if self._active else None

    @contextmanager
    def use(self, adapter: str | None) -> Iterator[None]:
        """Runs a block with this adapter (None: all off)."""
        before = self._active[:]
        self._active[:] = [] if adapter is None else [adapter]
        try:
            yield
        finally:
            self._active[:] = before


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """The linear layers of a model by name, without its language head; where one has an adapter, the layer below it."""
    head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
        inside = ".base_layer" in name or ".lora_" in name
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head and not inside:
            found[name] = layer
    return found


def add_adapter(model: nn.Module, name: str, lora: Lora, generator: torch.Generator) -> None:
    """Puts a LoRA adapter on a model, in place; all parameters keep their `requires_grad`, the adapter's are True.

    Args:
        generator: draws A (uniform, Kaiming with a = sqrt 5); B is zero, so nothing changes at first.
    Raises:
        ModelError: no layer has one of the names in `lora.targets`, or the name is taken.
    """
    if any(name in layer.lora_A for layer in lora_layers(model).values()):
        raise ModelError(f"adapter {name!r} is on this model already; choose another name")
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    linear = linear_layers(model)
    # Below a plain module, peft takes names as they are; given the model itself it turns the names of dense layers into
    # those of fused experts (Qwen3-MoE).
    holder = nn.ModuleDict({"model": model})
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[f"model.{name}" for name in linear] if lora.targets == ALL_LINEAR else list(lora.targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
    )
    try:
        peft.inject_adapter_in_model(config, holder, adapter_name=name)
    except ValueError as err:
        raise ModelError(f"adapter {name!r}: {err}; set `lora.targets` to names of the model's linear layers") from err
    for parameter, requires_grad in wanted.items():
        parameter.requires_grad_(requires_grad)
    for layer_name, layer in lora_layers(model).items():
        if name in layer.lora_A:
            if layer_name not in linear:
                raise ModelError(
                    f"adapter {name!r}: {layer_name} is not a linear layer; leave it out of `lora.targets`"
                )
            if layer.lora_A[name].weight.dtype in (torch.bfloat16, torch.float16):  # as peft makes it of such a base
                layer.lora_A[name].float(), layer.lora_B[name].float()
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(up)
            down.requires_grad_(True)
            up.requires_grad_(True)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the order of the model's layers."""
    found: list[nn.Parameter] = []
    for layer in lora_layers(model).values():
        if name in layer.lora_A:
            found += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    return found


def plain_tensors(model: Any, adapter: str | None, *, low_precision: bool = True) -> dict[str, Tensor]:
    """A model's weights and buffers under the names they have without LoRA layers, one adapter merged in.

    The merged weights are differentiable functions of the trunk's parameters: `W + (alpha / rank) B A`. Of a sharded
    model they are put together, on every process. Weights in 4 bits are made whole first, in the processor's memory.

    Args:
        low_precision: False: without the layers that are in 4 bits or in bfloat16 (`low_precision_layers`).
    """
    small = quantized_layers(model) if low_precision else low_precision_layers(model)
    held = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if ".lora_" not in name and not any(name.startswith(f"{layer}.") for layer in small)
    }
    tensors = {name.replace(".base_layer.", "."): whole(value) for name, value in held.items()}
    for name, layer in small.items() if low_precision else ():
        plain = name.removesuffix(".base_layer")
        tensors[f"{plain}.weight"] = dequantized(layer).cpu()
        if layer.bias is not None:
            tensors[f"{plain}.bias"] = layer.bias.cpu()
    for name, layer in lora_layers(model).items():
        if adapter is not None and adapter in layer.lora_A and f"{name}.weight" in tensors:
            weight = tensors[f"{name}.weight"]
            merged = weight + whole(layer.get_delta_weight(adapter)).to(weight.device)
            tensors[f"{name}.weight"] = merged.to(weight.dtype)
    return tensors


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model without those of its adapters."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
