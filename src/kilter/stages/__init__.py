"""Stages: the only place where source, objective, loop, run directory and report meet."""

from kilter.stages.plan import plan
from kilter.stages.prefer import check_losses
from kilter.stages.reinforce import check_algorithms
from kilter.stages.run import run_recipe
from kilter.stages.scoring import check_rewards

__all__ = ["check_algorithms", "check_losses", "check_rewards", "plan", "run_recipe"]
