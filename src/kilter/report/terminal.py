"""The run's figures for a terminal, 80 columns wide."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kilter.report.answers import visible
from kilter.report.figures import METRICS, Figure, Style, figure, model_label, ordered, write_number
from kilter.report.files import RunFiles
from kilter.report.headline import headline
from kilter.report.page import claims, provenance

_COLUMNS = {
    "true_reward": "true\nreward",
    "proxy_reward": "proxy\nreward",
    "win_rate_vs_sft": "wins\nover SFT",
    "kl": "KL\nnats",
    "attack_success": "attack\nsuccess",
    "over_refusal": "over-\nrefusal",
}
_STATES = {"good": ("held", "green"), "bad": ("did not hold", "red"), "open": ("not measured", "dim")}


def summarize(run: RunFiles) -> RenderableType:
    """The sentence, a table of means over their intervals, and the claims. `-` is not measured."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("")
    for name in _COLUMNS.values():
        table.add_column(name, justify="right", no_wrap=True)
    for model in ordered(run.models):
        cells = [_cell(figure(run.models[model].get(name)), METRICS[name].style) for name in _COLUMNS]
        table.add_row(Text(visible(model_label(model)), style="bold"), *cells)
    parts: list[RenderableType] = [Text(visible(headline(run)), style="bold"), Text()]
    if run.models:
        note = f"Under each mean its 95% interval; - is not measured. Measured on: {provenance(run)}."
        parts += [table, Text(note, style="dim")]
    for claim in claims(run):
        word, style = _STATES[claim.state]
        value = f" ({claim.value})" if claim.value else ""
        parts.append(Text.assemble((f"{word:>12}", style), "  ", claim.text, (value, "dim")))
    parts += [Text(f"note: {visible(problem)}", style="yellow") for problem in run.problems]
    return Group(*parts)


def _cell(value: Figure | None, style: Style) -> Text:
    if value is None:
        return Text("-", style="dim")
    text = Text(_short(value.mean, style))
    if value.low is not None and value.high is not None:
        text.append(f"\n{_short(value.low, style)}…{_short(value.high, style)}", style="dim")
    return text


def _short(value: float, style: Style) -> str:
    """Rates in whole percent, so that six columns of intervals fit 80 characters."""
    return f"{100 * value:.0f}%" if style == "rate" else write_number(value, style)
