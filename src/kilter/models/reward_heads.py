"""What a reward model's folder says of its heads: their names, and how their numbers make one reward.

Heads on one model are the labels of one `AutoModelForSequenceClassification`. Heads with adapters of their own stand
in `members/`, beside the average of their weights as an ordinary reward model of one label (WARM: Rame et al. 2024,
arXiv 2401.12187), and need the model that the adapters were trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kilter.errors import ModelError
from kilter.models.adapters import load_adapter
from kilter.models.load import load_model
from kilter.models.trunk import Trunk

MEMBERS = "members"
REWARD = "reward"
"""The role of a reward model with one head, and what the roles of several begin with."""


@dataclass(frozen=True, slots=True)
class RewardHeads:
    """The heads of a reward model, in their order."""

    labels: tuple[str, ...] = (REWARD,)
    kind: str = "one"
    usual: tuple[float, ...] = ()
    """What each head says on average of responses that were held out."""
    combine: Mapping[str, Any] = field(default_factory=dict)
    """How their numbers make one, as a recipe says it."""
    base: str = ""
    """The model that their adapters were trained on; empty: they read one model."""

    @property
    def roles(self) -> tuple[str, ...]:
        """One for each head."""
        return (REWARD,) if len(self.labels) == 1 else tuple(f"{REWARD}_{at}" for at in range(len(self.labels)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def heads_of(folder: str | Path) -> RewardHeads:
    """What a folder says; of a foreign reward model, a hub name or one head: the one."""
    about = Path(folder) / "kilter.json"
    held = json.loads(about.read_text(encoding="utf-8")).get("heads") if about.is_file() else None
    if held is None:
        return RewardHeads()
    return RewardHeads(tuple(held["labels"]), held["kind"], tuple(held["usual"]), held["combine"], held["base"])


def load_members(folder: str | Path, *, compute_dtype: torch.dtype | None = None) -> Trunk:
    """All heads of a reward model whose heads have adapters of their own, on the model that they were trained on.

    Raises:
        ModelError: that model is not there, or is another one by now.
    """
    heads = heads_of(folder)
    if not Path(heads.base).is_dir():
        raise ModelError(
            f"{folder}: its adapters were trained on {heads.base}, which is not there; put it back, or use a copy of "
            "the folder without kilter.json: the average of its heads"
        )
    trunk = Trunk({REWARD: load_model(heads.base)}, {}, compute_dtype=compute_dtype)
    for place, role in enumerate(heads.roles):
        load_adapter(trunk, role, Path(folder) / MEMBERS / str(place), model=REWARD)
    return trunk
