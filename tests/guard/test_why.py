"""What `kilter report why` reads off the files of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kilter.cli.main import main
from kilter.errors import RunError
from kilter.guard import ALARMS, Steps, in_words, looked_back, rows_of, why


def stage(run: Path, name: str, metrics: Sequence[dict[str, Any]]) -> Path:
    folder = run / "stages" / name
    folder.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def metrics(lengths: Sequence[float]) -> list[dict[str, Any]]:
    """Two steps a rollout."""
    found: list[dict[str, Any]] = []
    for at, length in enumerate(lengths):
        found.append({"step": 2 * at + 1, "policy/clip_fraction": 0.1 * at, "seconds": 1.0})
        found.append({"step": 2 * at + 2, "policy/clip_fraction": 0.3 * at, "rollout/length": length})
    return found


def test_a_row_tells_of_its_rollout_and_of_the_steps_before_it() -> None:
    found = rows_of([*metrics([10.0, 11.0, 12.0]), {"step": 7, "policy/clip_fraction": 9.0}])
    assert [row["rollout/length"] for row in found] == [10, 11, 12]
    assert "policy/clip_fraction" not in found[0]
    assert [row["policy/clip_fraction"] for row in found[1:]] == pytest.approx([0.0, 0.2])
    assert "seconds" not in found[1]
    assert rows_of([{"step": 1, "rollout/length": "<b>", "rollout/score": None, "rollout/kl_k1": 2}]) == [
        {"rollout/kl_k1": 2.0}
    ]


def test_live_and_from_the_file_the_rows_are_the_same() -> None:
    steps, live = Steps(), []
    for row in metrics([10.0, 11.0, 12.0]):
        if "rollout/length" not in row:  # the rollout is looked at before its first step
            live.append({"rollout/length": metrics([10.0, 11.0, 12.0])[row["step"]]["rollout/length"]} | steps.take())
        steps.add(row)
    assert live == rows_of(metrics([10.0, 11.0, 12.0]))


def test_says_what_the_guard_said_or_would_have_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [10.0, 20.0, 20.0]
    stage(tmp_path, "01-grown", metrics(lengths))
    told = stage(tmp_path, "02-told", metrics([10.0] * 3))
    alarm = looked_back(rows_of(metrics(lengths)))[0].to_dict() | {"says": "as the guard put it", "action": "stop"}
    later = alarm | {"rollout": 7, "says": "as it put it later"}
    (told / ALARMS).write_text("".join(json.dumps(one) + "\n" for one in (alarm, later)))
    stage(tmp_path, "03-quiet", metrics([10.0] * 3))
    broken = stage(tmp_path, "04-sft", [{"step": 1, "loss": 1.0}])
    (broken / "failures" / "step-000002").mkdir(parents=True)
    stage(tmp_path, "05-reward", [{"step": 1, "loss": 1.0}])
    assert main(["report", "why", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "01-grown, 3 rollouts:\n  from rollout 2: longer: answers have grown" in said
    assert "likely: the reward pays for length" in said and "try: audit the reward for padding" in said
    assert "02-told, 3 rollouts:\n  from rollout 2, again from 7: longer: as the guard put it\n" in said
    assert "put it later" not in said
    assert "03-quiet, 3 rollouts: no symptom" in said
    assert "04-sft:\n  a step was not finite" in said and "05-reward" not in said


def test_says_how_far_from_the_reference_it_ended(tmp_path: Path) -> None:
    """1.96 standard errors on either side; the exact estimator before k1."""
    k1 = {"rollout/length": 90.0, "rollout/kl_k1": 7.0, "rollout/kl_k1_sem": 0.5}
    exact = {"rollout/kl_exact": 6.25, "rollout/kl_exact_sem": 0.1}
    stage(tmp_path, "01-ppo", [{"step": 1} | k1 | exact, {"step": 2} | k1])
    stage(tmp_path, "02-rloo", [{"step": 1} | k1 | exact])
    found = why(tmp_path)
    assert [one.kl for one in found] == [pytest.approx((7.0, 0.98)), pytest.approx((6.25, 0.196))]
    said = in_words(found)
    assert "01-ppo, 2 rollouts, at the last one 7 ± 0.98 nats an answer from the reference: no symptom" in said
    assert "02-rloo, 1 rollouts, at the last one 6.25 ± 0.2 nats" in said


def test_a_folder_without_a_run_is_refused_and_one_that_sampled_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run is in it"):
        why(tmp_path / "nowhere")
    (tmp_path / "recipe.yaml").touch()
    assert in_words(why(tmp_path)).startswith("No stage of this run sampled")


def spike(step: int, times: float, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"step": step, "grad_norm": 0.5 * times, "usual": 0.5, "rows": list(rows)}


def test_a_step_that_jumped_is_told_with_the_rows_it_came_from(tmp_path: Path) -> None:
    def row(name: str, share: float, **texts: Any) -> dict[str, Any]:
        return {"name": name, "share": share, "norm": 1.0, "prompt": "Why?", "responses": ["So.", "No."]} | texts

    folder = stage(tmp_path, "01-sft", [{"step": 1, "loss": 1.0}])
    said = [
        spike(20, 6.0, []),
        spike(30, 12.4, [row("a.jsonl:7", 0.9, prompt="<|user|>\n" + "x" * 90), row("a.jsonl:9", 0.2)]),
        spike(31, 5.5, [row("a.jsonl:1", 1.0)]),
        spike(40, 9.0, [row(f"b.jsonl:{at}", 0.2) for at in range(5)]),
        {"step": 41, "grad_norm": None, "usual": 0.1, "rows": []},
        {"step": 42, "grad_norm": 9.0, "usual": 0.1, "rows": [{"name": "edited"}]},
    ]
    (folder / "spikes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    lines = in_words(why(tmp_path)).splitlines()
    assert lines[0] == "01-sft:"
    unknown = "it came from rows that are not known: several processes trained"
    assert lines[1] == f"  step 20: its gradient was 6 times the usual one; {unknown}"
    assert lines[2] == "  step 30: its gradient was 12 times the usual one; it came from"
    assert lines[3] == f"    90% a.jsonl:7: ...{'x' * 67} -> So. | No."
    assert lines[4] == "    20% a.jsonl:9: Why? -> So. | No."
    assert lines[5].startswith("  step 40: its gradient was 9 times")
    assert [line.split(":")[1] for line in lines[6:9]] == ["0", "1", "2"], "the three largest"
    assert lines[9] == "  1 more such steps are in spikes.jsonl"
    assert lines[10].startswith("    try: look at these rows") and len(lines) == 11


def test_what_would_steer_a_terminal_is_shown_by_name(tmp_path: Path) -> None:
    grown = stage(tmp_path, "01-grown", metrics([10.0] * 3))
    alarm = looked_back(rows_of(metrics([10.0, 20.0, 20.0])))[0].to_dict()
    (grown / ALARMS).write_text(json.dumps(alarm | {"says": "a phrase: \x1b[2J"}) + "\n")
    row = {"name": "a\n\u202ea", "share": 1.0, "prompt": "\x1b]0;", "responses": ["\x07"]}
    (grown / "spikes.jsonl").write_text(json.dumps(spike(2, 6.0, [row])) + "\n")
    said = in_words(why(tmp_path))
    assert "a phrase: ⟨U+001B⟩[2J" in said
    assert "    100% a ⟨U+202E⟩a: ⟨U+001B⟩]0; -> ⟨U+0007⟩\n" in said
