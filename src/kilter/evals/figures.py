"""Figures of a model from its answers: each `{mean, low, high, n}`, or None where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kilter.evals.answers import Answer
from kilter.stats import Interval, diversity, mean_interval, proportion

DIVERSITY_SHARE = 50  # answers in one diversity figure; several shares give the interval


def figures(answers: Sequence[Answer]) -> dict[str, Interval | None]:
    """Every figure of one model.

    Rewards, KL and length are means with 95% t-intervals; flags are shares with 95% Wilson intervals over the answers
    to which they apply; diversity is the mean over shares of 50 answers, so that its size does not depend on n.
    """
    made: dict[str, Interval | None] = {
        "true_reward": _mean(answers, lambda answer: answer.true_reward),
        "proxy_reward": _mean(answers, lambda answer: answer.proxy_reward),
        "kl": _mean(answers, lambda answer: answer.kl),
        "length": _mean(answers, lambda answer: float(answer.tokens) if answer.tokens else None),
        "finished": proportion(sum(answer.finished for answer in answers), len(answers)) if answers else None,
    }
    for part in sorted({name for answer in answers for name in answer.parts}):
        made[f"true_{part}"] = _mean(answers, lambda answer, part=part: answer.parts.get(part))  # type: ignore[misc]
    for flag in sorted({name for answer in answers for name in answer.flags}):
        seen = [value for answer in answers if (value := answer.flags.get(flag)) is not None]
        made[flag] = proportion(sum(seen), len(seen)) if seen else None
    texts = [answer.text for answer in answers]
    for name, function in (
        ("distinct", diversity.distinct_n),
        ("ead", diversity.ead),
        ("self_bleu", diversity.self_bleu),
    ):
        made[name] = _over_shares(texts, function)
    return made


def by_kind(answers: Sequence[Answer]) -> dict[str, dict[str, Interval | None]]:
    """True and proxy reward for each kind of prompt."""
    kinds = sorted({answer.prompt.kind for answer in answers})
    made = {}
    for kind in kinds:
        own = [answer for answer in answers if answer.prompt.kind == kind]
        made[kind] = {
            "true_reward": _mean(own, lambda answer: answer.true_reward),
            "proxy_reward": _mean(own, lambda answer: answer.proxy_reward),
        }
    return made


def win_rate(answers: Sequence[Answer], reference: Sequence[Answer]) -> Interval | None:
    """Share of prompts on which the true reward is above the reference's; a tie counts one half."""
    base = {answer.prompt.id: answer.true_reward for answer in reference}
    wins = []
    for answer in answers:
        other = base.get(answer.prompt.id)
        if answer.true_reward is not None and other is not None:
            wins.append(0.5 if answer.true_reward == other else float(answer.true_reward > other))
    return mean_interval(wins) if wins else None


def _mean(answers: Sequence[Answer], value: Callable[[Answer], float | None]) -> Interval | None:
    values = [found for answer in answers if (found := value(answer)) is not None]
    return mean_interval(values) if values else None


def _over_shares(texts: Sequence[str], function: Callable[[Sequence[str]], float]) -> Interval | None:
    shares = [texts[at : at + DIVERSITY_SHARE] for at in range(0, len(texts), DIVERSITY_SHARE)]
    values = [function(share) for share in shares if len(share) == DIVERSITY_SHARE or len(shares) == 1]
    return mean_interval(values) if values and texts else None
