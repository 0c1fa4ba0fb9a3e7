"""Scorers: reward models, rules and functions behind one protocol, and the check that one prefers better to worse."""

from kilter.scorers.check import ScorerCheck, check_scorer
from kilter.scorers.load import load_function, load_scorer
from kilter.scorers.reward_model import RewardModelScorer, load_reward_scorer
from kilter.scorers.sheet import RuleSheet, load_rules

__all__ = [
    "RewardModelScorer",
    "RuleSheet",
    "ScorerCheck",
    "check_scorer",
    "load_function",
    "load_reward_scorer",
    "load_rules",
    "load_scorer",
]
