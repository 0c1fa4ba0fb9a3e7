"""Who draws the answers of a stage that samples from the policy it trains."""

from __future__ import annotations

import math

from kilter.config import OnlineStage, RlStage
from kilter.models.generation import NativeSampler, Sampler
from kilter.models.trunk import Trunk
from kilter.models.vllm_sampler import InProcess, VllmSampler
from kilter.models.vllm_server import Served
from kilter.rollout.collect import positions
from kilter.stages.training import Equipment


def sampler_of(stage: RlStage | OnlineStage, trunk: Trunk, equipment: Equipment) -> Sampler:
    """Of the role "policy", as the stage says."""
    if stage.sampler.engine == "native":
        return NativeSampler(trunk, "policy", batch_size=stage.sampling.batch_size)
    if stage.sampler.url:
        return VllmSampler(trunk, "policy", Served(stage.sampler.url))
    longest = positions(trunk, ["policy"])
    engine = InProcess(
        equipment.folder,
        rank=stage.lora.rank,
        dtype=stage.sampler.dtype,
        memory=stage.sampler.memory,
        max_tokens=None if math.isinf(longest) else int(longest),
    )
    return VllmSampler(trunk, "policy", engine)
