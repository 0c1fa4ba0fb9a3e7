"""Measuring models: answers to held-out prompts, flags and rewards per answer, figures with n and interval."""

from kilter.evals.answers import Answer, read_answers, write_answers
from kilter.evals.figures import by_kind, figures, win_rate

__all__ = ["Answer", "by_kind", "figures", "read_answers", "win_rate", "write_answers"]
