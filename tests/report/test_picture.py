"""The drawings: axes, bands, labels, and nothing drawn where nothing was measured."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from kilter.report.curve import Curve, CurvePoint
from kilter.report.figures import Figure
from kilter.report.picture import FULL, Lines, draw_picture, draw_pictures, make_scales, tied_axis
from kilter.report.safety import WIDE as PLANE
from kilter.report.safety import SafetyPoint, draw_safety, safety_points, share
from kilter.report.svg import Axis, Box, axis_over, el, place_labels, tick_text


def curve(method: str, *points: tuple[float, float | None, float | None], seeds: int = 1) -> Curve:
    """A curve of (x, proxy, true) with intervals of ± 0.05."""

    def measured(value: float | None) -> Figure | None:
        return None if value is None else Figure(value, value - 0.05, value + 0.05, 100)

    made = [CurvePoint(i, x, Figure(x * x), measured(p), measured(t)) for i, (x, p, t) in enumerate(points)]
    return Curve(method, tuple(made), seeds)


PPO = curve("ppo", (0, 0, 0.4), (1, 0.8, 0.6), (2, 1.2, 0.65))
FREE = curve("ppo_without_kl", (0, 0, 0.4), (1, 0.9, 0.5), (4, 2.5, 0.0), (7, 4.0, -0.9))


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def test_sft_stands_at_one_height_on_both_axes_and_all_proxies_fit() -> None:
    scales = make_scales([PPO, FREE], Lines((("mean", 0.58),)), FULL)
    assert scales.true is not None
    assert scales.proxy is not None
    assert scales.proxy(0.0) == pytest.approx(scales.true(0.4))
    assert FULL.top <= scales.proxy(4.05) <= scales.proxy(-0.05) <= FULL.height - FULL.bottom
    assert scales.true(0.6) < scales.true(0.4)  # up is more


def test_tied_axis_by_hand() -> None:
    axis = tied_axis(Axis(-1.0, 1.0, 100.0, 0.0), 0.0, 5.0, [5.0, 9.0])  # SFT half way up: 4 above needs a range of 8
    assert (axis.low, axis.high) == (pytest.approx(5 - 4 * 1.04), pytest.approx(5 + 4 * 1.04))


def test_every_method_has_a_solid_and_a_dashed_line_a_band_and_a_ringed_peak() -> None:
    root = parsed(draw_picture([PPO, FREE], Lines(), FULL, "told", names=["ppo", "ppo_without_kl"]))
    groups = {group.get("data-method"): group for group in root.iter("g")}
    assert set(groups) == {"ppo", "ppo_without_kl"}
    for group in groups.values():
        kinds = [item.get("class") for item in group]
        assert (
            kinds.count("line true")
            == kinds.count("line proxy")
            == kinds.count("band true")
            == kinds.count("peak")
            == 1
        )
        assert kinds.count("band proxy") == 0  # one seed: the proxy's interval would only crowd
    many = parsed(draw_picture([curve("ppo", (0, 0, 0.4), (1, 1, 0.6), seeds=3)], Lines(), FULL, "", names=["ppo"]))
    assert [item.get("class") for item in many.iter("path")].count("band proxy") == 1


def test_a_line_is_broken_where_true_reward_was_not_measured() -> None:
    gap = curve("ppo", (0, 0, 0.4), (1, 0.5, 0.5), (2, 1.0, None), (3, 1.5, 0.6), (4, 2.0, 0.5))
    root = parsed(draw_picture([gap], Lines(), FULL, "", names=["ppo"]))
    paths = [item for item in root.iter("path") if item.get("class") == "line true"]
    assert [len(re.findall(r"[ML]", item.get("d", ""))) for item in paths] == [2, 2]
    dots = [item for item in root.iter() if item.get("class") == "dot"]
    assert len(dots) == 4


def test_without_truth_there_is_one_axis_and_no_peak() -> None:
    root = parsed(draw_picture([curve("ppo", (0, 0, None), (1, 1, None))], Lines(), FULL, "", names=["ppo"]))
    texts = ["".join(item.itertext()) for item in root.iter("text")]
    assert any(text.startswith("proxy reward") for text in texts)
    assert not any(text.startswith("true reward") for text in texts)
    assert not [item for item in root.iter() if item.get("class") == "peak"]


def test_the_peak_is_named_on_the_method_that_went_furthest() -> None:
    texts = [
        "".join(item.itertext()) for item in parsed(draw_pictures([PPO, FREE], Lines(), "")["wide"][0]).iter("text")
    ]
    assert "true peak 0.50 at √KL 1.00" in texts
    close = draw_pictures([PPO, FREE], Lines(), "")["wide"][1]
    assert not [text for text in parsed(close).itertext() if "peak" in text]
    assert len(draw_pictures([PPO], Lines(), "")["wide"]) == 1


def test_labels_keep_off_each_other_and_inside() -> None:
    inside = Box(0, 0, 600, 300)
    labels = place_labels([((300.0, 150.0 + 2 * k), f"method number {k}") for k in range(6)], inside=inside)
    for k, label in enumerate(labels):
        assert label.box.overlap(inside) == pytest.approx(
            (label.box.right - label.box.left) * (label.box.bottom - label.box.top)
        )
        assert all(label.box.overlap(other.box) == 0 for other in labels[:k])


def test_text_and_attributes_are_escaped() -> None:
    assert str(el("text", "<b>&", class_='"><script>')) == '<text class="&#34;&gt;&lt;script&gt;">&lt;b&gt;&amp;</text>'


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (-1.0, 1.0, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0.0, 7.0, ["0", "2", "4", "6"]),
        (-9.0, 3.0, ["−7.5", "−5.0", "−2.5", "0.0", "2.5"]),
        (0.4, 0.7, ["0.4", "0.5", "0.6", "0.7"]),
    ],
)
def test_ticks_are_round_and_written_with_the_decimals_they_need(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in Axis(low, high, 0, 1).labelled_ticks(5)] == texts


def test_an_axis_over_one_value_is_not_empty() -> None:
    axis = axis_over([2.0, 2.0], 0, 100, least=0.5)
    assert axis.high - axis.low == pytest.approx(0.5)
    assert tick_text(-0.25, 0.25) == "−0.25"


def test_the_safety_plane_has_a_cross_for_each_model_with_both_figures() -> None:
    pair = {
        "attack_success": {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 50},
        "over_refusal": {"mean": 0.05, "low": 0.02, "high": 0.1, "n": 50},
    }
    points, missing = safety_points({"base": pair, "sft": pair | {"over_refusal": None}})
    assert [point.model for point in points] == ["base"]
    assert missing == ["SFT"]
    root = parsed(draw_safety(points, PLANE, "told"))
    whiskers = [item.get("d", "") for item in root.iter("path") if item.get("class") == "whisker"]
    (x0, y0, x1, y1), (x2, y2, x3, y3) = ([float(v) for v in re.findall(r"[\d.]+", d)] for d in whiskers)
    assert y0 == y1 and x0 < x1  # attack success lies across
    assert x2 == x3 and y2 > y3  # over-refusal stands up
    spot = next(item for item in root.iter("circle"))
    assert x0 < float(spot.get("cx", 0)) < x1


@pytest.mark.parametrize("mean", [-0.1, 1.5, 1e9])
def test_what_is_no_share_is_not_drawn_as_one(mean: float) -> None:
    assert share({"mean": mean, "low": mean - 1, "high": mean + 1}) is None
    assert share({"mean": 0.5, "low": -1, "high": 7}) == Figure(0.5, 0.0, 1.0)


def test_a_plane_of_tiny_rates_still_reaches_ten_percent() -> None:
    tiny = Figure(0.0, 0.0, 0.01, 200)
    texts = [
        "".join(item.itertext())
        for item in parsed(draw_safety([SafetyPoint("ppo", tiny, tiny)], PLANE, "")).iter("text")
    ]
    assert "10%" in texts
