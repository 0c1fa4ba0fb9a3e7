"""The sentence of the first screen says what the intervals allow, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kilter.report.figures import Figure
from kilter.report.files import RunFiles
from kilter.report.headline import change_from_sft, headline, paired_difference, unpaired_difference


def run_with(**models: tuple[float, float] | None) -> RunFiles:
    """A run of models given as (true reward, proxy reward), each ± 0.02; None: nothing measured of it."""

    def metrics(value: tuple[float, float] | None) -> dict[str, Any]:
        if value is None:
            return {}
        pairs = zip(("true_reward", "proxy_reward"), value, strict=True)
        return {key: {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "n": 100} for key, mean in pairs}

    return RunFiles(Path("run"), summary={"models": {name: metrics(value) for name, value in models.items()}})


def test_the_story_as_expected() -> None:
    run = run_with(sft=(0.41, 0.0), ppo=(0.61, 1.0), ppo_without_kl=(-0.8, 4.0))
    assert headline(run) == (
        "PPO gained 0.20 over SFT in true reward (0.41 → 0.61); "
        "without the KL penalty it raised its proxy reward to 4.00 while true reward fell to −0.80."
    )


@pytest.mark.parametrize(
    ("ppo", "said"),
    [
        ((0.42, 1.0), "PPO did not clearly gain over SFT in true reward: the difference is 0.01 [−0.02, 0.04]."),
        ((0.30, 1.0), "PPO did not gain: it lost 0.11 against SFT in true reward (0.41 → 0.30)."),
        (None, "Whether PPO gained over SFT was not measured."),
    ],
)
def test_it_is_honest_when_ppo_did_not_gain(ppo: tuple[float, float] | None, said: str) -> None:
    assert headline(run_with(sft=(0.41, 0.0), ppo=ppo)) == said


@pytest.mark.parametrize(
    ("free", "said"),
    [
        ((0.40, 4.0), "to 4.00 while true reward (0.40) did not clearly move from SFT’s."),
        ((0.70, 4.0), "to 4.00 and true reward rose too, to 0.70: this run shows no gaming."),
        ((-0.8, 0.0), "its proxy reward did not clearly rise (0.00), so this run shows no gaming."),
        (None, "what happens without the KL penalty was not measured."),
    ],
)
def test_it_is_honest_when_nothing_was_gamed(free: tuple[float, float] | None, said: str) -> None:
    text = headline(run_with(sft=(0.41, 0.0), ppo=(0.61, 1.0), ppo_without_kl=free))
    assert text.endswith(said)


def test_a_real_run_without_truth_claims_no_gain() -> None:
    proxies = {
        name: {"proxy_reward": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
        for name, mean in (("sft", 0.0), ("dpo", 0.9))
    }
    text = headline(RunFiles(Path("run"), summary={"models": proxies}))
    assert text == (
        "DPO raised its own reward model’s score by 0.90 over SFT; "
        "true reward was not measured, so this is no proof of gain."
    )


def test_nothing_aligned_is_said() -> None:
    assert headline(run_with(base=(0.0, 0.0), sft=(0.4, 0.0))).startswith("Nothing to compare yet")
    assert headline(RunFiles(Path("run"))).startswith("Nothing to compare yet")


def test_paired_difference_by_hand() -> None:
    rows = [{"prompt_id": key, "true_reward": value} for key, value in (("a", 1.0), ("b", 0.5), ("b", 0.7), ("c", 0.0))]
    other = [{"prompt_id": key, "true_reward": value} for key, value in (("a", 0.5), ("b", 0.5), ("d", 9.0))]
    got = paired_difference(rows, other, "true_reward")  # gaps: a 0.5, b 0.6 - 0.5 = 0.1; c and d are not shared
    half = 12.706205 * math.sqrt(0.08) / math.sqrt(2)  # Student, 1 degree of freedom; variance 0.2² + 0.2²
    assert got is not None
    assert got.mean == pytest.approx(0.3)
    assert (got.low, got.high, got.n) == (pytest.approx(0.3 - half), pytest.approx(0.3 + half), 2)
    assert paired_difference(rows[:1], other, "true_reward") is None


def test_unpaired_difference_by_hand() -> None:
    got = unpaired_difference(Figure(0.4, 0.37, 0.44), Figure(0.6, 0.57, 0.65))
    assert got is not None
    assert got.mean == pytest.approx(0.2)
    assert got.low == pytest.approx(0.2 - 0.05)  # 0.03 down of the one, 0.04 up of the other: 3, 4, 5
    assert got.high == pytest.approx(0.2 + math.hypot(0.05, 0.03))
    assert unpaired_difference(Figure(0.4), Figure(0.6, 0.5, 0.7)) == Figure(pytest.approx(0.2))
    assert unpaired_difference(None, Figure(0.6)) is None


def test_rows_decide_before_summaries_and_a_given_gain_before_both() -> None:
    run = run_with(sft=(0.40, 0.0), ppo=(0.41, 1.0))
    rows = {"sft": [0.4, 0.3, 0.5], "ppo": [0.41, 0.312, 0.511]}
    run.evaluated.update(
        {name: [{"prompt_id": str(i), "true_reward": v} for i, v in enumerate(row)] for name, row in rows.items()}
    )
    change = change_from_sft(run, "ppo", "true_reward")
    assert (change.verdict, change.how) == ("rose", "paired by prompt")  # the same gain, unpaired, is unclear
    run.summary["models"]["ppo"]["gain_vs_sft"] = {"mean": -0.1, "low": -0.2, "high": -0.05, "n": 3}
    assert change_from_sft(run, "ppo", "true_reward").verdict == "fell"
