"""What a larger model would need, against arithmetic written here."""

from __future__ import annotations

import pytest

from kilter.report.needs import GIB, SHAPES, memory, needs, read_work

SMALL, LARGE = SHAPES


def test_parameters_are_those_of_the_models_they_are_named_after() -> None:
    assert SMALL.parameters == 151_936 * 1024 + 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072)
    assert SMALL.parameters == pytest.approx(0.596e9, rel=2e-3)
    assert LARGE.parameters == pytest.approx(8.19e9, rel=2e-3)


def test_an_adapter_is_rank_times_in_plus_out() -> None:
    sums = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12_288)
    assert LARGE.adapter(16) == 36 * 16 * sums


def test_memory_by_hand() -> None:
    full, adapter = LARGE.parameters, LARGE.adapter()
    four, two, one = memory(LARGE)
    assert four * GIB == pytest.approx(36 * full)
    assert two * GIB == pytest.approx(18 * full + 2 * adapter)
    assert one * GIB == pytest.approx(2 * full + 34 * adapter)
    assert one < two < four


def test_computation_counts_trained_tokens_three_times() -> None:
    work = read_work(
        {"work": {"sft": {"trained_tokens": 10}, "ppo": {"sampled_tokens": 3, "scored_tokens": 4.0, "x": "y"}}}
    )
    assert work is not None
    assert work.flops(7) == 7 * (6 * 10 + 2 * 3 + 2 * 4)
    assert needs({"work": {"sft": {"trained_tokens": 1e6}}})[1].flops == pytest.approx(6e6 * LARGE.parameters)


@pytest.mark.parametrize(
    "summary", [{}, {"work": None}, {"work": {"sft": 3}}, {"work": {"sft": {"trained_tokens": None}}}]
)
def test_without_counted_tokens_the_computation_is_that_of_a_million(summary: dict[str, object]) -> None:
    assert read_work(summary) is None
    assert [need.flops for need in needs(summary)] == [pytest.approx(6e6 * shape.parameters) for shape in SHAPES]
