"""Training curves, stage by stage, as small multiples: the raw figure faint, its running mean on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from kilter.report.answers import visible
from kilter.report.figures import model_label, number, write_number
from kilter.report.files import Row, RunFiles
from kilter.report.svg import Axis, Point, axis_over, el, path, tick_step, tick_text
from kilter.rundir import furthest, spikes_in

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 330, 150, 46, 22, 10
MOST_POINTS = 300
MOST_CHARTS = 6
# What a reader wants first; other names follow in the order of the file, and those of the machine come last.
_FIRST = (
    "loss/",
    "loss",
    "eval/loss",
    "rewards/accuracy",
    "rewards/margin",
    "score",
    "reward",
    "kl",
    "policy/",
    "value/",
)
_LAST = ("grad_norm", "tokens_per_second")
_SKIP = {"step", "seconds", "tokens", "learning_rate"}


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure of one stage over its steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def first_last(self) -> str:
        """Mean of the first and of the last tenth of the steps: where it began and where it ended."""
        tenth = max(1, len(self.values) // 10)
        return f"{write_number(fmean(self.values[:tenth]))} → {write_number(fmean(self.values[-tenth:]))}"


@dataclass(frozen=True, slots=True)
class SpikeRow:
    """A row of data behind a step whose gradient was `times` the usual one."""

    step: int
    times: float
    share: float
    name: str
    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageCharts:
    """The charts of a stage, `stage` being its folder's name; `left_out` names figures the file has beyond those."""

    stage: str
    label: str
    steps: int
    charts: tuple[Chart, ...]
    left_out: tuple[str, ...]
    num_spikes: int = 0
    spikes: tuple[SpikeRow, ...] = ()


def stage_charts(run: RunFiles) -> list[StageCharts]:
    """All stages that wrote metrics, in the order of their folders."""
    found = (_charts(stage, rows, run.spikes.get(stage, [])) for stage, rows in run.metrics.items())
    return [charts for charts in found if charts.charts]


def _charts(stage: str, rows: Sequence[Row], spikes: Sequence[Row]) -> StageCharts:
    series: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(rows):
        given = number(row.get("step"))
        step = float(index) if given is None else given
        for name, raw in row.items():
            value = number(raw)
            if value is not None and name not in _SKIP:
                series.setdefault(str(name), []).append((step, value))
    # A figure that never moves is a setting, not a curve; one that repeats another (the sum of one loss) is left out.
    names: list[str] = []
    for name in sorted(series, key=_rank):
        moves = len({value for _, value in series[name]}) > 1
        if moves and all(series[name] != series[other] for other in names):
            names.append(name)
    # Rows of three: a chart that would stand alone in its row is only named.
    shown = min(len(names), MOST_CHARTS) if len(names) != 4 else 3
    charts = []
    for name in names[:shown]:
        steps, values = zip(*series[name], strict=True)
        charts.append(Chart(name, steps, values))
    left_out = tuple(names[shown:])
    return StageCharts(stage, stage_label(stage), len(rows), tuple(charts), left_out, len(spikes), _worst(spikes))


def _worst(spikes: Sequence[Row]) -> tuple[SpikeRow, ...]:
    """The rows with the largest shares of the steps that were furthest from usual, in the order of the steps."""
    return tuple(
        SpikeRow(
            spike.step,
            spike.times,
            row["share"],
            visible(row["name"]),
            visible(row["prompt"]),
            tuple(visible(text) for text in row["responses"]),
        )
        for spike in furthest(spikes_in(spikes))
        for row in spike.rows
    )


def stage_label(folder: str) -> str:
    """`05-ppo_without_kl` -> `PPO without KL`."""
    number_part, _, name = folder.partition("-")
    return model_label(name if name and number_part.isdigit() else folder)


def _rank(name: str) -> int:
    if name in _LAST:
        return len(_FIRST) + 1
    return next((place for place, start in enumerate(_FIRST) if name.startswith(start)), len(_FIRST))


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: neighbours are averaged."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def running_mean(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean without the bias of its start: sum w (1-w)^(i-j) x_j over the same sum of weights."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = total * (1 - weight) + weight * value, mass * (1 - weight) + weight
        means.append(total / mass)
    return means


def draw_chart(chart: Chart, title: str) -> Markup:
    """One small chart with its own axes."""
    right, bottom = WIDTH - 8, HEIGHT - BOTTOM
    points = thin(list(zip(chart.steps, chart.values, strict=True)))
    weight = min(max(8 / len(chart.values), 0.05), 0.5)
    smooth = thin(list(zip(chart.steps, running_mean(chart.values, weight), strict=True)))
    low, high = min(chart.steps), max(chart.steps)
    x = Axis(low, high if high > low else low + 1, LEFT, right)
    y = axis_over([value for _, value in points], bottom, TOP, least=1e-6)
    parts = [el("title", title)]
    step = tick_step((y.high - y.low) / 3)
    for tick in y.ticks(3):
        parts.append(el("line", class_="grid", x1=LEFT, x2=right, y1=y(tick), y2=y(tick)))
        parts.append(el("text", _short(tick, step), class_="tick", x=LEFT - 6, y=y(tick) + 4, text_anchor="end"))
    for tick in x.ticks(4):
        label = tick_text(tick, tick_step((x.high - x.low) / 4))
        parts.append(el("text", label, class_="tick", x=x(tick), y=bottom + 15, text_anchor="middle"))
    parts.append(el("path", class_="raw", d=path([(x(a), y(b)) for a, b in points])))
    if len(points) > 3:
        parts.append(el("path", class_="smooth", d=path([(x(a), y(b)) for a, b in smooth])))
    else:
        parts += [el("circle", class_="few", cx=x(a), cy=y(b), r=3.0) for a, b in points]
    return el("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def _short(tick: float, step: float) -> str:
    """A tick that fits the margin: large and tiny ones as powers of ten."""
    if tick and not 1e-3 <= abs(tick) < 1e4:
        return f"{tick:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return tick_text(tick, step)
