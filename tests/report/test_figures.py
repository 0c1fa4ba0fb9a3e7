"""Numbers as they are read and written: what is missing stays missing, and never becomes 0."""

from __future__ import annotations

import pytest

from kilter.report.figures import (
    Figure,
    figure,
    metric_of,
    model_label,
    number,
    ordered,
    write_count,
    write_figure,
    write_number,
    write_seconds,
)


@pytest.mark.parametrize("value", [None, "0.5", True, False, float("nan"), float("inf"), [], {}, 10**400])
def test_what_is_no_number_is_none(value: object) -> None:
    assert number(value) is None
    assert figure(value) is None
    assert figure({"mean": value}) is None


def test_a_figure_is_read_whole_or_without_its_interval() -> None:
    assert figure({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 20}) == Figure(0.5, 0.4, 0.6, 20)
    assert figure({"mean": 0.5, "low": 0.4, "n": 20}) == Figure(0.5, None, None, 20)
    assert figure({"mean": 0.5, "low": 0.7, "high": 0.6}) == Figure(0.5)
    assert figure(0) == Figure(0.0)


def test_not_measured_and_zero_are_written_apart() -> None:
    assert write_figure(None) == "not measured"
    assert write_figure(Figure(0.0)) == "0.00"
    assert write_figure(Figure(-0.5, -0.61, -0.4), "score") == "−0.50 [−0.61, −0.40]"
    assert write_figure(Figure(0.045, 0.02, 0.07), "rate") == "4.5% [2.0%, 7.0%]"


def test_numbers_for_a_reader() -> None:
    assert write_number(-0.001) == "0.00"  # no "minus nothing"
    assert write_number(0.123, "rate", sign=True) == "+12.3%"
    assert write_number(-12345.6) == "−12,345.6"
    assert write_number(46.04, "nats") == "46.04"
    assert write_count(1_412_096) == "1.4 million"
    assert (write_seconds(75.04), write_seconds(150), write_seconds(7500)) == ("75.0 s", "2 min 30 s", "2 h 5 min")


def test_models_stand_in_the_order_of_the_loop_and_unknown_ones_last() -> None:
    assert ordered(["mine", "ppo", "base", "sft", "other"]) == ["base", "sft", "ppo", "mine", "other"]
    assert model_label("ppo_without_kl") == "PPO without KL"
    assert model_label("my_own") == "my own"
    assert metric_of("true_harmless").label == "True reward: harmless"
