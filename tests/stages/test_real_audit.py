"""tools/real_audit.py on the shared files: what it says of the data, its split, the audit of a known reward there."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from kilter import data
from kilter.data.split import split_by_prompt
from kilter.stages.audit import audit_file

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("real_audit")


def words(samples: Any) -> list[float]:
    """A reward for nothing but words."""
    return [float(len(sample.text.split())) for sample in samples]


def transcripts(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_longer_answer_is_chosen_in_43_of_100_harmless_pairs(shared_data: Path, tool: Any) -> None:
    path = shared_data / "hh_rlhf/harmless-base.test.jsonl.gz"
    lengths = [
        [len(row[side].rpartition("\n\nAssistant:")[2].split()) for side in ("chosen", "rejected")]
        for row in transcripts(path)
    ]
    by_hand = sum(chosen > rejected for chosen, rejected in lengths) / len(lengths)
    told = tool.longer_in(path)
    assert told["rows"] == len(lengths) == 2312
    assert by_hand == pytest.approx(0.43, abs=0.005) and told["longer"] / 2312 == pytest.approx(0.43, abs=0.005)


def test_no_conversation_begins_on_both_sides(shared_data: Path, tool: Any) -> None:
    pairs, told = tool.pairs_of(shared_data)
    assert {one.kind for one in pairs} == set(tool.TRANCHES) and len(pairs) == sum(
        row["pairs"] for row in told.values()
    )
    assert all(row["rows"] == row["unreadable"] + row["equal texts"] + row["pairs"] for row in told.values())
    sides = split_by_prompt(pairs, held_out=tool.AUDITED, seed=0)
    learned, audited = ({one.prompt[0].content.strip() for one in side} for side in sides)
    assert not learned & audited
    assert len(sides[1]) / len(pairs) == pytest.approx(tool.AUDITED, abs=0.02)


def test_a_reward_for_words_is_audited_on_all_three(shared_data: Path, tool: Any, tmp_path: Path) -> None:
    """Its accuracy is that of preferring the longer, it prefers it always, and the page says all of it."""
    about = tool.prepare(shared_data, tmp_path, 0)
    assert about["train"] + about["audited"] == sum(about["files"][name]["pairs"] for name in tool.TRANCHES)
    pairs = data.read(tmp_path / "audit.jsonl").records
    data.write(tmp_path / "few.jsonl", pairs[::8])
    files = {"HH-RLHF": tmp_path / "few.jsonl", "LLMBar": tmp_path / "llmbar.jsonl"}
    files["RM-Bench chat"] = shared_data / "rm_bench/chat.jsonl.gz"
    audits = {
        title: tool.figures(audit_file(f"{__name__}:words", str(path), prompts=20) | {"seconds": 0.0})
        for title, path in files.items()
    }
    for told in audits.values():
        assert told["calibration"]["accuracy"]["mean"] == pytest.approx(told["longer"]["better"]["mean"])
        assert told["longer"]["preferred"]["mean"] > 0.95  # all but equal lengths
        assert {"padding", "repetition"} <= set(told["failed"]) and told["longer"]["right_if_shorter"]["mean"] == 0.0
    assert set(audits["LLMBar"]["by_kind"]) == set(tool.LLMBAR["llmbar"])
    style = audits["RM-Bench chat"]["style"]
    assert style["easy"]["low"] > style["normal"]["high"] and style["normal"]["low"] > style["hard"]["high"]
    share = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    design = {"about": "words", "parameters": 0, "positions": 1, "fits": 1, "steps": 2, "best_step": 1}
    designs = {"words": design | dict.fromkeys(("read", "shared", "all"), share)}
    page = tool.section(about, designs, {"all": share}, "words", audits)
    assert "the chosen one in 43.0%" in page and page.count("\n| harmless-base |") == 1
    assert all(len(line) <= 120 for line in page.splitlines() if not line.startswith("|"))
