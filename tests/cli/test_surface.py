"""What users touch: help without torch, errors in one line with exit code 2, nothing overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kilter import data, world
from kilter.cli import main
from kilter.cli.main import COMMANDS

REWARDED = ["--model", "m", "--reward", "r", "--prompts", "p"]
PAIRS = ["--model", "m", "--data", "d"]
NAMES = [name for commands in COMMANDS.values() for name in commands]


def fails(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must fail, and return its one line."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_at_most_fifteen_commands() -> None:
    assert len(NAMES) == len(set(NAMES)) <= 15


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in NAMES)], ids=" ".join)
def test_help_loads_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom kilter.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not code, code\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["sft", "--model", "m", "--data", "d", "--optim.learning-rat", "1"],
            ["--optim.learning-rat", "--optim.learn"],
        ),
        (["sft", "--model", "m", "--data", "d", "--optim.learning-rate", "-1"], ["learning_rate", "-1", "greater"]),
        (["sft", "--model", "m", "--data", "d", "--held-out", "2"], ["held_out", "2.0", "less than 1"]),
        (["sft", "--model", "m", "--data", "d", "--epochs", "many"], ["--epochs", "many"]),
        (["sft", "--model", "m"], ["--data", "must be given"]),
        (["prefer", *PAIRS, "--loss.beta", "nan"], ["loss.", "beta", "nan", "finite"]),
        (
            ["rl", *REWARDED, "--algorithm", "gppo"],
            ["rl: --algorithm is 'gppo'; choose one of ppo, grpo", "reinforce++"],
        ),
        (["rl", *REWARDED, "--algorithm", "rloo", "--num-samples", "1"], ["rl: rloo compares", "at least 2"]),
        (["sfft"], ["'sfft'", "'sft'"]),
        (["losses", "simp"], ["'simp'", "'simpo'"]),
        (["prefer", *PAIRS, "--loss.gamma"], ["--loss.gamma", "needs a value"]),
        (["prefer", *PAIRS, "--loss.gamma", "--epochs", "2"], ["--loss.gamma", "needs a value"]),
        (
            ["prefer", *PAIRS, "--loss.gamma", "1"],
            ["loss.gamma", "'dpo'", "label_smoothing"],
        ),
        (["prefer", *PAIRS, "--loss.name", "simpoo"], ["loss.name", "'simpoo'", "'simpo'"]),
        (["align", "none.yaml"], ["none.yaml", "no such file"]),
        (["align"], []),
        (["data", "chek", "x"], ["'chek'", "check"]),
        (["data", "check", "none.jsonl"], ["none.jsonl", "no such file"]),
        (["report", "none"], ["none", "no such directory"]),
        (["world", "prompts"], ["--out"]),
        (["world", "prompts", "--kinds", "sums", "--out", "sums.jsonl"], ["'sums'", "sum,"]),
        (["doctor", "/no/such/model"], ["/no/such/model", "no such folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words == ["align"]:
        assert main(words) == 0
        return
    line = fails(words, capsys)
    for part in parts:
        assert part in line, line


def test_a_run_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    demos = tmp_path / "demos.jsonl"
    data.write(demos, world.demonstrations(per_kind=1))
    words = ["sft", "--model", str(world.MODEL_PATH), "--data", str(demos), "--out", str(tmp_path / "file" / "run")]
    assert "a file stands where a folder is needed" in fails(words, capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("what", ["prompts", "demonstrations"])
def test_the_world_writes_the_kinds_that_are_asked_for(what: str, tmp_path: Path) -> None:
    out = tmp_path / "some.jsonl"
    words = ["world", what, "--kinds", "sum", "fact", "--per-kind", "2", "--out", str(out)]
    assert main(words) == 0
    rows = data.read(out).records
    items = [world.grammar.find(row.messages[:-1] if what == "demonstrations" else row.prompt) for row in rows]
    assert sorted(item.kind for item in items if item) == ["fact", "fact", "sum", "sum"]


def test_malformed_rows_are_named_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "", "rejected": "c"}\n')
    line = fails(["data", "check", str(file)], capsys)
    assert "pairs.jsonl:2" in line
    assert "--skip-bad" in line


def test_data_check_says_one_when_there_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "x", "chosen": "b", "rejected": "c"}\n'
    )
    assert main(["data", "check", str(file)]) == 1
    assert "identical" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prompts.jsonl"
    out.write_text("mine")
    assert "not overwritten" in fails(["world", "prompts", "--out", str(out)], capsys)
    assert "not overwritten" in fails(["data", "convert", str(out), "--out", str(out)], capsys)
    assert out.read_text() == "mine"


def test_another_kind_of_file_is_not_pretended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", "demonstrations", "--per-kind", "1", "--out", str(tmp_path / "a.jsonl")]) == 0
    line = fails(["data", "convert", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "a.csv")], capsys)
    assert "a.csv" in line and "name it .jsonl" in line
    assert "name it .jsonl" in fails(["world", "prompts", "--out", str(tmp_path / "a.csv")], capsys)
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("name", ["copy", "dry-run", "model_dump"])
def test_a_stage_named_as_an_option_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"stages: {{{name}: {{stage: sft, model: m, data: d.jsonl}}}}")
    assert "has the name of an option" in fails(["align", str(recipe)], capsys)


def test_an_override_that_breaks_the_recipe_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    stage = "{stage: sft, model: m, data: d.jsonl}"
    recipe.write_text(f"stages: {{a: {stage}, b: {stage}}}")
    assert "'b', which is not an earlier stage" in fails(["align", str(recipe), "--a.model", "b"], capsys)
    for stages in ("[1, 2]", "{a: 3}", ""):
        recipe.write_text(f"stages: {stages}")
        assert "must be a mapping" in fails(["sft", "--config", str(recipe), "--out", str(tmp_path / "o")], capsys)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    words = [sys.executable, "-u", "-m", "kilter.cli", "data", "formats"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_a_defect_is_one_line_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(world, "prompts", broken)
    words = ["world", "prompts", "--out", str(tmp_path / "p.jsonl")]
    assert main(words) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ZeroDivisionError: by nothing" in error and "test_surface.py:" in error
    with pytest.raises(ZeroDivisionError):
        main([*words, "--debug"])


def test_convert_filter_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "demos.jsonl", tmp_path / "kept.jsonl"
    assert main(["world", "demonstrations", "--per-kind", "2", "--out", str(first)]) == 0
    assert main(["data", "filter", str(first), "--out", str(second), "--rules", "duplicates", "max-chars=60"]) == 0
    assert 0 < len(data.read(second).records) < 22
    assert main(["data", "show", str(first), "--model", str(world.MODEL_PATH), "--count", "1"]) == 0
    assert "[<|end|>]" in capsys.readouterr().out


def test_options_of_losses_are_taken_where_a_loss_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of a stage of its own, and of one in a recipe, on top of what the file says."""
    model = "kilter.world:MODEL_PATH"
    words = ["prefer", "--model", model, "--data", "d", "--loss.name", "simpo", "--loss.beta=2.5"]
    assert main([*words, "--loss.gamma", "1e-1", "--loss.weight", "2", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "name: simpo\n      weight: 2.0\n      options:\n        beta: 2.5\n        gamma: 0.1\n" in shown.out
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"stages: {{first: {{stage: prefer, model: {model}, data: d, "
        "loss: {name: dpo, beta: 0.2, label_smoothing: 0.1}}}"
    )
    assert main(["align", str(recipe), "--first.loss.beta", "0.7", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "options:\n        beta: 0.7\n        label_smoothing: 0.1\n" in shown.out
    assert "note: stages.first: loss.beta is 0.7; usual for 'dpo' is 0.03 to 0.5" in shown.err


def test_prefer_online_is_a_stage_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = "kilter.world:MODEL_PATH"
    words = ["prefer", "--online", "--model", model, "--reward", "kilter.world:true_reward", "--prompts", "d"]
    assert main([*words, "--loss.beta", "0.3", "--num-samples", "4", "--pairing", "all", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "stage: online" in shown and "beta: 0.3" in shown and "num_samples: 4" in shown
    assert main(["prefer", "--online", "--model", model, "--data", "d"]) == 2
    assert "kilter prefer --online" in capsys.readouterr().err  # `data` is not what it reads
    config = tmp_path / "online.yaml"
    config.write_text(f"stages: {{a: {{stage: online, model: {model}, reward: m:r, prompts: d, rounds: 7}}}}")
    assert main(["prefer", "--online", "--config", str(config), "--dry-run"]) == 0
    assert "rounds: 7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["prefer", "--online", "--help"])
    assert "--prompts-per-round" in capsys.readouterr().out


def test_the_losses_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 0
    listed = capsys.readouterr().out
    assert "over thumbs:\n  kto" in listed and "orpo" in listed
    assert main(["losses", "dpo", "kto"]) == 0
    shown = capsys.readouterr().out
    assert "arXiv 2305.18290, eq. 7" in shown and "arXiv 2402.01306" in shown
    assert main(["losses", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Losses")
