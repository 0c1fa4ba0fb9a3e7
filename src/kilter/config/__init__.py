"""Recipes: frozen pydantic models, one YAML file a run. Unknown keys are errors that name the nearest known one.

A recipe is a mapping of named stages. A stage names its inputs: an earlier stage, a file or folder, a hub name, or
`package.module:function`. So the whole loop, a part of it, or one stage alone are the same thing.
"""

from kilter.config.fields import (
    AuditConfig,
    Combine,
    DataRef,
    Heads,
    Lora,
    LossConfig,
    Model,
    Optim,
    PpoConfig,
    Precision,
    RewardLossConfig,
    SamplingConfig,
    Source,
)
from kilter.config.recipe import (
    Recipe,
    dump,
    explain,
    load,
    parse,
    read_yaml,
    stage_inputs,
)
from kilter.config.stages import (
    NO_REFERENCE,
    STAGES,
    BestOfNStage,
    Claim,
    CollectStage,
    EvalStage,
    OnlineStage,
    PreferStage,
    RewardStage,
    RlStage,
    SftStage,
    Stage,
)

__all__ = [
    "NO_REFERENCE",
    "STAGES",
    "AuditConfig",
    "BestOfNStage",
    "Claim",
    "CollectStage",
    "Combine",
    "DataRef",
    "EvalStage",
    "Heads",
    "Lora",
    "LossConfig",
    "Model",
    "OnlineStage",
    "Optim",
    "PpoConfig",
    "Precision",
    "PreferStage",
    "Recipe",
    "RewardLossConfig",
    "RewardStage",
    "RlStage",
    "SamplingConfig",
    "SftStage",
    "Source",
    "Stage",
    "dump",
    "explain",
    "load",
    "parse",
    "read_yaml",
    "stage_inputs",
]
