"""Reward against distance from SFT: the curves of the picture, gathered over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kilter.report.figures import Figure, figure, number, ordered
from kilter.report.files import RunFiles, section, text_of

# Methods whose end point alone is drawn when a run has no curve file.
_END_POINTS = ("best_of_n", "dpo", "ppo", "ppo_without_kl")


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of a method: `x` is sqrt(KL) with KL in nats per answer; figures are None where not measured."""

    step: float
    x: float
    kl: Figure
    proxy: Figure | None
    true: Figure | None


@dataclass(frozen=True, slots=True)
class Curve:
    """A method's path away from SFT. With several seeds a figure's interval is the lowest and highest seed."""

    method: str
    points: tuple[CurvePoint, ...]
    seeds: int
    cut: bool = False
    """Drawn up to some distance only: the last point is interpolated and no measurement."""

    def until(self, x: float) -> Curve:
        """The curve up to `x`, with a last point interpolated there when it goes on; itself when it does not."""
        # The points are in order of steps; a curve that comes back is shown up to where it first leaves.
        beyond = next((point for point in self.points if point.x > x), None)
        if beyond is None:
            return self
        first_out = self.points.index(beyond)
        if first_out == 0:
            return self
        last = self.points[first_out - 1]
        share = (x - last.x) / (beyond.x - last.x)
        proxy, true = _between(last.proxy, beyond.proxy, share), _between(last.true, beyond.true, share)
        between = CurvePoint(last.step, x, Figure(x * x), proxy, true)
        return Curve(self.method, (*self.points[:first_out], between), self.seeds, cut=True)

    @property
    def peak(self) -> CurvePoint | None:
        """The point with the highest true reward, the first of equals; None when true reward was not measured."""
        known = [point for point in self.points if point.true is not None]
        return max(known, key=lambda point: point.true.mean if point.true else -math.inf, default=None)

    @property
    def end(self) -> CurvePoint:
        return self.points[-1]


def _between(a: Figure | None, b: Figure | None, share: float) -> Figure | None:
    if a is None or b is None:
        return None
    (a_low, a_high), (b_low, b_high) = a.span, b.span
    mean, low, high = (x + share * (y - x) for x, y in ((a.mean, b.mean), (a_low, b_low), (a_high, b_high)))
    return Figure(mean, low, high)


def close_up_reach(curves: Sequence[Curve]) -> float | None:
    """Where a close-up ends, in sqrt(KL): it is worth drawing when one method went much further than all others."""
    ends = sorted(max(point.x for point in curve.points) for curve in curves)
    if len(ends) < 2 or ends[-2] < 0.05 or ends[-1] < 1.7 * ends[-2]:
        return None
    return 1.06 * ends[-2]


def read_curves(run: RunFiles) -> list[Curve]:
    """The methods of `evaluation/curve.jsonl`, or the end points of `summary.json` where there is no such file.

    Every method starts from SFT, so SFT's own figures are put before a curve that begins later: its own point of the
    file, measured on the same prompts as the curves, or else the summary's.
    """
    rows: dict[str, dict[str, list[CurvePoint]]] = {}
    for row in run.curve:
        method, kl = row.get("method"), figure(row.get("kl"))
        if not isinstance(method, str) or kl is None:
            continue
        point = _point(number(row.get("step")) or 0.0, kl, row.get("proxy_reward"), row.get("true_reward"))
        rows.setdefault(method, {}).setdefault(text_of(row.get("seed"), "0"), []).append(point)
    measured = rows.pop("sft", {})
    start = _over_seeds(list(measured.values()))[0] if measured else _start(run)
    if not rows:
        return _end_points(run, start)
    curves = []
    for method in ordered(rows):
        points = _over_seeds(list(rows[method].values()))
        if start is not None and points and points[0].x > 0.1:
            points = [start, *points]
        curves.append(Curve(method, tuple(points), len(rows[method])))
    return [curve for curve in curves if curve.points]


def _point(step: float, kl: Figure, proxy: object, true: object) -> CurvePoint:
    # An estimate of a KL near 0 may be below 0; its root is drawn at 0 and the number is shown as it is.
    return CurvePoint(step, math.sqrt(max(kl.mean, 0.0)), kl, figure(proxy), figure(true))


def _start(run: RunFiles) -> CurvePoint | None:
    sft = run.models.get("sft", {})
    point = _point(0.0, Figure(0.0), sft.get("proxy_reward"), sft.get("true_reward"))
    return point if point.proxy or point.true else None


def _end_points(run: RunFiles, start: CurvePoint | None) -> list[Curve]:
    curves = []
    for method in _END_POINTS:
        measured = section(section(run.summary, "models"), method)
        kl = figure(measured.get("kl"))
        if kl is None:
            continue
        end = _point(1.0, kl, measured.get("proxy_reward"), measured.get("true_reward"))
        curves.append(Curve(method, (start, end) if start else (end,), 1))
    return curves


def _over_seeds(seeds: Sequence[list[CurvePoint]]) -> list[CurvePoint]:
    """One curve from each seed's. Steps that some seed lacks are left out: a mean over changing seeds jumps."""
    if len(seeds) == 1:
        return sorted({point.step: point for point in seeds[0]}.values(), key=lambda point: point.step)
    by_step = [{point.step: point for point in seed} for seed in seeds]
    shared = sorted(set.intersection(*(set(seed) for seed in by_step)))
    points = []
    for step in shared or sorted(set.union(*(set(seed) for seed in by_step))):
        here = [seed[step] for seed in by_step if step in seed]
        kl = _mean_over([point.kl for point in here])
        assert kl is not None
        proxy, true = _mean_over([point.proxy for point in here]), _mean_over([point.true for point in here])
        points.append(CurvePoint(step, math.sqrt(max(kl.mean, 0.0)), kl, proxy, true))
    return points


def _mean_over(figures: Sequence[Figure | None]) -> Figure | None:
    """The mean over seeds with the lowest and highest seed; None when any seed lacks it. n: answers of all seeds."""
    known = [item for item in figures if item is not None]
    if not known or len(known) < len(figures):
        return None
    means = [item.mean for item in known]
    counts = [item.n for item in known if item.n is not None]
    return Figure(fmean(means), min(means), max(means), sum(counts) if len(counts) == len(known) else None)
