"""Reading a run directory: what is broken is noted, what is there is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from kilter.errors import RunError
from kilter.report import write_report
from kilter.report.files import read_run


def test_no_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent: no such directory.*runs/"):
        read_run(tmp_path / "absent")


def test_an_empty_directory_is_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    run = read_run(tmp_path)
    assert run.models == {}
    assert run.problems == ["summary.json is missing: the run has not reached its end"]


def test_a_folder_that_holds_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(RunError, match="no run is in it"):
        write_report(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_line_cut_by_a_kill_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "00-sft"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/nll": 2.0}\n\n[1]\n{"step": 2, "loss')
    run = read_run(tmp_path)
    assert list(run.metrics["00-sft"]) == [{"step": 1, "loss/nll": 2.0}]
    assert "stages/00-sft/metrics.jsonl: 2 of 3 lines left out, the first is line 3" in run.problems


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"models": ', "\x00", "[" * 100_000])
def test_a_broken_summary_is_noted(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    run = read_run(tmp_path)
    assert run.summary == {}
    assert run.problems[0].startswith("summary.json")


def test_evaluated_models_are_named_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    for name in ("sft", "curve", "answers"):
        (tmp_path / "evaluation" / f"{name}.jsonl").write_text('{"prompt_id": "a"}\n')
    run = read_run(tmp_path)
    assert list(run.evaluated) == ["sft"]
    assert len(run.curve) == len(run.answers) == 1
