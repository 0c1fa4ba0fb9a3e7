"""Gradients of the two large tables, input embedding and language head, added where they belong.

Autograd makes each of them whole, [V, H], for every chunk of positions and every micro-batch, before it is added up.
With a large vocabulary these temporaries are most of what a step holds. Here both are added into `weight.grad` as they
come: by rows for the embedding, by a product that accumulates for the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kilter.models.forwards import replaced

LARGE = 1 << 22
"""Elements from which a table counts as large: 4.2 million, 16 MiB in float32. Below, nothing is gained."""
SLICE_ELEMENTS = 1 << 20
"""Elements of a head's gradient made at once where it is computed in another type than it is kept in."""


def adding_in_place(tables: Sequence[nn.Module | None], *, large: int = LARGE) -> AbstractContextManager[None]:
    """Inside, backwards add the gradients of these tables into their `weight.grad`; what is no plain, large,
    trainable table keeps its own way.

    Nothing else may wait for the gradient as autograd's: no hook on the weight, no `torch.autograd.grad`.

    Args:
        tables: embeddings and heads, None where a model has no head.
        large: see `LARGE`.
    """
    found = ((table, _in_place(table, large)) for table in tables if table is not None)
    return replaced([(table, forward) for table, forward in found if forward is not None])


def _in_place(table: nn.Module, large: int) -> Callable[[Tensor], Tensor] | None:
    """What a table does instead of its forward; None: it stays as it is."""
    if type(table) is nn.Embedding:
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            return None
    elif type(table) is not nn.Linear:
        return None
    weight = table.weight
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad or weight.numel() < large:
        return None
    # `table.weight` is read at each call: it may be a copy in another type, whose gradient is the weight's as well.
    if isinstance(table, nn.Embedding):
        return lambda ids: _apply(_Rows, ids, table.weight, weight, table.padding_idx)
    return lambda hidden: _apply(_Product, hidden, table.weight, weight, table.bias)


def _apply(function: Any, *args: Any) -> Tensor:
    found: Tensor = function.apply(*args)
    return found


def _grad_of(weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Rows(torch.autograd.Function):
    """`F.embedding`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, held: Tensor, weight: nn.Parameter, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (ids,), (rows,) = ctx.saved_tensors, grads
        ids, grad = ids.flatten(), _grad_of(ctx.weight)
        rows = rows.reshape(len(ids), -1).to(grad.dtype)
        if ctx.padding_idx is not None:
            kept = ids != ctx.padding_idx
            ids, rows = ids[kept], rows[kept]
        if grad.is_cuda:  # sorts first, where index_add_ adds in whatever order
            grad.index_put_((ids,), rows, accumulate=True)
        else:
            grad.index_add_(0, ids, rows)
        return None, None, None, None


class _Product(torch.autograd.Function):
    """`F.linear`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, held: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, held)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(hidden, held, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (hidden, held), (outer,) = ctx.saved_tensors, grads
        outer, flat, grad = outer.flatten(0, -2), hidden.flatten(0, -2), _grad_of(ctx.weight)
        if outer.dtype == grad.dtype == flat.dtype:
            grad.addmm_(outer.T, flat)
        else:
            step = max(1, SLICE_ELEMENTS // grad.shape[1])
            for at in range(0, len(grad), step):
                grad[at : at + step] += outer[:, at : at + step].T @ flat
        back = (outer @ held).view_as(hidden) if ctx.needs_input_grad[0] else None
        return back, None, None, outer.sum(0) if ctx.has_bias else None
