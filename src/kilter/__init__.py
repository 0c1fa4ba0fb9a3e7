"""Kilter: from a base language model and preferences to an aligned model, with the evidence that it is aligned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilter.config import Recipe
    from kilter.rundir import RunDir

__version__ = "0.1.0"
__all__ = ["__version__", "align", "recipe"]


def recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file or from plain values. Raises ConfigError: place, key, rule, remedy."""
    from kilter import config

    return config.parse(source, "recipe") if isinstance(source, Mapping) else config.load(Path(source))


def align(source: Recipe | str | Path | Mapping[str, Any], out: str | Path | None = None) -> RunDir:
    """Run a recipe and return its run directory: what `kilter align` does.

    Args:
        source: a recipe, the path of one, or its plain values.
        out: folder of the run; default runs/<name>. A run that was killed there goes on.
    """
    from kilter.config import Recipe
    from kilter.stages import run_recipe

    found = source if isinstance(source, Recipe) else recipe(source)
    return run_recipe(found, Path(out) if out is not None else Path("runs") / found.name)
