"""What the page says of preference optimisation, and that it says nothing where nothing was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kilter.report.files import RunFiles, read_run
from kilter.report.page import render_both
from kilter.report.preferences import preference_stages

SAID = {
    "fresh/kl": {"mean": 1.32, "low": 1.1, "high": 1.5, "n": 64},
    "fresh/length_before": {"mean": 14.0, "low": 13.0, "high": 15.0, "n": 64},
    "fresh/length": {"mean": 19.8, "low": 18.0, "high": 21.0, "n": 64},
    "plain_text/loss_before": {"mean": 2.2, "low": 2.0, "high": 2.4, "n": 64},
    "plain_text/loss": {"mean": 2.5, "low": 2.3, "high": 2.7, "n": 64},
    "plain_text/rise": {"mean": 0.3, "low": 0.2, "high": 0.4, "n": 64},
    "pair_weights/histogram": [8, 2, 0, 0, 0, 0, 0, 0, 0, 1],
}
METRICS = [{"step": 1}, {"step": 2, "displacement/chosen": -3.1, "displacement/rejected": -9.7}, {"step": 3}]


def run_of(said: Any, **files: Any) -> RunFiles:
    return RunFiles(Path("run"), summary={"stages": {"dpo": said}}, **({"metrics": {"04-dpo": METRICS}} | files))


def test_every_figure_of_a_stage_is_read() -> None:
    (stage,) = preference_stages(run_of(SAID))
    assert (stage.stage, stage.label, stage.displaced) == ("04-dpo", "DPO", (-3.1, -9.7))
    assert stage.kl is not None and stage.kl.mean == 1.32
    length, loss = stage.moved
    assert length.before is not None and length.after is not None and loss.after is not None
    assert (length.before.mean, length.after.mean, loss.after.mean) == (14.0, 19.8, 2.5)
    assert [(one.label, one.count, one.share) for one in stage.weights[:2]] == [
        ("0.0 to 0.1", 8, 1.0),
        ("0.1 to 0.2", 2, 0.25),
    ]
    assert stage.weights[-1].label == "0.9 to 1.0" and sum(one.count for one in stage.weights) == 11


@pytest.mark.parametrize(("rise", "forgot"), [(0.3, True), (0.1, False), (-1.0, False), ("x", False)])
def test_it_forgets_when_plain_text_gets_less_likely(rise: Any, forgot: bool) -> None:
    (stage,) = preference_stages(run_of(SAID | {"plain_text/rise": {"mean": rise, "low": rise, "high": rise, "n": 9}}))
    assert stage.forgot is forgot


@pytest.mark.parametrize("said", [{}, {"pair_weights/histogram": ["x", 1]}, {"pair_weights/histogram": []}, "text"])
def test_where_nothing_was_measured_nothing_is_said(said: Any) -> None:
    assert preference_stages(run_of(said, metrics={"04-dpo": [{"step": 1}]})) == []


def test_the_page_has_it_and_a_label_of_a_pair_stays_text(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    summary["stages"] = {"dpo": SAID}
    (folder / "summary.json").write_text(json.dumps(summary))
    page, _ = render_both(read_run(folder))
    part = page[page.index("What preference optimisation did") : page.index('id="timings"')]
    for words in ("1.32", "14.0", "19.8", "the policy forgets", "−2.85 nats", "−8.5", "is no defect", "0.97"):
        assert words in part, words
    assert part.count("What colour is the door of the mill?") == 5  # of seven
    assert "&lt;script&gt;window.hacked=1" in part and "<script>" not in part
    bare = make_run("bare", without=("heaviest.jsonl", "metrics.jsonl"))
    assert "What preference optimisation did" not in render_both(read_run(bare))[0]
