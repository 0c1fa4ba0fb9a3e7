"""The slider's answers and the answers before and after: what a figure sounds like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kilter import errors
from kilter.report.curve import Curve
from kilter.report.figures import figure, number, ordered
from kilter.report.files import Row, RunFiles, text_of

NUM_PROMPTS = 3
MOST_TOKENS = 400
MOST_CHARS = 4000
REWARD_LEVELS = 5  # shades on each side of the middle
KL_LEVELS = 5


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a prompt as shown."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """A token with its shade: reward -5..5 or None, KL 0..5 or None, and the numbers in words."""

    text: str
    reward: int | None
    kl: int | None
    told: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer at one point of a curve. `tokens` is empty when the file has no token figures."""

    prompt_id: str
    turns: tuple[Turn, ...]
    kind: str
    text: str
    tokens: tuple[Token, ...]
    cut: int
    true: float | None
    proxy: float | None


@dataclass(frozen=True, slots=True)
class Panel:
    """What the slider shows at one point of one method: `x` is sqrt(KL)."""

    method: str
    index: int
    step: float
    x: float
    kl: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Shading:
    """The scale of the token colours, over all tokens of all panels, so that shades can be compared.

    Reward is shaded around `middle` (the mean value under SFT, or of all tokens) up to `reach` on both sides, KL from 0
    to `most`; both ends are the 95th percentile of what occurs, and what lies beyond has the last shade.
    """

    middle: float | None
    reach: float
    most: float | None


@dataclass(frozen=True, slots=True)
class Slider:
    """All panels, the answers before (SFT's), and the colour scale."""

    panels: tuple[Panel, ...]
    before: Mapping[str, Answer]
    shading: Shading
    first: Panel | None

    @property
    def methods(self) -> list[str]:
        return ordered(dict.fromkeys(panel.method for panel in self.panels))


def visible(text: Any) -> str:
    """`errors.visible` of a value from a run's files."""
    return errors.visible(text_of(text))


def shorten(text: str, most: int = MOST_CHARS) -> str:
    """At most `most` characters; a cut is said."""
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most:,} more characters]"


def turns_of(prompt: Any) -> tuple[Turn, ...]:
    """A prompt's turns from `[{"role", "content"}]` or from plain text."""
    if isinstance(prompt, str):
        return (Turn("user", shorten(visible(prompt))),)
    items = prompt if isinstance(prompt, list) else []
    turns = [item for item in items if isinstance(item, Mapping)]
    return tuple(Turn(visible(turn.get("role")) or "?", shorten(visible(turn.get("content")))) for turn in turns)


def read_slider(run: RunFiles, curves: Sequence[Curve]) -> Slider:
    """The panels of `evaluation/answers.jsonl`: three prompts, every point of every method."""
    rows = [row for row in run.answers if isinstance(row.get("method"), str) and _kl(row) is not None]
    rows = _first_seed(rows)
    prompts = choose_prompts(rows)
    shading = _shading(rows)
    points: dict[tuple[str, float], list[Row]] = {}
    before: dict[str, Answer] = {}
    for row in rows:
        if text_of(row.get("prompt_id")) not in prompts:
            continue
        if row["method"] == "sft":
            before.setdefault(text_of(row.get("prompt_id")), _answer(row, shading))
        else:
            points.setdefault((row["method"], number(row.get("step")) or 0.0), []).append(row)
    panels: list[Panel] = []
    for method in ordered(dict.fromkeys(method for method, _ in points)):
        steps = sorted(step for name, step in points if name == method)
        panels += [
            _panel(method, index, step, points[method, step], prompts, shading) for index, step in enumerate(steps)
        ]
    return Slider(tuple(panels), before, shading, _first_panel(panels, curves))


def _kl(row: Row) -> float | None:
    value = figure(row.get("kl"))
    return None if value is None else value.mean


def _first_seed(rows: Sequence[Row]) -> list[Row]:
    """One seed's answers: two answers to one prompt at one point would stand for each other."""
    seeds = {text_of(row.get("seed")) for row in rows}
    first = min(seeds, default="")
    return [row for row in rows if text_of(row.get("seed")) in (first, "")]


def choose_prompts(rows: Sequence[Row]) -> list[str]:
    """Three prompts: those seen at most points, of different kinds where possible, in the order of the file."""
    counts: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for row in rows:
        key = text_of(row.get("prompt_id"))
        counts[key] = counts.get(key, 0) + 1
        kinds.setdefault(key, text_of(row.get("kind")))
    seen = list(counts)
    by_use = sorted(seen, key=lambda key: (-counts[key], seen.index(key)))
    chosen: list[str] = []
    for key in by_use:
        if kinds[key] not in {kinds[other] for other in chosen}:
            chosen.append(key)
    chosen += [key for key in by_use if key not in chosen]
    return sorted(chosen[:NUM_PROMPTS], key=seen.index)


