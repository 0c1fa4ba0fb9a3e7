"""Every symptom shows where its figures say so, at the value worked out by hand, and nowhere on a healthy run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kilter.guard import SYMPTOMS, Watch, looked_back

HEALTHY = {
    "rollout/samples": 100.0,
    "rollout/score": 0.0,
    "rollout/score_sem": 0.1,
    "rollout/score_std": 1.0,
    "rollout/kl_k1": 0.0,
    "rollout/length": 10.0,
    "rollout/entropy": 1.0,
    "rollout/distinct": 0.8,
    "rollout/same": 0.0,
    "rollout/tied": 0.1,
    "rollout/truncated": 0.0,
    "rollout/repeats": 0.01,
    "rollout/phrase": 0.05,
    "rollout/length_pays": -0.1,
    "rollout/spread": 0.5,
    "rollout/probe": 0.2,
    "rollout/probe_sem": 0.02,
    "rollout/probe_correlation": 0.5,
    "rollout/probe_samples": 100.0,
    "rollout/value_explained": 0.4,
    "rollout/passing": 1.0,
    "policy/clip_fraction": 0.1,
    "policy/extreme_fraction": 0.001,
}


def healthy(rollouts: int) -> list[dict[str, float]]:
    """Reward and probe rise, answers become a little shorter and fewer."""
    return [
        HEALTHY
        | {
            "rollout/score": 0.1 * at,
            "rollout/probe": 0.2 + 0.02 * at,
            "rollout/kl_k1": 0.2 * math.sqrt(at),
            "rollout/length": 10 - 0.2 * at,
            "rollout/entropy": 1 - 0.04 * at,
            "rollout/same": 0.03 * at,
        }
        for at in range(rollouts)
    ]


# What is different from a healthy run from the third rollout on (of `start` symptoms: in the first), and its value.
SHOWN: dict[str, tuple[dict[str, float], float]] = {
    "no_signal": ({"rollout/score_std": 0.0}, 1.0),
    "scale": ({"rollout/paid_score_sem": 2.0}, math.log10(20)),
    "never_ends": ({"rollout/truncated": 0.99}, 0.99),
    "against_probe": ({"rollout/probe_correlation": -0.5}, 0.549306 * math.sqrt(97)),
    "probe_falls": ({"rollout/score": 2.0, "rollout/probe": 0.0}, (0.21 - 0.0) / 0.02),
    "phrase": ({"rollout/phrase": 0.6}, 0.6 - math.sqrt(0.02)),
    "longer": ({"rollout/length": 20.0}, 1.0),
    "length_pays": ({"rollout/length": 12.0, "rollout/length_pays": 0.8}, 0.8),
    "cut": ({"rollout/truncated": 0.5}, 0.5),
    "repeats": ({"rollout/repeats": 0.31}, 0.3),
    "unlikely": ({"rollout/entropy": 1.8, "rollout/kl_k1": 2.0, "rollout/length": 10.0}, 1.0),
    "spread": ({"rollout/spread": 1.5}, math.log2(3)),
    "kl_explodes": ({"rollout/kl_k1": 12.0, "rollout/length": 10.0, "rollout/entropy": 0.1}, 1.2),
    "price": ({"rollout/kl_coef": 5.0, "rollout/kl_k1_sem": 0.6, "rollout/paid_score_sem": 0.2}, 15.0),
    "collapse": ({"rollout/same": 0.9}, 0.9),
    "entropy": ({"rollout/entropy": 0.1}, math.log2(10)),
    "narrow": ({"rollout/distinct": 0.1}, 3.0),
    "reward_falls": ({"rollout/score": -1.0}, 1 / math.hypot(0.1, 0.1)),
    "clipped": ({"policy/clip_fraction": 0.6}, 0.6),
    "extreme": ({"policy/extreme_fraction": 0.3}, 0.3),
    "failing": ({"rollout/passing": -0.1}, 1.1),
}


def test_a_healthy_run_shows_nothing() -> None:
    assert looked_back(healthy(20)) == []


@pytest.mark.parametrize("name", SHOWN)
def test_shows_at_the_value_worked_out_by_hand(name: str) -> None:
    figures, value = SHOWN[name]
    start = SYMPTOMS[name].start
    rows = [row | figures if (at == 0 if start else at >= 2) else row for at, row in enumerate(healthy(8))]
    found = {alarm.symptom: alarm for alarm in looked_back(rows)}
    assert name in found and found.keys().isdisjoint({"canary"} - {name})
    assert found[name].value == pytest.approx(value, rel=1e-4)
    later = 4 if name == "probe_falls" else 1 + SYMPTOMS[name].lasting  # of four rollouts it makes three means
    assert found[name].rollout == (0 if start else later)
    assert found[name].says and "{" not in found[name].says


def test_frozen_and_critic_take_their_time() -> None:
    still = [HEALTHY for _ in range(12)]
    assert [(one.symptom, one.rollout) for one in looked_back(still)] == [("frozen", 8)]
    moved = [HEALTHY | {"rollout/score": 2.0 + 0.5 * (at > 3)} for at in range(12)]
    assert looked_back(moved) == []
    assert looked_back([HEALTHY | {"rollout/kl_k1": 0.2} for _ in range(12)]) == []  # two hundredths of a nat a token
    lost = [row | {"rollout/value_explained": -0.5} for row in healthy(20)]
    assert [(one.symptom, one.rollout, one.value) for one in looked_back(lost)] == [("critic", 13, 0.5)]
    late = [row | {"rollout/value_explained": 0.4 if at < 8 else -0.5} for at, row in enumerate(healthy(20))]
    (alarm,) = looked_back(late)  # from the twelfth on four or five of the five are lost
    assert (alarm.symptom, alarm.rollout, alarm.value) == ("critic", 15, 0.5)


def test_what_is_told_before_the_first_update() -> None:
    started = {"no_signal", "scale", "never_ends", "against_probe"}
    assert {name for name, one in SYMPTOMS.items() if one.start} == started
    assert {name for name, one in SYMPTOMS.items() if one.refused} == {"no_signal", "against_probe"}


def test_a_correlation_with_the_probe_needs_ten_answers_and_may_be_whole() -> None:
    row = HEALTHY | {"rollout/probe_correlation": -0.9}
    assert looked_back([row | {"rollout/probe_samples": 9.0}]) == []
    told = looked_back([row | {"rollout/probe_samples": 10.0}])
    assert [one.value for one in told] == [math.atanh(0.9) * math.sqrt(7)]
    (alarm,) = looked_back([HEALTHY | {"rollout/probe_correlation": -1.0}])
    assert alarm.symptom == "against_probe" and alarm.value == pytest.approx(7.254329 * math.sqrt(97))


@pytest.mark.parametrize(("sem", "seen"), [(0.011, False), (0.009, True), (0.99, False), (1.01, True), (0.0, False)])
def test_rewards_ten_times_too_small_or_too_large_are_told_at_the_start(sem: float, seen: bool) -> None:
    """Standard errors over 100 answers; of rewards that are all alike `no_signal` tells."""
    (first, *later) = healthy(3)
    told = looked_back([first | {"rollout/paid_score_sem": sem}, *later])
    assert ["scale" in alarm.symptom for alarm in told] == [True] * seen


def test_an_entropy_that_rounds_to_nothing_is_one_that_fell() -> None:
    rows = healthy(2) + [HEALTHY | {"rollout/entropy": 0.0, "rollout/score": 0.3} for _ in range(2)]
    assert "entropy" in {alarm.symptom for alarm in looked_back(rows)}


def test_a_canary_is_held_against_its_first_asking_and_named() -> None:
    rows = healthy(12)
    for at, (kind, honest) in {0: (0.9, 0.5), 4: (0.8, 0.5), 8: (0.4, 0.6)}.items():
        rows[at] |= {"rollout/canary/kind": kind, "rollout/canary/honest": honest}
        rows[at] |= {"rollout/canary/kind_sem": 0.06, "rollout/canary/honest_sem": 0.08}
    (alarm,) = looked_back(rows)  # once, though the fall stays for the rollouts in which nothing is asked
    assert (alarm.symptom, alarm.rollout, alarm.phrase) == ("canary", 8, "kind")
    assert alarm.value == pytest.approx(0.5 / math.hypot(0.06, 0.06))
    assert alarm.says.endswith("standard errors: kind")


def test_every_symptom_is_seen_by_a_test_and_says_what_to_do() -> None:
    assert set(SYMPTOMS) == set(SHOWN) | {"frozen", "critic", "canary"}
    assert all(one.causes and one.remedies for one in SYMPTOMS.values())


def test_figures_that_are_not_there_show_nothing() -> None:
    assert looked_back([{} for _ in range(12)]) == []
    few = {"rollout/score": 1.0, "rollout/length": 3.0}
    assert looked_back([few] * 12) == []
    for missing in HEALTHY:  # in the first rollout alone, and in all but the first
        rest = {name: value for name, value in HEALTHY.items() if name != missing}
        for rows in ([rest, *healthy(4)], [HEALTHY, rest, rest, rest]):
            assert looked_back(rows) == [], missing


def test_a_probe_that_falls_with_the_reward_shows_nothing() -> None:
    def ends_at(score: float) -> list[dict[str, float]]:
        """Healthy for three rollouts."""
        last = {"rollout/score": score, "rollout/probe": 0.0}
        return [row | (last if at > 2 else {}) for at, row in enumerate(healthy(8))]

    assert looked_back(ends_at(-0.2)) == []
    errors = (0.03, 0.03, 0.04, 0.03, 0.01, 0.02, 0.02, 0.02)  # the best two ended at the third, the last at the sixth
    told = [row | {"rollout/probe_sem": error} for row, error in zip(ends_at(2.0), errors, strict=True)]
    (alarm,) = looked_back(told)
    assert (alarm.symptom, alarm.rollout) == ("probe_falls", 5)
    assert alarm.value == pytest.approx(0.23 / math.hypot(0.03, 0.02) * math.sqrt(2))


def test_a_single_rollout_above_is_suspected_and_shown_only_when_it_lasts() -> None:
    watch = Watch({"longer": 0.5})
    lengths = (10.0, 20.0, 10.0, 20.0, 20.0, 20.0)
    found = [(watch.look({"rollout/length": length}), watch.suspected, watch.shown) for length in lengths]
    assert [[one.symptom for one in alarms] for alarms, _, _ in found] == [[], [], [], [], ["longer"], []]
    assert [suspected for _, suspected, _ in found] == [[], ["longer"], [], ["longer"], ["longer"], ["longer"]]
    assert [shown for _, _, shown in found] == [[], [], [], [], ["longer"], ["longer"]]


def test_half_a_threshold_is_suspected_and_shows_nothing() -> None:
    watch = Watch({"longer": 1.2})
    assert [watch.look({"rollout/length": length}) for length in (10.0, 15.0, 16.0, 16.0)] == [[], [], [], []]
    assert watch.suspected == ["longer"] and watch.shown == []
    other = Watch({"longer": 1.2})
    other.load_state_dict(watch.state_dict())
    assert other.suspected == ["longer"]
    watch.look({"rollout/length": 15.0})  # log2(1.5) is below 0.6
    assert watch.suspected == []


def test_a_watch_goes_on_from_its_state_and_forgets_a_policy_that_is_gone() -> None:
    rows = [{"rollout/length": length} for length in (10.0, 20.0, 20.0)]
    one, other = Watch(), Watch()
    for row in rows[:2]:
        one.look(row)
    other.load_state_dict(one.state_dict())
    assert [alarm.to_dict() for alarm in other.look(rows[2])] == [alarm.to_dict() for alarm in one.look(rows[2])] != []
    one.forget(1)
    assert len(one.rows) == 2 and one.shown == [] == one.suspected
    assert Watch(without=["longer"]).look(rows[0]) == []


def test_the_table_of_the_docs_is_the_table_of_the_code() -> None:
    rows = []
    for one in SYMPTOMS.values():
        lasting = f"{one.lasting} rollout{'s' * (one.lasting > 1)}"
        about = (one.statistic.__doc__ or "").split("\n")[0].rstrip(".")
        shown = "before the first update" if one.start else lasting
        rows.append(f"| `{one.name}` | {about} | {one.threshold:g} | {shown} |")
    text = (Path(__file__).parents[2] / "docs/guard.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows
