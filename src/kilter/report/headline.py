"""The one sentence of the first screen, made from the figures.

A difference is called a gain or a loss only where its 95% interval excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from kilter import stats
from kilter.report.figures import Figure, figure, model_label, number, write_figure, write_number
from kilter.report.files import Row, RunFiles, text_of

Verdict = Literal["rose", "fell", "unclear", "not measured"]


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of one model against SFT: the two figures, their difference and how it was taken."""

    before: Figure | None
    after: Figure | None
    difference: Figure | None
    how: str

    @property
    def verdict(self) -> Verdict:
        """What the 95% interval of the difference allows to say."""
        if self.difference is None:
            return "not measured"
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return "unclear"
        return "rose" if low > 0 else "fell" if high < 0 else "unclear"


def change_from_sft(run: RunFiles, model: str, metric: str) -> Change:
    """The change of `metric` from SFT to `model`: given, paired by prompt, or from the two intervals, in this order."""
    measured, sft = run.models.get(model, {}), run.models.get("sft", {})
    before, after = figure(sft.get(metric)), figure(measured.get(metric))
    given = figure(measured.get("gain_vs_sft")) if metric == "true_reward" else None
    if given is not None:
        return Change(before, after, given, "paired by prompt")
    paired = paired_difference(run.evaluated.get(model, []), run.evaluated.get("sft", []), metric)
    if paired is not None:
        return Change(before, after, paired, "paired by prompt")
    return Change(before, after, unpaired_difference(before, after), "from the two intervals, unpaired")


def paired_difference(rows: Sequence[Row], other: Sequence[Row], metric: str) -> Figure | None:
    """Mean over shared prompts of (rows - other), with its 95% t interval.

    Answers of one prompt are averaged first, so n counts prompts. None below two shared prompts.
    """
    mine, theirs = _by_prompt(rows, metric), _by_prompt(other, metric)
    shared = [key for key in mine if key in theirs]
    if len(shared) < 2:
        return None
    return Figure(*stats.paired_difference([mine[key] for key in shared], [theirs[key] for key in shared]))


def unpaired_difference(before: Figure | None, after: Figure | None) -> Figure | None:
    """after - before; the half-widths add in squares, as for independent samples. No interval where one is missing."""
    if before is None or after is None:
        return None
    mean = after.mean - before.mean
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Figure(mean)
    low = mean - math.hypot(after.mean - after.low, before.high - before.mean)
    high = mean + math.hypot(after.high - after.mean, before.mean - before.low)
    return Figure(mean, low, high)


def _by_prompt(rows: Sequence[Row], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        key, value = text_of(row.get("prompt_id")), number(row.get(metric))
        if key and value is not None:
            values.setdefault(key, []).append(value)
    return {key: fmean(found) for key, found in values.items()}


def hero(models: Mapping[str, Any]) -> str | None:
    """The model the run was made for: PPO, else DPO, else best-of-n, else the last one that is no starting point."""
    for name in ("ppo", "dpo", "best_of_n"):
        if name in models:
            return name
    others = [name for name in models if name not in ("demonstrations", "base", "sft", "ppo_without_kl")]
    return others[-1] if others else None


def headline(run: RunFiles) -> str:
    """One plain sentence: what alignment gained in truth, and what the run without a brake did to proxy and truth."""
    name = hero(run.models)
    if name is None:
        return "Nothing to compare yet: no aligned model was measured in this run."
    parts = [_gain(run, name)]
    if "ppo_without_kl" in run.models:
        parts.append(_without_kl(run))
    return "; ".join(parts) + "."


def _gain(run: RunFiles, name: str) -> str:
    label = model_label(name)
    change = change_from_sft(run, name, "true_reward")
    if change.difference is None:
        return _proxy_gain(run, name)
    size = write_number(abs(change.difference.mean))
    way = _from_to(change)
    if change.verdict == "rose":
        return f"{label} gained {size} over SFT in true reward{way}"
    if change.verdict == "fell":
        return f"{label} did not gain: it lost {size} against SFT in true reward{way}"
    return f"{label} did not clearly gain over SFT in true reward: the difference is {write_figure(change.difference)}"


def _proxy_gain(run: RunFiles, name: str) -> str:
    """Where there is no truth (a real run), the proxy is all there is, and the sentence says what that is worth."""
    label = model_label(name)
    change = change_from_sft(run, name, "proxy_reward")
    if change.difference is None:
        return f"Whether {label} gained over SFT was not measured"
    verb = {"rose": "raised", "fell": "lowered"}.get(change.verdict)
    if verb is None:
        return f"{label} did not clearly move its own reward model’s score ({write_figure(change.difference)} over SFT)"
    size = write_number(abs(change.difference.mean))
    end = "; true reward was not measured, so this is no proof of gain"
    return f"{label} {verb} its own reward model’s score by {size} over SFT{end}"


def _from_to(change: Change) -> str:
    """Where it went from and to; left out where unscored answers make the paired difference another one."""
    if change.before is None or change.after is None or change.difference is None:
        return ""
    if abs(change.after.mean - change.before.mean - change.difference.mean) > 0.01:
        return ""
    return f" ({write_number(change.before.mean)} → {write_number(change.after.mean)})"


def _without_kl(run: RunFiles) -> str:
    proxy = change_from_sft(run, "ppo_without_kl", "proxy_reward")
    true = change_from_sft(run, "ppo_without_kl", "true_reward")
    if proxy.after is None or proxy.difference is None:
        return "what happens without the KL penalty was not measured"
    level = write_number(proxy.after.mean)
    if proxy.verdict != "rose":
        return f"without the KL penalty its proxy reward did not clearly rise ({level}), so this run shows no gaming"
    begin = f"without the KL penalty it raised its proxy reward to {level}"
    if true.after is None or true.difference is None:
        return f"{begin}, and what that did to true reward was not measured"
    truth = write_number(true.after.mean)
    if true.verdict == "fell":
        return f"{begin} while true reward fell to {truth}"
    if true.verdict == "rose":
        return f"{begin} and true reward rose too, to {truth}: this run shows no gaming"
    return f"{begin} while true reward ({truth}) did not clearly move from SFT’s"
