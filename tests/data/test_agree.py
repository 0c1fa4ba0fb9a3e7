"""Judgements taken apart, and what a file of them says of its annotators."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kilter.cli import main
from kilter.data import write
from kilter.data.agree import agreement_of
from kilter.data.judgements import verdicts
from kilter.errors import DataError
from kilter.records import Judgement, Message, PreferencePair, Record
from kilter.stats import agreement
from kilter.stats.agreement import Ratings

ASKED = (Message("user", "Which?"),)


def judged(
    who: str, ranks: tuple[int, ...], texts: tuple[str, ...] = ("x", "y"), *, asked: str = "Which?", **more: str
) -> Judgement:
    return Judgement(
        prompt=(Message("user", asked),),
        responses=texts,
        ranks=ranks,
        annotator=who,
        kind=more.get("kind", ""),
        at=more.get("at", ""),
    )


def crowd(seed: int = 0, *, items: int = 60, times: bool = False) -> list[Judgement]:
    """Four who mostly see the better response (the one of the longer name) and one who throws a coin."""
    rng = np.random.default_rng(seed)
    records = []
    for item in range(items):
        for number, who in enumerate(("ann", "bob", "cyd", "dan", "eve")):
            right = rng.random() < (0.5 if who == "eve" else 0.9)
            texts = (f"good answer {item}", f"bad {item}")
            swapped = rng.random() < 0.5
            ranks = (0, 1) if right != swapped else (1, 0)
            records.append(
                judged(
                    who,
                    ranks,
                    texts[::-1] if swapped else texts,
                    kind="odd" if item % 2 else "even",
                    at=f"2026-01-{1 + item // 3:02}T10:0{number}:00" if times else "",
                )
            )
    return records


def test_a_ranking_is_its_pairs() -> None:
    found = verdicts([judged("a", (0, 1, 1), ("x", "y", "z")), judged("b", (0, 1), ("z", "x"))])
    better = [found.texts[v.item][v.value > 0] if v.value else "tie" for v in found.kept]
    assert [v.annotator for v in found.kept] == ["a", "a", "a", "b"] and better == ["x", "x", "tie", "z"]
    assert found.kept[3].item == found.kept[1].item and sorted(found.texts[found.kept[3].item]) == ["x", "z"]
    assert len({verdict.item for verdict in found.kept}) == 3 and found.kept[3].record == 1


def test_order_and_prompt_make_the_item() -> None:
    found = verdicts([judged("a", (0, 1)), judged("b", (1, 0), ("y", "x")), judged("a", (0, 1), asked="Other?")])
    one, turned, other = found.kept
    assert one.item == turned.item != other.item and one.value == turned.value != 0 and one.prompt != other.prompt


def test_the_first_of_repeated_verdicts_counts() -> None:
    found = verdicts([judged("a", (0, 1)), judged("a", (1, 0)), judged("b", (0, 1)), judged("a", (1, 0), ("y", "x"))])
    assert found.repeated == 2 and found.kept[0].value == found.kept[1].value


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            PreferencePair(prompt=ASKED, chosen="x", rejected="y"),
            "record 2 is a PreferencePair; who judged what is read from judgements",
        ),
        (judged("", (0, 1)), "record 2: 'annotator' is empty"),
    ],
)
def test_who_judged_must_be_said(record: Record, words: str) -> None:
    with pytest.raises(DataError, match=words):
        verdicts([judged("a", (0, 1)), record])


def test_one_annotator_each_is_refused() -> None:
    with pytest.raises(DataError, match="2 items were judged by one annotator each"):
        agreement_of(verdicts([judged("a", (0, 1)), judged("b", (0, 1), asked="Other?")]))


def test_what_is_told() -> None:
    records = crowd(times=True)
    told = agreement_of(verdicts(records))
    assert (told.judgements, told.items, told.annotators, told.repeated) == (300, 60, 5, 0)
    ratings = Ratings.of([(verdict.item, verdict.annotator, verdict.value) for verdict in verdicts(records).kept])
    assert told.measures["alpha, nominal"].mean == pytest.approx(agreement.alpha(ratings).value(), abs=1e-12)
    assert told.measures["Fleiss' kappa"].mean == pytest.approx(agreement.fleiss(ratings).value(), abs=1e-12)
    assert next(iter(told.pull)) == "eve" and told.pull["eve"] < -0.05
    assert set(told.by_kind) == {"even", "odd"} and len(told.by_time) == 2
    assert all(name.split()[1][:7] == "2026-01" for name in told.by_time)
    assert len(told.pairs) == 10 and all(common == 60 for _, common in told.pairs.values())
    with_eve = [kappa.mean for names, (kappa, _) in told.pairs.items() if "eve" in names]
    others = [kappa.mean for names, (kappa, _) in told.pairs.items() if "eve" not in names]
    assert max(with_eve) < min(others)
    assert list(told.items_pull.values()) == sorted(told.items_pull.values())


def test_times_that_are_numbers_go_by_their_size() -> None:
    records = [judged(who, (0, 1), asked=f"{n}?", at=f"{n}") for n in (9, 10, 11, 100) for who in "ab"]
    records[0] = judged("a", (1, 0), asked="9?", at="9")
    records[4] = judged("a", (1, 0), asked="11?", at="11")
    assert list(agreement_of(verdicts(records)).by_time) == ["until 10", "from 11"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "judged.jsonl"
    write(file, [*crowd(), judged("ann", (0, 1), ("good answer 0", "bad 0"))])
    assert main(["data", "agreement", str(file)]) == 0
    out = capsys.readouterr().out
    told = agreement_of(verdicts(crowd()))
    alpha = told.measures["alpha, nominal"]
    assert "301 judgements" not in out and "300 judgements by 5 annotators; 60 items" in out
    assert "1 further verdicts of an annotator" in out
    assert f"alpha, nominal  {alpha.mean:.3f} [{alpha.low:.3f}, {alpha.high:.3f}]  LLMFAO's crowd 0.29" in out
    assert f"{told.pull['eve']:+.3f}  eve" in out and "alpha lies below the textbooks' 0.6" in out
    assert main(["data", "agreement", str(file), "--as-json", "--seed", "1"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["measures"]["alpha, nominal"]["mean"] == pytest.approx(alpha.mean)
    assert again["measures"]["alpha, nominal"]["low"] != alpha.low and again["repeated"] == 1
    assert len(again["items_pull"]) == 20 and next(iter(again["pull"])) == "eve"


def test_the_command_wants_judgements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    write(file, [PreferencePair(prompt=ASKED, chosen="x", rejected="y")])
    assert main(["data", "agreement", str(file)]) == 2
    assert "no judgement can be made of them" in capsys.readouterr().err


def test_the_order_of_a_file_is_no_opinion() -> None:
    """The better response first in every row, or in none: not one figure moves. (With an item's order taken from its
    first row all verdicts would be of one category, and alpha negative.)"""
    records = crowd()
    first = [replace(r, responses=r.responses[:: 1 if r.ranks[0] == 0 else -1], ranks=(0, 1)) for r in records]
    last = [replace(r, responses=r.responses[::-1], ranks=(1, 0)) for r in first]
    told = [agreement_of(verdicts(one)).to_dict() for one in (records, first, last)]
    assert told[0] == told[1] == told[2] and told[0]["measures"]["alpha, nominal"]["mean"] > 0.3


def test_chance_is_as_the_file_lets_one_choose() -> None:
    """Coins agree half of the time, which is nothing where nobody may call a tie."""
    rng = np.random.default_rng(0)
    coins = [judged(who, (0, 1) if rng.random() < 0.5 else (1, 0), asked=f"{n}?") for n in range(300) for who in "ab"]
    told = agreement_of(verdicts(coins))
    assert abs(told.measures["AC1"].mean - told.measures["alpha, nominal"].mean) < 0.02
    tied = agreement_of(verdicts([*coins, judged("a", (0, 0), asked="T?"), judged("b", (0, 0), asked="T?")]))
    assert tied.measures["AC1"].mean > 0.2


def test_one_text_twice_is_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [judged(who, (0, 1, 2), ("x", "x", "y")) for who in "ab"]
    found = verdicts(same)
    assert (found.identical, found.repeated, len(found.kept)) == (2, 2, 2)
    with pytest.raises(DataError, match="no two different responses were compared"):
        agreement_of(verdicts([judged("a", (0, 1), ("x", "x"))]))
    file = tmp_path / "judged.jsonl"
    write(file, [*same, judged("a\n  alpha, nominal  0.999", (0, 1, 2), ("x", "z", "y"))])
    assert main(["data", "agreement", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 verdicts on two responses of one text" in out
    assert not any(line.startswith("  alpha, nominal  0.999") for line in out.splitlines())


def test_of_one_item_nothing_is_known() -> None:
    told = agreement_of(verdicts([judged("a", (0, 1)), judged("b", (0, 1)), judged("c", (1, 0))]))
    assert told.measures["raw"].mean == pytest.approx(1 / 3) and told.measures["raw"].low == -np.inf


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--resamples", "100000000"]])
def test_numbers_out_of_range(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "judged.jsonl"
    write(file, crowd())
    assert main(["data", "agreement", str(file), *words]) == 2
    assert words[0].strip("-") in capsys.readouterr().err
