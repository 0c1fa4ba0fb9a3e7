"""Curves gathered over seeds, their peaks, and where a close-up ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kilter.report.curve import close_up_reach, read_curves
from kilter.report.figures import Figure
from kilter.report.files import RunFiles


def row(method: str, step: int, kl: float, true: float | None, seed: int = 0) -> dict[str, Any]:
    return {
        "method": method,
        "step": step,
        "seed": seed,
        "kl": {"mean": kl},
        "proxy_reward": {"mean": kl, "n": 10},
        "true_reward": None if true is None else {"mean": true, "n": 10},
    }


def curves_of(*rows: dict[str, Any], summary: dict[str, Any] | None = None) -> Any:
    return read_curves(RunFiles(Path("run"), summary=summary or {}, curve=list(rows)))


def test_seeds_become_a_band_over_their_shared_steps() -> None:
    (curve,) = curves_of(
        row("ppo", 1, 0.0, 0.4, 0), row("ppo", 2, 1.0, 0.5, 0), row("ppo", 3, 4.0, 0.6, 0),
        row("ppo", 1, 0.0, 0.2, 1), row("ppo", 2, 3.0, 0.7, 1),
    )  # fmt: skip
    assert curve.seeds == 2
    assert [point.step for point in curve.points] == [1, 2]  # step 3 is of one seed only
    assert curve.points[1].true == Figure(pytest.approx(0.6), 0.5, 0.7, 20)
    assert curve.points[1].x == pytest.approx(math.sqrt(2.0))


def test_a_step_that_one_seed_could_not_score_is_not_measured() -> None:
    (curve,) = curves_of(row("ppo", 1, 1.0, 0.4, 0), row("ppo", 1, 1.0, None, 1))
    assert curve.points[0].true is None
    assert curve.points[0].proxy is not None
    assert curve.peak is None


def test_the_peak_is_the_highest_true_reward() -> None:
    (curve,) = curves_of(
        row("ppo", 1, 0.0, 0.4), row("ppo", 2, 1.0, 0.7), row("ppo", 3, 9.0, -0.5), row("ppo", 4, 16.0, None)
    )
    assert curve.peak is not None
    assert (curve.peak.step, curve.peak.x) == (2, 1.0)


def test_a_curve_that_begins_late_starts_at_sft() -> None:
    summary = {"models": {"sft": {"true_reward": {"mean": 0.41}, "proxy_reward": {"mean": 0.1}}}}
    (curve,) = curves_of(row("dpo", 10, 4.0, 0.5), summary=summary)
    assert [(point.x, point.true.mean) for point in curve.points] == [(0.0, 0.41), (2.0, 0.5)]
    (begun,) = curves_of(row("dpo", 0, 0.0, 0.4), row("dpo", 10, 4.0, 0.5), summary=summary)
    assert len(begun.points) == 2


def test_sft_on_the_prompts_of_the_curves_goes_before_the_summary() -> None:
    summary = {"models": {"sft": {"true_reward": {"mean": 0.41}}}}
    (curve,) = curves_of(row("sft", 0, 0.0, 0.3), row("dpo", 10, 4.0, 0.5), summary=summary)
    assert [(point.x, point.true.mean) for point in curve.points] == [(0.0, 0.3), (2.0, 0.5)]
    assert curve.method == "dpo"


def test_an_estimate_of_kl_below_zero_is_drawn_at_zero_and_told_as_it_is() -> None:
    (curve,) = curves_of(row("ppo", 1, -0.02, 0.4))
    assert (curve.points[0].x, curve.points[0].kl.mean) == (0.0, -0.02)


def test_without_a_curve_file_the_end_points_stand() -> None:
    models = {
        "sft": {"true_reward": {"mean": 0.4}},
        "ppo": {"kl": {"mean": 4.0}, "true_reward": {"mean": 0.6}},
        "dpo": {"kl": None},
    }
    (curve,) = curves_of(summary={"models": models})
    assert [(point.x, point.true.mean) for point in curve.points] == [(0.0, 0.4), (2.0, 0.6)]


def test_a_close_up_only_where_one_method_went_far_further() -> None:
    near, far = (
        [row("ppo", 1, 0.0, 0.4), row("ppo", 2, 4.0, 0.6)],
        [row("ppo_without_kl", 1, 0.0, 0.4), row("ppo_without_kl", 2, 36.0, 0.0)],
    )
    curves = curves_of(*near, *far)
    assert close_up_reach(curves) == pytest.approx(2.12)
    assert close_up_reach(curves[:1]) is None
    assert close_up_reach(curves_of(*near, row("dpo", 1, 9.0, 0.5))) is None
    cut = curves[1].until(2.0)
    assert cut.cut
    assert cut.end.x == 2.0
    assert cut.end.true.mean == pytest.approx(0.4 - 0.4 * 2 / 6)  # a third of the way down
    assert curves[0].until(2.12) == curves[0]
