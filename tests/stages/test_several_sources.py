"""An SFT stage with several sources: conversations beside plain text, all tokens or the answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small

import kilter
from kilter import data, world
from kilter.errors import KilterError
from kilter.records import Document
from kilter.rundir import read_jsonl

BASE = "kilter.world:MODEL_PATH"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Conversations of the town, and its talk as plain text."""
    conversations = world.demonstrations(per_kind=3)
    texts = [" ".join(turn.content for turn in record.messages) for record in conversations]
    data.write(tmp_path / "demos.jsonl", conversations)
    data.write(tmp_path / "text.jsonl", [Document(text=" ".join(texts[at : at + 9])) for at in range(0, len(texts), 9)])
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("demos", "text")}


def run(out: Path, **changes: Any) -> list[dict[str, Any]]:
    stage = {"stage": "sft", "model": BASE, "optim": small.OPTIM | {"max_tokens": 64}} | changes
    path = kilter.align({"stages": {"sft": stage}}, out=out).path
    return list(read_jsonl(path / "stages" / "01-sft" / "metrics.jsonl"))


def test_text_is_drawn_beside_conversations(files: dict[str, str], tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", data=files["demos"])
    text = {"path": files["text"], "kind": "document", "weight": 3.0}
    mixed = run(tmp_path / "mixed", data=files["demos"], mix=[text])
    assert len(mixed) == pytest.approx(4 * len(alone), abs=2)
    assert mixed[0]["tokens"] > 2 * alone[0]["tokens"]  # pieces of 63 scored tokens
    again = run(tmp_path / "mixed", data=files["demos"], mix=[text])
    assert again == mixed


def test_all_tokens_or_the_answers_alone(files: dict[str, str], tmp_path: Path) -> None:
    answers = run(tmp_path / "answers", data=files["demos"], loss="dft")
    every = run(tmp_path / "every", data={"path": files["demos"], "score": "all"})
    assert every[0]["tokens"] > 1.3 * answers[0]["tokens"]
    assert set(answers[0]) >= {"loss/dft", "perplexity"} and "loss/nll" in every[0]


def test_plain_text_alone(files: dict[str, str], tmp_path: Path) -> None:
    rows = run(tmp_path / "run", data={"path": files["text"], "kind": "document"}, epochs=3)
    assert rows[-1]["loss/nll"] < rows[0]["loss/nll"]


def test_a_file_of_another_kind_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KilterError, match="it holds document records, and no demonstration"):
        run(tmp_path / "run", data=files["text"])
    with pytest.raises(KilterError, match="no document can be made of"):
        run(tmp_path / "other", data=files["demos"], mix=[{"path": files["demos"], "kind": "document"}])
