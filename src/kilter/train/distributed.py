"""Several processes: what the loop needs of DDP and FSDP2, and nothing where there is one process.

Gradients are sums over all processes, divided once by the whole step's units. Ranks run equal numbers of micro-batches:
one that has run out gets empty batches, so that every collective finds all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from kilter.models.shard import shard
from kilter.models.trunk import Trunk
from kilter.tree import Batch, empty_batch

Item = TypeVar("Item")
Wrap = Literal["ddp", "fsdp2"]


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def wrap(trunk: Trunk, how: Wrap) -> nn.Module:
    """Spread a trunk over the processes: a whole copy each (`ddp`), or a share of every layer each (`fsdp2`).

    Say first which parameters train (`requires_grad`), and make the optimizer afterwards: FSDP2 puts new parameters in
    place of the old. Nothing inside the trunk may be called from outside.
    """
    if how == "ddp":
        return DistributedDataParallel(trunk)
    return shard(trunk)


def unwrap(trunk: nn.Module) -> nn.Module:
    """The trunk itself: to read its parameters and roles, never to run it."""
    return trunk.module if isinstance(trunk, DistributedDataParallel) else trunk


def lowered(trunk: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`Trunk.lowered` of a trunk that may be wrapped; nothing for any other module."""
    plain = unwrap(trunk)
    return plain.lowered() if isinstance(plain, Trunk) else contextlib.nullcontext()


def adding_in_place(trunk: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`Trunk.adding_in_place`; nothing for a wrapped trunk, whose gradients are exchanged, or any other module."""
    if not isinstance(trunk, Trunk) or isinstance(trunk, FSDPModule):
        return contextlib.nullcontext()
    return trunk.adding_in_place()


@contextlib.contextmanager
def exchange(trunk: nn.Module, *, last: bool) -> Iterator[None]:
    """Around one micro-batch: gradients are exchanged at the step's last one only."""
    if isinstance(trunk, FSDPModule):
        trunk.set_requires_gradient_sync(last)
        yield
    elif isinstance(trunk, DistributedDataParallel) and not last:
        with trunk.no_sync():
            yield
    else:
        yield


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def total_units(batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """How many of each unit the whole step holds, over all micro-batches and processes."""
    names = list(batches[0].units)
    counts = [sum(batch.units[name] for batch in batches) for name in names]
    if world_size() > 1:
        counts = total(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
    return dict(zip(names, counts, strict=True))


def level(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """The same batches with empty ones behind, so that every process has as many as the one that has most."""
    batches = list(batches)
    if world_size() > 1:
        most = torch.tensor(len(batches), device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        batches += [empty_batch(like=batches[0])] * (int(most) - len(batches))
    return batches


def share_of(items: Sequence[Item]) -> list[Item]:
    """This process's share of a list that all of them hold: every n-th item."""
    return list(items[rank() :: world_size()])


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """The inverse of `models.shard.whole`: this process's share of `value`, laid out as `like` is, on its device."""
    value = value.to(device=like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def gather_bytes(own: bytes) -> list[bytes]:
    """Every process's bytes, in the order of the ranks, at every process."""
    if world_size() == 1:
        return [own]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], device=device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    if own:
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    found = [torch.zeros_like(padded) for _ in range(world_size())]
    dist.all_gather(found, padded)
    return [bytes(row[: int(length)].cpu().numpy().tobytes()) for row, length in zip(found, lengths, strict=True)]


def gather_columns(own: Tensor) -> tuple[Tensor, int]:
    """Every process's float[K, M] side by side in the order of the ranks, at every process, in float64.

    Returns:
        (float64[K, sum of M], where this process's columns begin).
    """
    rows = [
        np.frombuffer(row).reshape(len(own), -1) for row in gather_bytes(own.detach().double().cpu().numpy().tobytes())
    ]
    whole = torch.from_numpy(np.concatenate(rows, axis=1)).to(own.device)
    return whole, sum(row.shape[1] for row in rows[: rank()])


def device_of(trunk: nn.Module) -> torch.device:
    """Where the trunk's parameters are."""
    parameter: Any = next(trunk.parameters())
    return torch.device(parameter.device)
