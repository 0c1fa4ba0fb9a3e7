"""Policies kept along a training run, for the picture of reward against KL."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kilter.models.save import save_causal_lm
from kilter.models.trunk import Trunk
from kilter.stages.context import Context
from kilter.stages.training import Equipment


def snapshot_places(steps: int, count: int) -> set[int]:
    """`count` places among `steps`, the last left out: it is the result. Denser at the start, where KL grows."""
    found = {max(1, round(steps * ((at + 1) / (count + 1)) ** 1.5)) for at in range(count)}
    return {place for place in found if place < steps}


class Snapshots:
    """Keeps the role "policy" at some steps, in `snapshots/step-000100/` of the stage's folder."""

    def __init__(self, context: Context, trunk: Trunk, equipment: Equipment, steps: Collection[int]) -> None:
        self.folder = snapshot_folder(context.folder.path)
        self._trunk, self._equipment, self._steps = trunk, equipment, steps

    def look(self, step: int) -> None:
        """Keep the policy when it is due. A run that goes on from before this step writes the same bytes again."""
        if step in self._steps:
            folder = self.folder / f"step-{step:06d}"
            save_causal_lm(self._trunk, "policy", folder, self._equipment.template())


def snapshot_folder(stage: Path) -> Path:
    """Where a stage keeps them."""
    return stage / "snapshots"


def snapshots_in(stage: Path) -> list[tuple[int, Path]]:
    """(step, folder) of those that are there, in order."""
    folder = snapshot_folder(stage)
    found = [path for path in folder.glob("step-*") if (path / "kilter.json").exists()] if folder.is_dir() else []
    return sorted((int(path.name.removeprefix("step-")), path) for path in found)
