"""Scorers: reward models and user functions behind one protocol, and the check that one prefers better to worse."""

from kilter.scorers.check import ScorerCheck, check_scorer
from kilter.scorers.load import load_function, load_scorer
from kilter.scorers.reward_model import RewardModelScorer, load_reward_scorer

__all__ = ["RewardModelScorer", "ScorerCheck", "check_scorer", "load_function", "load_reward_scorer", "load_scorer"]
