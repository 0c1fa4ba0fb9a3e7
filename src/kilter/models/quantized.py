"""A frozen trunk in fewer bits below adapters: bfloat16, or 4 bits (QLoRA): NF4 with double quantisation.

bfloat16 is what a step would round a float32 trunk to anyway: adapters on it learn the same bits. In NF4, by
bitsandbytes, each run of 64 weights of a linear layer is divided by its largest magnitude and rounded to the 16
quantiles of a normal distribution; the magnitudes are in 8 bits, with one float32 for 256 of them: 4.127 bits a weight
(Dettmers et al. 2023, arXiv 2305.14314, sections 2 and 3). Embeddings, norms and the language head stay in bfloat16,
and so is everything computed. What a model in 4 bits means is its weights made whole again, `dequantized`: they are
what its hash is of and what is merged with an adapter when it is saved.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from kilter.errors import ModelError
from kilter.models.forwards import replaced

Base = Literal["float32", "bfloat16", "nf4"]
"""How the frozen weights below an adapter are held."""


def library() -> Any:
    """bitsandbytes.

    Raises:
        ModelError: it is not installed, or does not start on this machine.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as err:
        raise ModelError(
            f"a base in 4 bits needs bitsandbytes ({err}); install kilter[gpu], or set precision.base to bfloat16"
        ) from err


def cast_base(model: Any, base: Base, linear: Mapping[str, nn.Module], device: torch.device | str) -> Any:
    """Puts a model's weights into `base`, in place: all into bfloat16, and linear layers then into NF4.

    Args:
        model: without adapters.
        linear: by name, those that "nf4" takes to 4 bits (`roles.linear_layers`: all but the language head).
        device: where those are made, one after another; all else stays where it is.
    Raises:
        ModelError: "nf4", and no bitsandbytes or no linear layer.
    """
    if base != "float32":
        layers = _to_quantize(model, linear) if base == "nf4" else {}
        for parameter in model.parameters():  # and no buffer: rotary frequencies stay float32
            parameter.data = parameter.data.to(torch.bfloat16)
        for name, layer in layers.items():
            model.set_submodule(name, _in_4_bits(layer).to(device))
            layer.weight = None  # type: ignore[assignment]
    return model


def _to_quantize(model: Any, linear: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    library()
    layers = {name: layer for name, layer in linear.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layers to hold in 4 bits (GPT-2's are convolutions); set "
            "precision.base to bfloat16 or float32"
        )
    return layers


def _in_4_bits(layer: nn.Linear) -> Any:
    nn4, options = library().nn, {"compress_statistics": True, "quant_type": "nf4"}
    small = nn4.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        device="meta",
        **options,
    )
    small.weight = nn4.Params4bit(layer.weight.detach(), requires_grad=False, blocksize=64, **options)
    small.bias = layer.bias
    return small


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's own weight is in 4 bits."""
    return getattr(layer._parameters.get("weight"), "quant_state", None) is not None


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that are in 4 bits, by name, that of the layer below it where one has an adapter."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def low_precision_layers(model: Any) -> dict[str, Any]:
    """The frozen linear layers in 4 bits or in bfloat16, by name as `quantized_layers`, without the language head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if is_quantized(module) or (module is not head and _is_frozen_bfloat16(module))
    }


def _is_frozen_bfloat16(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return isinstance(layer, nn.Linear | Conv1D) and weight is not None and _frozen_in_bfloat16(weight)


def _frozen_in_bfloat16(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.bfloat16 and not parameter.requires_grad


def base_of(model: nn.Module) -> Base:
    """How a model's frozen weights are held."""
    if quantized_layers(model):
        return "nf4"
    return "bfloat16" if any(_frozen_in_bfloat16(parameter) for parameter in model.parameters()) else "float32"


@contextmanager
def computing_in_float32(model: Any) -> Iterator[None]:
    """Inside, `low_precision_layers` multiply in float32, each making its weight whole as it does; then as before."""
    layers = low_precision_layers(model).values()
    before = [(layer, layer.compute_dtype) for layer in layers if is_quantized(layer)]
    widened = [(layer, partial(_widened, layer)) for layer in layers if not is_quantized(layer)]
    try:
        for layer, _ in before:
            layer.compute_dtype = torch.float32
        with replaced(widened):
            yield
    finally:
        for layer, dtype in before:
            layer.compute_dtype = dtype


def _widened(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    found: Tensor = _Widened.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Widened(torch.autograd.Function):
    """`x W' + b` in float32 of a frozen weight in bfloat16, made whole here and once more in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.float(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.float(), None, None


@torch.no_grad()
def dequantized(layer: Any) -> Tensor:
    """The weight of a layer in 4 bits, made whole: [out, in], in bfloat16."""
    found: Tensor = library().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


class Below(nn.Module):
    """Stands in an untouched model for one of `low_precision_layers`, by its weights: `W x + (alpha / rank) B A x`."""

    def __init__(self, layer: Any, adapter: str | None) -> None:
        super().__init__()
        self._held = (layer, adapter)  # a tuple: its weights are not parts of this module

    @property
    def weight(self) -> Tensor:
        """No model may read it: an adapter would not be in it, nor is it in float32."""
        raise ModelError(
            "the model reads the weights of a linear layer itself, which are held in fewer bits; set precision.base to "
            "float32, or use another model"
        )

    def forward(self, x: Tensor) -> Tensor:
        layer, adapter = self._held
        if adapter is None or adapter not in getattr(layer, "lora_A", {}):
            found: Tensor = getattr(layer, "base_layer", layer)(x)
            return found
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        low = F.linear(F.linear(x.to(down.dtype), down), up)
        whole: Tensor = layer.base_layer(x)
        out: Tensor = whole + layer.scaling[adapter] * low
        return out.to(whole.dtype)


def stand_ins(model: Any, adapter: str | None) -> dict[str, nn.Module]:
    """A `Below` for each of `low_precision_layers`, by the layer's name without adapters."""
    plain = [name.removesuffix(".base_layer") for name in low_precision_layers(model)]
    return {name: Below(model.get_submodule(name), adapter) for name in plain}
