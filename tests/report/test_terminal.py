"""The summary in a terminal of 80 columns."""

from __future__ import annotations

import json

from rich.console import Console

from kilter.report import terminal_summary


def shown(folder: object, width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(terminal_summary(folder))  # type: ignore[arg-type]
    return capture.get()


def test_figures_stand_over_their_intervals_in_80_columns(make_run) -> None:
    text = shown(make_run())
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert text.startswith("PPO gained 0.22 over SFT")
    place = next(i for i, line in enumerate(lines) if line.startswith("PPO without KL"))
    assert lines[place].split()[3:] == ["−0.74", "4.10", "66%", "46.00", "38%", "2%"]
    assert "−0.78…−0.70" in lines[place + 1]
    assert "embedded world, 1,412,096 parameters" in " ".join(text.split())
    assert "did not hold  Over-refusal does not rise" in text


def test_what_was_not_measured_is_a_dash(make_run) -> None:
    row = next(line for line in shown(make_run()).splitlines() if line.startswith("Demonstrations"))
    assert row.split()[1:5] == ["0.58", "0.20", "-", "-"]


def test_markup_in_names_is_text(make_run) -> None:
    folder = make_run()
    summary = {
        "models": {"[red]x[/red]": {"true_reward": {"mean": 0.5}}},
        "claims": [{"claim": "[/bold]", "held": True}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    text = shown(folder)
    assert "[red]x[/red]" in text
    assert "[/bold]" in text


def test_an_unfinished_run_says_so(tmp_path) -> None:
    (tmp_path / "stages").mkdir()
    assert "summary.json is missing" in shown(tmp_path)
