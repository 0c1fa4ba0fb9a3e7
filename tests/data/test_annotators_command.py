"""What a file of judgements says of its annotators, and the weights it gives their verdicts."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kilter.cli import main
from kilter.data import read, write
from kilter.data.crowd import annotators_of, weighted
from kilter.errors import DataError
from kilter.records import Judgement, Message, PreferencePair


def judged(
    who: str, ranks: Sequence[int], texts: Sequence[str], *, asked: str = "?", shown: tuple[int, ...] = ()
) -> Judgement:
    return Judgement(
        prompt=(Message("user", asked),), responses=tuple(texts), ranks=tuple(ranks), annotator=who, shown=shown
    )


SKILLS = {"ann": 2.0, "bob": 2.0, "cyd": 2.0, "dan": 1.5, "eve": 0.0, "foe": -2.0, "sid": 0.3, "lou": 0.3}


def group(seed: int = 0, *, items: int = 120, shown: bool = True) -> list[Judgement]:
    """Eight who judge everything: four good, a coin, an adversary, one goes by the left and one by length."""
    rng = np.random.default_rng(seed)
    found = []
    for item in range(items):
        quality = rng.normal()
        texts = [" ".join([f"{name}{item}"] * int(rng.integers(5, 60))) for name in "xy"]
        for who, skill in SKILLS.items():
            left = int(rng.integers(2))
            liked = skill * quality + 3.0 * (who == "sid") * (1 - 2 * left)
            liked += 2.0 * (who == "lou") * np.log2(len(texts[0].split()) / len(texts[1].split()))
            ranks = (0, 1) if rng.random() < 1 / (1 + np.exp(-liked)) else (1, 0)
            order = (left, 1 - left) if shown else ()
            found.append(judged(who, ranks, texts, asked=f"{item}?", shown=order))
    return found


def test_what_is_told() -> None:
    told = annotators_of(group())
    assert (told.judgements, told.items, told.items_of_several, len(told.annotators)) == (960, 120, 120, 8)
    found = {one.name: one for one in told.annotators}
    assert told.annotators[0].name == "foe" and found["foe"].skill.high < 0 and found["foe"].weight == 0
    assert found["eve"].skill.low < 0.2 and found["eve"].weight < found["dan"].weight / 2
    assert found["sid"].side is not None and found["sid"].side.low > 1.5
    assert found["lou"].length is not None and found["lou"].length.low > 0.7
    assert min(found[name].skill.low for name in ("ann", "bob", "cyd", "dan")) > 0.5
    assert min(found[name].weight for name in ("ann", "bob", "cyd", "dan")) > 2 * found["sid"].weight
    assert all(one.judgements == 120 and one.with_others for one in told.annotators)
    liking = annotators_of(group(), shared="liking")
    assert [one.weight for one in liking.annotators] != [one.weight for one in told.annotators]
    assert annotators_of(group(), seed=1).skill != told.skill == annotators_of(group()).skill


def test_sides_and_lengths_that_are_not_known() -> None:
    plain = [replace(record, responses=("x y", "y x")) for record in group(shown=False)]
    told = annotators_of(plain)
    assert told.side is None and told.length is None
    assert all(one.side is None and one.length is None for one in told.annotators)
    assert told.to_dict()["side"] is None and told.to_dict()["annotators"][0]["length"] is None


def test_which_side_is_the_first() -> None:
    """Who always takes what was shown first, in a ranking of three and in whatever order the file has it."""
    rng = np.random.default_rng(0)
    rows = []
    for item in range(60):
        for who in ("left", "right", "other"):
            shown = tuple(int(place) for place in rng.permutation(3))
            turn = {"left": 1, "right": -1, "other": 0}[who]
            ranks = tuple(turn * shown.index(place) for place in range(3)) if turn else (0, 1, 2)
            ranks = tuple(rank - min(ranks) for rank in ranks)
            rows.append(judged(who, ranks, ("aa", "b", "c c"), asked=f"{item}?", shown=shown))
    found = {one.name: one.side for one in annotators_of(rows).annotators}
    assert found["left"] is not None and found["left"].low > 1
    assert found["right"] is not None and found["right"].high < -1
    assert found["other"] is not None and not found["other"].excludes(0.0)
    twice = [replace(row, responses=("aa", "aa", "c c")) for row in rows]
    assert annotators_of(twice).side is None  # which of the two was it?
    odd = [replace(row, shown=(0, 0, 1)) for row in rows]
    assert annotators_of(odd).side is None


def test_weights_have_mean_one_and_are_given_once() -> None:
    records = [replace(record, weight=7.0, group="g") for record in group()]
    told = annotators_of(records)
    found = weighted(records, told)
    weights = {record.annotator: record.weight for record in found}
    assert np.mean([record.weight for record in found]) == pytest.approx(1.0)
    worth = {one.name: one.weight for one in told.annotators}
    assert weights["ann"] / weights["dan"] == pytest.approx(worth["ann"] / worth["dan"]) and weights["foe"] == 0
    assert [replace(record, weight=7.0) for record in found] == records
    assert weighted(found, annotators_of(found)) == found  # the weights of a file say nothing of its annotators


def test_repeated_and_identical_verdicts() -> None:
    """A second verdict of one annotator on an item, and two responses of one text, add nothing; both get a weight."""
    records = group(items=40)
    more = [judged("ann", (1, 0), records[0].responses, asked="0?", shown=(0, 1)), judged("new", (0, 1), ("x", "x"))]
    told = annotators_of([*records, *more])
    assert [one.skill for one in told.annotators] == [one.skill for one in annotators_of(records).annotators]
    found = weighted([*records, *more], told)
    assert found[-2].weight == found[0].weight > 0 and found[-1].weight == 0


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([judged("a", (0, 1), "xy"), judged("b", (0, 1), "xy", asked="!")], r"no two annotators judged the same item"),
        ([judged("a", (0, 1), "xx")], "no two different responses were compared"),
        (
            [PreferencePair(prompt=(Message("user", "?"),), chosen="x", rejected="y")],
            "who judged what is read from judgements",
        ),
        ([judged("", (0, 1), "xy")], "'annotator' is empty"),
    ],
)
def test_refusals(records: list[Judgement], words: str) -> None:
    with pytest.raises(DataError, match=words):
        annotators_of(records)


def test_nobody_worth_anything_is_refused() -> None:
    told = annotators_of(group(items=20))
    with pytest.raises(DataError, match="no annotator is better than a coin here"):
        weighted(group(items=20), replace(told, annotators=[replace(one, weight=0.0) for one in told.annotators]))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "judged.jsonl", tmp_path / "weighted.jsonl"
    alone = [judged("zed\n  +9.00", (0, 1), ("x", "y z"), asked=f"{n} alone?") for n in range(5)]
    write(file, [*group(), *alone])
    assert main(["data", "annotators", str(file), "--out", str(out), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert "965 judgements by 9 annotators; 125 items (two responses each), 120 of them judged by several" in shown
    lines = shown.splitlines()
    assert lines[4].endswith("foe (120)") and lines[6].endswith("the crowd's mean") and "7 more annotators" in shown
    assert "1 annotators judged nothing that anybody else judged (alone)" in shown
    assert read(out).records == weighted(read(file).records, annotators_of(read(file).records))
    assert main(["data", "annotators", str(file), "--out", str(out)]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert main(["data", "annotators", str(file), "--as-json", "--shared-length", "liking"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == annotators_of(read(file).records, shared="liking").to_dict()
    assert told["annotators"][-1]["name"].startswith("zed") and not told["annotators"][-1]["with_others"]
    assert main(["data", "annotators", str(file)]) == 0
    whole = capsys.readouterr().out
    assert "zed +9.00 (5, alone)" in whole and not any(line.startswith("  +9.00") for line in whole.splitlines())


def test_the_command_on_files_without_overlap_or_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "judged.jsonl"
    write(file, [judged("ab"[n % 2], (0, 1), "xy", asked=f"{n}?") for n in range(9)])
    assert main(["data", "annotators", str(file)]) == 2
    assert "have some items judged by two annotators or more" in capsys.readouterr().err
    file.unlink()
    write(file, group(shown=False, items=40))
    assert main(["data", "annotators", str(file)]) == 0
    assert "nothing says which response was shown first ('shown')" in capsys.readouterr().out


def test_the_crowd_of_llmfao(shared_data: Path) -> None:
    """7,723 verdicts of 124 workers on non-empty responses: the left is liked by all in the mean (0.15 nats) and by
    worker 20 a good deal (0.7); nobody is surely worse than a coin; shorter responses win."""
    folder = shared_data / "llmfao"
    with gzip.open(folder / "pairs-crowd.jsonl.gz", "rt", encoding="utf-8") as lines:
        pairs = {str(row["id"]): row for row in map(json.loads, lines)}
    ranks = {"left": (0, 1), "right": (1, 0), "tie": (0, 0)}
    records = []
    with (folder / "crowd-comparisons.csv").open(encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            pair = pairs[row["id"]]
            texts = pair["result_x"], pair["result_y"]
            if all(text.strip() for text in texts):
                records.append(judged(row["worker"], ranks[row["winner"]], texts, asked=pair["text"], shown=(0, 1)))
    told = annotators_of(records)
    found = {one.name: one for one in told.annotators}
    assert (told.judgements, len(found), told.items_of_several) == (7723, 124, 1714)
    assert told.side is not None and told.side.low > 0 and told.side.mean == pytest.approx(0.15, abs=0.03)
    assert found["20"].side is not None and found["20"].side.mean == pytest.approx(0.70, abs=0.1)
    assert told.length is not None and told.length.high < 0
    assert all(one.skill.high > 0 for one in told.annotators) and found["11"].skill.mean < 0.35
