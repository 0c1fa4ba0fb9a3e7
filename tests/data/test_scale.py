"""Judgements made into numbers with errors for each response."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kilter.cli import main
from kilter.data import read, write
from kilter.data.scale import ratings_of
from kilter.errors import DataError
from kilter.records import Demonstration, Judgement, Message, Rating
from kilter.stats.scalars import scalars


def judged(asked: str, responses: str, ranks: tuple[int, ...], **rest: object) -> Judgement:
    prompt = (Message("user", asked),)
    return Judgement(prompt=prompt, responses=tuple(responses), ranks=ranks, annotator="w", **rest)  # type: ignore[arg-type]


def test_verdicts_are_counted_by_prompt_and_group_and_weight() -> None:
    """A tie is half a win of both; a response of the same text twice says nothing of itself."""
    records = [
        judged("one?", "xyz", (0, 1, 2), kind="chat"),
        judged("one?", "yx", (0, 0), weight=3.0),
        judged("one?", "xy", (1, 0), group="other"),
        judged("two?", "xx", (0, 1)),
        judged("two?", "xyx", (0, 1, 0), kind="code"),
    ]
    found = ratings_of(records, sigma=1.0)
    assert found.identical == 2 and found.responses == 7 and found.sigma == 1.0
    expected = scalars(
        [
            np.array([[0, 2.5, 1], [1.5, 0, 1], [0, 0, 0]]),
            np.array([[0.0, 1], [0, 0]]),
            np.array([[0.0, 2], [0, 0]]),
        ],
        sigma=1.0,
    )
    texts = [("x", "y", "z"), ("y", "x"), ("x", "y")]
    for record, responses, values, errors in zip(found.records, texts, expected.values, expected.errors, strict=True):
        assert record.responses == responses
        assert record.values == pytest.approx(values) and record.errors == pytest.approx(errors)
    assert [(r.prompt[0].content, r.group, r.kind) for r in found.records] == [
        ("one?", "", "chat"),
        ("one?", "other", ""),
        ("two?", "", ""),
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    records = []
    for number in range(200):
        truth = 1.5 * rng.normal(size=3)
        for _ in range(5):
            ranks = (-truth - rng.gumbel(size=3)).argsort().argsort()
            records.append(judged(f"{number}?", "abc", tuple(ranks.tolist())))
    file, out = tmp_path / "judged.jsonl", tmp_path / "scale.jsonl"
    write(file, records)
    assert main(["data", "scale", str(file), "--out", str(out)]) == 0
    told = ratings_of(records)
    assert f"200 prompts, 600 responses; sigma {told.sigma:.3f} nats (fitted)" in capsys.readouterr().out
    again = read(out).records
    assert [record.id for record in again] == [record.id for record in told.records] and isinstance(again[0], Rating)
    assert main(["data", "scale", str(file), "--out", str(out)]) == 2
    other = tmp_path / "other.jsonl"
    assert main(["data", "scale", str(file), "--sigma", "0.5", "--out", str(other)]) == 0
    assert "sigma 0.500 nats (given)" in capsys.readouterr().out


def test_refusals() -> None:
    with pytest.raises(DataError, match="no verdict contradicts the others"):
        ratings_of([judged("one?", "xyz", (0, 1, 2))])
    with pytest.raises(DataError, match="no two different responses were compared"):
        ratings_of([judged("one?", "xx", (0, 1))])
    with pytest.raises(DataError, match="record 1 is a Demonstration; a scale needs judgements"):
        ratings_of([Demonstration(messages=(Message("user", "?"), Message("assistant", "!")))])
