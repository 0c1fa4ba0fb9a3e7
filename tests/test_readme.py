"""Every block of the README is executed, as it stands, on a tiny model and files of the embedded world."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def block(language: str, start: str) -> str:
    found = [text for name, text in BLOCKS if name == language and text.startswith(start)]
    assert len(found) == 1, f"one {language} block that starts with {start!r}"
    return found[0]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What the README takes for granted: a folder MODEL, demos.jsonl, pairs.jsonl, judgements.jsonl."""
    from kilter import data, world

    (tmp_path / "MODEL").symlink_to(world.MODEL_PATH)
    data.write(tmp_path / "demos.jsonl", world.demonstrations(per_kind=3))
    prompts = world.prompts("train", per_kind=16)
    texts = [[world.oracle(prompt), "I do not know. " * 3] for prompt in prompts]
    judged = world.panel(seed=0, noise=0.0, tie_rate=0.0).rank(prompts, texts)
    data.write(tmp_path / "pairs.jsonl", judged)
    crowd = [one for seed in range(3) for one in world.panel(seed=seed, noise=2.0).rank(prompts, texts)]
    data.write(tmp_path / "judgements.jsonl", [replace(one, models=("oracle", "dunce")) for one in crowd])
    return tmp_path


def test_there_are_no_other_blocks() -> None:
    assert [name for name, _ in BLOCKS] == ["bash", "bash", "bash", "python"]


def test_the_two_commands_are_targets_of_make() -> None:
    for line in block("bash", "make demo").split("\n"):
        if line:
            done = subprocess.run(
                ["make", "--dry-run", line.split()[1]], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


def executed(home: Path, start: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block("bash", start)],
        cwd=home,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_audit_in_five_lines(home: Path) -> None:
    assert len(block("bash", "kilter data agreement").strip().split("\n")) == 5
    said = executed(home, "kilter data agreement")
    assert "alpha, nominal" in said and "flattery" in said
    assert (home / "runs/elsewhere/audit.json").exists()
    assert (home / "runs/judged/stages/01-reward/result/audit.json").exists()
    assert "The reward model’s audit: " in (home / "runs/judged/report.html").read_text()


@pytest.mark.slow
def test_your_own_model_and_data(home: Path) -> None:
    executed(home, "kilter doctor")
    for result in (
        "sft/stages/01-sft",
        "reward/stages/01-reward",
        "dpo/stages/01-prefer",
        "ppo/stages/01-rl",
        "sums/stages/01-rl",
    ):
        assert (home / "runs" / result / "result" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_python_block(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block("python", "import kilter")], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (home / done.stdout.strip()).exists()
