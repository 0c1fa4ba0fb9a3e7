"""Stages: the only place where source, objective, loop, run directory and report meet."""

from kilter.stages.plan import plan
from kilter.stages.prefer import check_losses
from kilter.stages.run import run_recipe

__all__ = ["check_losses", "plan", "run_recipe"]
