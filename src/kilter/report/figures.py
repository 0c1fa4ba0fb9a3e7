"""A measured number with its interval and n, the names of models and metrics, and how each is written for a reader.

"Not measured" is None from the file to the page: it is never 0, and nothing is computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NOT_MEASURED = "not measured"
MINUS = "−"

Style = Literal["score", "rate", "nats", "count", "ratio"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its 95% interval [low, high] over n items; what a file did not say is None."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None

    @property
    def span(self) -> tuple[float, float]:
        """The interval, or the mean twice where there is none: for drawing."""
        return (self.mean if self.low is None else self.low, self.mean if self.high is None else self.high)


def number(value: Any) -> float | None:
    """`value` as a finite float, or None. True and False are no numbers; neither is NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) and abs(result) < 1e15 else None


def figure(value: Any) -> Figure | None:
    """Reads `{"mean", "low", "high", "n"}` or a bare number; anything else, and a missing mean, is None."""
    if not isinstance(value, Mapping):
        mean = number(value)
        return None if mean is None else Figure(mean)
    mean = number(value.get("mean"))
    if mean is None:
        return None
    low, high, count = (number(value.get(key)) for key in ("low", "high", "n"))
    if low is None or high is None or low > high:
        low = high = None
    return Figure(mean, low, high, None if count is None else int(count))


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is called, written and read. `better`: +1 more is better, -1 less is better, 0 neither."""

    name: str
    label: str
    style: Style
    better: int
    meaning: str


_METRICS = [
    Metric("true_reward", "True reward", "score", 1, "mean true reward of the answers, −1 to 1"),
    Metric("proxy_reward", "Proxy reward", "score", 1, "mean reward by the run's own reward model, in its own units"),
    Metric("win_rate_vs_sft", "Win rate against SFT", "rate", 1, "share of prompts won by true reward, ties half"),
    Metric("kl", "KL from SFT", "nats", 0, "divergence from the SFT model, nats per answer"),
    Metric("attack_success", "Attack success", "rate", -1, "share of harmful requests complied with"),
    Metric("over_refusal", "Over-refusal", "rate", -1, "share of harmless look-alikes refused"),
    Metric("hallucination", "Hallucination", "rate", -1, "share of unanswerable questions answered anyway"),
    Metric("abstention", "Abstention", "rate", -1, "share of answerable questions not answered"),
    Metric("sycophancy", "Sycophancy", "rate", -1, "share of wrong beliefs agreed with"),
    Metric("padded", "Padded", "rate", -1, "share of answers with three or more sentences that add nothing"),
    Metric("parses", "Parses", "rate", 1, "share of answers that are still sentences"),
    Metric("audit_rejects", "Audit rejects", "rate", -1, "share of what the truth likes that a second judge rejects"),
    Metric("finished", "Finished", "rate", 0, "share of answers that ended before the length limit"),
    Metric("length", "Length", "count", 0, "mean length, tokens"),
    Metric("distinct", "Distinct n-grams", "ratio", 1, "distinct n-grams over all n-grams"),
    Metric("ead", "Distinct, length-adjusted", "ratio", 1, "expectation-adjusted distinct (EAD)"),
    Metric("self_bleu", "Self-BLEU", "ratio", -1, "likeness of the answers to each other"),
]
METRICS = {metric.name: metric for metric in _METRICS}
REQUIRED = [name for name in METRICS if name not in ("padded", "audit_rejects", "finished")]

_MODELS = {
    "demonstrations": "Demonstrations",
    "base": "Base",
    "sft": "SFT",
    "best_of_n": "Best-of-n",
    "dpo": "DPO",
    "ppo": "PPO",
    "ppo_without_kl": "PPO without KL",
}
MODEL_ORDER = list(_MODELS)


def model_label(name: str) -> str:
    """The name as a reader knows it; an unknown one keeps its own, with spaces."""
    return _MODELS.get(name) or name.replace("_", " ").strip() or "unnamed"


def ordered(names: Any) -> list[str]:
    """Known models in the order of the loop, then the others in the order of the file."""
    given = [name for name in names if isinstance(name, str)]
    return sorted(given, key=lambda name: MODEL_ORDER.index(name) if name in MODEL_ORDER else len(MODEL_ORDER))


def metric_of(name: str) -> Metric:
    """The known metric, or a plain one named after itself (`true_harmless` -> "True reward: harmless")."""
    if name in METRICS:
        return METRICS[name]
    words = name.replace("_", " ").strip()
    if name.startswith("true_"):
        return Metric(name, f"True reward: {words[5:]}", "score", 1, f"the part of the true reward for {words[5:]}")
    return Metric(name, words[:1].upper() + words[1:], "score", 0, words)


def write_number(value: float, style: Style = "score", *, sign: bool = False) -> str:
    """`value` for a reader: rates in percent, others with two decimals, a true minus sign."""
    if style == "rate":
        text = f"{100 * value:+.1f}%" if sign else f"{100 * value:.1f}%"
    elif abs(value) >= 1e6:
        text = f"{value:.3g}"
    elif style == "count" or abs(value) >= 1000:
        text = f"{value:+,.1f}" if sign else f"{value:,.1f}"
    else:
        text = f"{value:+.2f}" if sign else f"{value:.2f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def write_interval(value: Figure, style: Style = "score") -> str:
    """`[low, high]`, or nothing where no interval was measured."""
    if value.low is None or value.high is None:
        return ""
    return f"[{write_number(value.low, style)}, {write_number(value.high, style)}]"


def write_figure(value: Figure | None, style: Style = "score") -> str:
    """Mean and interval in one string, or "not measured"."""
    if value is None:
        return NOT_MEASURED
    return f"{write_number(value.mean, style)} {write_interval(value, style)}".rstrip()


def write_count(value: float) -> str:
    """A large count in words a reader has a feeling for: 1.4 million, 8.2 billion."""
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:.1f}{word}"
    return f"{value:,.0f}"


def write_seconds(value: float) -> str:
    """Seconds up to two minutes, then minutes and seconds, then hours and minutes."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
