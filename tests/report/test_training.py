"""Training curves: which figures, smoothed how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kilter.report.files import RunFiles
from kilter.report.training import draw_chart, running_mean, stage_charts, thin


def charts_of(rows: list[dict[str, Any]]) -> Any:
    return stage_charts(RunFiles(Path("run"), metrics={"05-ppo_without_kl": rows}))


def test_losses_come_first_settings_and_clocks_do_not_come() -> None:
    rows = [
        {
            "step": s,
            "seconds": s,
            "learning_rate": 1 / (s + 1),
            "other": s + 1,
            "loss": s * s,
            "loss/value": s * s,
            "kl": s,
            "fixed": 1,
            "grad_norm": 3 * s,
        }
        for s in range(5)
    ]
    (stage,) = charts_of(rows)
    assert [chart.name for chart in stage.charts] == ["loss/value", "kl", "other"]  # a fourth would stand alone
    assert stage.left_out == ("grad_norm",)
    assert (stage.label, stage.steps) == ("PPO without KL", 5)


def test_missing_and_broken_values_are_left_out_of_a_curve() -> None:
    (stage,) = charts_of(
        [
            {"step": 1, "loss/nll": 3.0},
            {"step": 2, "loss/nll": None},
            {"step": 3, "loss/nll": "NaN"},
            {"step": 4, "loss/nll": 1.0},
        ]
    )
    assert (stage.charts[0].steps, stage.charts[0].values) == ((1, 4), (3.0, 1.0))
    assert stage.charts[0].first_last == "3.00 → 1.00"


def test_a_stage_without_figures_has_no_charts() -> None:
    assert charts_of([{"step": 1, "text": "x"}]) == []


def test_running_mean_has_no_bias_at_its_start() -> None:
    assert running_mean([4.0, 4.0, 4.0], 0.1) == pytest.approx([4.0, 4.0, 4.0])
    assert running_mean([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])  # weights 1/4 and 1/2


def test_thinning_averages_neighbours() -> None:
    assert thin([(0.0, 0.0), (1.0, 2.0), (2.0, 4.0)], most=2) == [(0.5, 1.0), (2.0, 4.0)]
    assert len(thin([(float(i), 0.0) for i in range(10_000)])) <= 300


@pytest.mark.parametrize("values", [[1e-9, 2e-9], [1e9, 2e9], [0.0, -5.0]])
def test_any_scale_can_be_drawn(values: list[float]) -> None:
    (stage,) = charts_of([{"step": i, "loss/x": value} for i, value in enumerate(values)])
    assert "nan" not in draw_chart(stage.charts[0], "told")


def spike(step: int, times: float, shares: list[float]) -> dict[str, Any]:
    rows = [
        {"name": f"a.jsonl:{at}", "share": share, "prompt": "Why?", "responses": ["So.", "No."]}
        for at, share in enumerate(shares)
    ]
    return {"step": step, "grad_norm": 0.5 * times, "usual": 0.5, "rows": rows}


def test_the_rows_behind_the_steps_furthest_from_usual() -> None:
    spikes = [spike(5, 6.0, [0.9]), spike(8, 5.5, [1.0]), spike(9, 12.0, [0.4, 0.3, 0.2, 0.1]), spike(12, 7.0, [])]
    torn: list[dict[str, Any]] = [
        {"step": 13, "grad_norm": 9.0, "usual": None},
        {"step": 14, "grad_norm": 1.0, "usual": 0},
    ]
    rows = [{"step": step, "loss": step} for step in range(3)]
    (stage,) = stage_charts(RunFiles(Path("run"), metrics={"01-sft": rows}, spikes={"01-sft": [*spikes, *torn]}))
    assert stage.num_spikes == 6
    assert [(row.step, row.times, row.share, row.name) for row in stage.spikes] == [
        (5, 6.0, 0.9, "a.jsonl:0"),
        *[(9, 12.0, share, f"a.jsonl:{at}") for at, share in enumerate([0.4, 0.3, 0.2])],
    ]
    assert stage.spikes[0].responses == ("So.", "No.")
