"""Shards a trunk over processes with FSDP2: each decoder layer by itself, everything else with the trunk."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from kilter.models.load import whole
from kilter.models.trunk import Trunk

__all__ = ["shard", "whole"]


def shard(trunk: Trunk, **options: Any) -> Trunk:
    """Shards the trunk in place and returns it; `options` go to `torch.distributed.fsdp.fully_shard` (mesh, ...).

    Language head, embeddings and scalar heads belong to the trunk's own group, which stays whole from its forward to
    its backward, where the head is computed again.
    """
    for module in list(trunk.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **options)
    fully_shard(trunk, **options)
    return trunk