def _panel(
    method: str, index: int, step: float, rows: Sequence[Row], prompts: Sequence[str], shading: Shading
) -> Panel:
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(text_of(row.get("prompt_id")), row)
    kl = fmean(value for row in rows if (value := _kl(row)) is not None)
    answers = tuple(_answer(found[key], shading) for key in prompts if key in found)
    return Panel(method, index, step, math.sqrt(max(kl, 0.0)), kl, answers)


def _first_panel(panels: Sequence[Panel], curves: Sequence[Curve]) -> Panel | None:
    """Where the slider begins: at the true peak of PPO without KL. To the right of it lies what gaming sounds like."""
    methods = [panel.method for panel in panels]
    for method in ("ppo_without_kl", "ppo", *methods):
        own = [panel for panel in panels if panel.method == method]
        if own:
            curve = next((curve for curve in curves if curve.method == method), None)
            peak = curve.peak.x if curve and curve.peak else own[-1].x
            return min(own, key=lambda panel: abs(panel.x - peak))
    return None


def _tokens(row: Row) -> list[Row]:
    tokens = row.get("tokens")
    return [token for token in tokens if isinstance(token, Mapping)] if isinstance(tokens, list) else []


def _shading(rows: Sequence[Row]) -> Shading:
    values = [value for row in rows for token in _tokens(row) if (value := number(token.get("value"))) is not None]
    kls = [value for row in rows for token in _tokens(row) if (value := number(token.get("kl"))) is not None]
    sft = [
        value
        for row in rows
        if row["method"] == "sft"
        for token in _tokens(row)
        if (value := number(token.get("value"))) is not None
    ]
    middle = fmean(sft or values) if values else None
    reach = 0.0 if middle is None else _percentile([abs(value - middle) for value in values])
    return Shading(middle, max(reach, 1e-6), max(_percentile([max(kl, 0.0) for kl in kls]), 1e-6) if kls else None)


def _percentile(values: Sequence[float], share: float = 0.95) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _answer(row: Row, shading: Shading) -> Answer:
    tokens = _tokens(row)
    return Answer(
        prompt_id=text_of(row.get("prompt_id")),
        turns=turns_of(row.get("prompt")),
        kind=visible(row.get("kind")),
        text=shorten(visible(row.get("text"))),
        tokens=tuple(_token(token, shading) for token in tokens[:MOST_TOKENS]),
        cut=max(0, len(tokens) - MOST_TOKENS),
        true=number(row.get("true_reward")),
        proxy=number(row.get("proxy_reward")),
    )


def _token(token: Row, shading: Shading) -> Token:
    value, kl = number(token.get("value")), number(token.get("kl"))
    reward_level = kl_level = None
    told = []
    if value is not None and shading.middle is not None:
        share = max(-1.0, min(1.0, (value - shading.middle) / shading.reach))
        reward_level = round(REWARD_LEVELS * share)
        told.append(f"reward {value:.2f}")
    if kl is not None and shading.most is not None:
        kl_level = round(KL_LEVELS * max(0.0, min(1.0, kl / shading.most)))
        told.append(f"KL {kl:.2f}")
    return Token(visible(token.get("text")), reward_level, kl_level, ", ".join(told).replace("-", "−"))


@dataclass(frozen=True, slots=True)
class Said:
    """What one model answered, for the page's before and after."""

    model: str
    text: str
    finished: bool
    true: float | None
    proxy: float | None


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """One prompt of a kind and what each model answered."""

    kind: str
    turns: tuple[Turn, ...]
    said: tuple[Said, ...]


def before_after(run: RunFiles, shown: Sequence[str]) -> list[BeforeAfter]:
    """For each kind the first prompt, in the order of the files, that most of the `shown` models answered.

    The choice looks at no answer and no score, so it cannot flatter any model.
    """
    answers: dict[str, dict[str, Row]] = {}
    for model in shown:
        for row in run.evaluated.get(model, []):
            answers.setdefault(text_of(row.get("prompt_id")), {}).setdefault(model, row)
    best: dict[str, dict[str, Row]] = {}
    for key, found in answers.items():
        kind = visible(next(iter(found.values())).get("kind"))
        if key and len(found) > len(best.get(kind, {})):
            best[kind] = found
    pairs = []
    for kind in sorted(best):
        found = best[kind]
        said = tuple(_said(model, found[model]) for model in shown if model in found)
        pairs.append(BeforeAfter(kind or "prompts", turns_of(next(iter(found.values())).get("prompt")), said))
    return pairs


def _said(model: str, row: Row) -> Said:
    true, proxy = number(row.get("true_reward")), number(row.get("proxy_reward"))
    return Said(model, shorten(visible(row.get("text")), 1200), row.get("finished") is not False, true, proxy)
