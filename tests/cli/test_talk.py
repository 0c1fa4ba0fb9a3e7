"""`kilter chat`: what is typed is answered, as it is drawn, and the same seed gives the same words."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from kilter import world
from kilter.cli import main


def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, *words: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["chat", str(world.MODEL_PATH), *words]) == 0
    return capsys.readouterr().out


def test_answers_repeat_under_a_seed_and_go_on_from_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = world.prompts(split="held_out", per_kind=1)[0].prompt[-1].content
    ask = [chat(monkeypatch, capsys, f"{question}\n{again}", "--seed", "3") for again in ("", "", f"{question}\n")]
    assert ask[0] == ask[1] and ask[0].strip()
    assert ask[2].startswith(ask[0]) and len(ask[2].splitlines()) > len(ask[0].splitlines())
    assert chat(monkeypatch, capsys, question, "--seed", "4", "--temperature", "1.5") != ask[0]


def test_words_are_printed_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []

    class Printed(io.StringIO):
        def write(self, text: str) -> int:
            parts.append(text)
            return super().write(text)

    printed: Any = Printed()
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is two plus two?\n"))
    assert main(["chat", str(world.MODEL_PATH), "--temperature", "0"]) == 0
    assert len([part for part in parts if part.strip()]) > 3


def test_a_stop_text_ends_the_answer_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What is two plus two?"
    whole = chat(monkeypatch, capsys, question, "--temperature", "0").rstrip("\n")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = chat(monkeypatch, capsys, question, "--temperature", "0", "--stop", stop).rstrip("\n")
    assert cut == whole[: whole.index(stop)] and cut != whole
