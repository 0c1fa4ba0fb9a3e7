"""Checking and filtering data: each fault planted, found with its count, and taken out by its rule."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from kilter.data import read
from kilter.data.filter import RULES, filter_records
from kilter.data.lint import Finding, check, comparisons, label_noise
from kilter.errors import ConfigError
from kilter.records import (
    Conversation,
    Demonstration,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    UnpairedFeedback,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


def ask(text: str) -> Conversation:
    return (Message("user", text),)


def pair(question: str = "Q", chosen: str = "good answer", rejected: str = "bad", **extra: object) -> PreferencePair:
    return PreferencePair(prompt=ask(question), chosen=chosen, rejected=rejected, **extra)  # type: ignore[arg-type]


CLEAN: list[Record] = [pair(f"Q{n}", f"answer {n}" + " and more" * (n % 2), f"other {n} and") for n in range(20)]


def named(findings: list[Finding], name: str) -> Finding | None:
    return next((finding for finding in findings if finding.name == name), None)


def test_clean_data_have_nothing_but_figures() -> None:
    assert [finding.severity for finding in check(CLEAN)] == ["info", "info"]
    assert [finding.name for finding in check([Prompt(prompt=ask("Q"))])] == []


@pytest.mark.parametrize(
    ("name", "severity", "extra", "places", "rule"),
    [
        ("empty", "error", [pair(chosen=" ")], (20,), "min-chars=2"),
        ("identical", "error", [pair(chosen="same", rejected="same")], (20,), "identical"),
        ("nearly-identical", "warning", [pair(chosen="Same  thing", rejected="same thing ")], (20,), "identical"),
        ("duplicates", "warning", [CLEAN[3], CLEAN[3]], (20, 21), "duplicates"),
        ("contradictory", "error", [pair("Q", "a", "b"), pair("Q", "b", "a")], (20, 21), "contradictory"),
        ("cycles", "warning", [pair("Q", *two) for two in ("ab", "bc", "ca")], (20, 21, 22), "cycles"),
        ("markers", "warning", [pair(chosen="Sure<|im_end|>\n<|im_start|>user")], (20,), ""),
        ("markers", "warning", [Demonstration(messages=(*ask("Q"), Message("assistant", "A [/INST]")))], (20,), ""),
    ],
)
def test_a_fault_is_found_and_its_rule_takes_it_out(
    name: str, severity: str, extra: list[Record], places: tuple[int, ...], rule: str
) -> None:
    records = [*CLEAN, *extra]
    finding = named(check(records), name)
    assert finding is not None and finding.severity == severity
    assert finding.examples == places and finding.count == len(places)
    assert named(check(CLEAN), name) is None
    if rule:
        kept, dropped = filter_records(records, [rule])
        assert named(check(kept), name) is None and dropped[rule] == len(places) and kept[:20] == CLEAN


def test_errors_come_first() -> None:
    findings = check([*CLEAN, CLEAN[0], pair(chosen="same", rejected="same")])
    assert [finding.severity for finding in findings] == ["error", "warning", "info", "info"]


def test_leakage_sees_through_case_and_blanks() -> None:
    held: list[Record] = [Prompt(prompt=ask("  q3 ")), Prompt(prompt=ask("Q77"))]
    finding = named(check(CLEAN, held_out=held), "leakage")
    assert finding is not None and finding.severity == "error" and finding.examples == (3,)
    kept, dropped = filter_records(CLEAN, ["leaked"], held_out=held)
    assert dropped == {"leaked": 1} and named(check(kept, held_out=held), "leakage") is None


def test_ties_contradict_nothing_and_may_be_equal() -> None:
    records: list[Record] = [pair("Q", "a", "b"), pair("Q", "b", "a", tie=True), pair("R", "c", "c", tie=True)]
    assert not [finding for finding in check(records) if finding.severity == "error"]
    assert filter_records(records, ["ties"])[0] == records[:1]


def test_contradictions_make_no_cycle_and_a_chain_is_none() -> None:
    both: list[Record] = [pair("Q", *two) for two in ("ab", "ba", "bc", "cb")]
    assert named(check(both), "cycles") is None
    chain: list[Record] = [pair("Q", *two) for two in ("ab", "bc", "ac", "cd")]
    assert named(check(chain), "cycles") is None
    elsewhere: list[Record] = [pair("Q", "a", "b"), pair("Q", "b", "c"), pair("R", "c", "a")]
    assert named(check(elsewhere), "cycles") is None
    longer: list[Record] = [pair("Q", *two) for two in ("ab", "bc", "cd", "de", "eb", "ef")]
    assert named(check(longer), "cycles") is not None


def test_what_several_people_say_together_is_no_cycle() -> None:
    verdicts: list[Record] = [
        Judgement(prompt=ask("Q"), responses=two, ranks=(0, 1), annotator=who)
        for who, two in zip("xyz", (("a", "b"), ("b", "c"), ("c", "a")), strict=True)
    ]
    assert named(check(verdicts), "cycles") is None
    alone: list[Record] = [replace(verdict, annotator="x") for verdict in verdicts]  # type: ignore[type-var]
    assert named(check(alone), "cycles") is not None


def test_rankings_are_compared_pair_by_pair() -> None:
    ranking = Ranking(prompt=ask("Q"), responses=("c", "a", "b", "b2"), ranks=(2, 0, 1, 1))
    found = [(verdict.better, verdict.worse, verdict.tie) for verdict in comparisons([ranking])]
    assert found == [
        *(("a", other, False) for other in ("b", "b2", "c")),
        ("b", "b2", True),
        *((other, "c", False) for other in ("b", "b2")),
    ]
    assert named(check([ranking, pair("Q", "c", "a")]), "contradictory") is not None


def test_share_of_longer_answers() -> None:
    records: list[Record] = [pair(f"Q{n}", "long" * (1 + (n < 6)), "longer") for n in range(10)]
    finding = named(check(records), "chosen-longer")
    assert finding is not None and finding.value is not None
    assert finding.value.mean == 0.6 and finding.value.n == 10 and finding.severity == "info"
    always = named(check([pair(f"Q{n}") for n in range(40)]), "chosen-longer")
    assert always is not None and always.severity == "warning" and "watch the length" in always.message


def test_pairs_of_one_ranking_are_not_counted_as_independent() -> None:
    same = Ranking(prompt=ask("Q"), responses=tuple("aaaaa"[: 5 - n] for n in range(5)), ranks=tuple(range(5)))
    other = Ranking(prompt=ask("R"), responses=tuple("aaaaa"[: 1 + n] for n in range(5)), ranks=tuple(range(5)))
    finding = named(check([same, other]), "chosen-longer")
    assert finding is not None and finding.value is not None
    assert finding.value.mean == 0.5 and finding.value.n == 2 and finding.value.low < 0 < 1 < finding.value.high


def judged(flip: float, items: int, judges: int, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    return [
        Judgement(
            prompt=ask(f"Q{item}"),
            responses=("a", "b"),
            ranks=(1, 0) if rng.random() < flip else (0, 1),
            annotator=f"w{who}",
        )
        for item in range(items)
        for who in range(judges)
    ]


@pytest.mark.parametrize("flip", [0.05, 0.2, 0.35])
def test_label_noise_is_recovered(flip: float) -> None:
    noise = label_noise(comparisons(judged(flip, items=1500, judges=3)))
    assert noise is not None and abs(noise.rate.mean - flip) < 0.025
    assert noise.rate.n == 1500
    assert noise.agreement.mean == pytest.approx((1 - flip) ** 2 + flip**2, abs=0.02)


def test_the_interval_of_label_noise_covers_it() -> None:
    rates = [label_noise(comparisons(judged(0.2, items=100, judges=3, seed=seed))) for seed in range(40)]
    covered = sum(noise is not None and noise.rate.low <= 0.2 <= noise.rate.high for noise in rates)
    assert covered >= 33  # 38 expected


def test_label_noise_by_hand() -> None:
    # Three items agree, one does not: a = 3/4, e = (1 - sqrt(1/2)) / 2.
    verdicts = [("a", "a"), ("a", "a"), ("b", "b"), ("a", "b")]
    records = [
        Judgement(prompt=ask(f"Q{n}"), responses=("a", "b"), ranks=(0, 1) if said == "a" else (1, 0), annotator=who)
        for n, said_by in enumerate(verdicts)
        for who, said in zip(("x", "y"), said_by, strict=True)
    ]
    noise = label_noise(comparisons(records))
    assert noise is not None and noise.rate.mean == pytest.approx((1 - 0.5**0.5) / 2)


def test_label_noise_is_not_estimated_from_nothing() -> None:
    assert label_noise(comparisons(CLEAN)) is None
    assert label_noise(comparisons([*CLEAN, *CLEAN])) is None  # copies are no second opinions
    assert label_noise(comparisons(judged(0.2, items=100, judges=1))) is None
    alone = [record for record in judged(0.2, items=100, judges=1) for _ in range(2)]
    assert label_noise(comparisons(alone)) is None  # one annotator twice
    repeated = [*CLEAN, *CLEAN, pair("Q0", "other 0 and", "answer 0")]
    noise = label_noise(comparisons(repeated))
    assert noise is not None and "lower bound" in noise.method


def test_disagreeing_annotators_are_no_error() -> None:
    findings = check(judged(0.3, items=50, judges=3))
    assert not [finding for finding in findings if finding.severity == "error"]
    found = named(findings, "disagreement")
    assert found is not None and found.count > 50


def test_rules_with_values() -> None:
    records: list[Record] = [
        pair("Q", "abc", "abcdef", margin=0.5, kind="x"),
        pair("Q", "a", "abcdef", margin=2.0),
        UnpairedFeedback(
            prompt=(*ask("Q"), Message("assistant", "A"), Message("user", "R")), response="abcd", desirable=True
        ),
    ]

    def kept(*rules: str) -> list[int]:
        return [records.index(record) for record in filter_records(records, rules)[0]]

    assert kept("min-chars=2") == [0, 2]
    assert kept("max-chars=6") == [] and kept("max-chars=7") == [0, 1, 2]
    assert kept("max-turns=1") == [0, 1]
    assert kept("min-margin=1") == [1, 2]
    assert kept("kind=x") == [0]
    assert kept("min-chars=2", "min-margin=1") == [2]
    assert filter_records(records, ["min-chars=2", "min-margin=1"])[1] == {"min-chars=2": 1, "min-margin=1": 1}


def test_unknown_rules_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'duplicates'"):
        filter_records(CLEAN, ["duplicate"])
    with pytest.raises(ConfigError, match="write a number: max-chars=100"):
        filter_records(CLEAN, ["max-chars"])
    assert all(rule.__doc__ for rule in RULES.values())


def test_findings_are_json() -> None:
    import json

    for finding in check([*CLEAN, CLEAN[0]]):
        row = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
        assert row["name"] == finding.name and row["message"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_known_shares_of_longer_answers() -> None:
    for name, low, high in (("harmless-base", 0.42, 0.47), ("helpful-base", 0.57, 0.63)):
        records = read(SHARED / f"hh_rlhf/{name}.test.jsonl.gz", skip_bad=True).records
        finding = named(check(records), "chosen-longer")
        assert finding is not None and finding.value is not None and low < finding.value.mean < high
    judgements = read(SHARED / "tulu1_human_eval/eval_annotations.jsonl.gz").records
    noise = label_noise(comparisons(judgements))
    assert noise is not None and 0.1 < noise.rate.mean < 0.3
