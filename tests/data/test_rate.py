"""Models rated from judgements of their responses: what is compared with what, and what the command says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kilter.cli import main
from kilter.data import read, write
from kilter.data.rate import STYLE, comparisons_of, rankings_of, rating_of
from kilter.errors import DataError
from kilter.records import Judgement, Message
from kilter.stats.rankings import rate_rankings
from kilter.stats.ratings import ELO_PER_NAT, rate


def judged(
    models: Sequence[str], ranks: Sequence[int], *, who: str = "w", asked: str = "?", texts: Sequence[str] = ()
) -> Judgement:
    return Judgement(
        prompt=(Message("user", asked),),
        responses=tuple(texts or [f"by {name}" for name in models]),
        ranks=tuple(ranks),
        annotator=who,
        models=tuple(models),
    )


def contest(seed: int = 0, *, judgements: int = 400) -> list[Judgement]:
    """Three models, strong to weak; the weak one writes long, with lists, and annotators like what is long."""
    rng = np.random.default_rng(seed)
    strength, long = {"strong": 1.0, "middle": 0.0, "weak": -1.0}, {"strong": 20, "middle": 60, "weak": 400}
    found = []
    for number in range(judgements):
        one, other = rng.permutation(list(strength))[:2].tolist()
        sizes = [int(long[name] * rng.uniform(0.2, 3.0)) for name in (one, other)]
        likes = strength[one] - strength[other] + 0.9 * np.log((1 + sizes[0]) / (1 + sizes[1]))
        won = rng.random() < 1 / (1 + np.exp(-likes))
        tied = rng.random() < 0.1
        ranks = (0, 0) if tied else (0, 1) if won else (1, 0)
        texts = [name[0] * size for name, size in zip((one, other), sizes, strict=True)]
        found.append(judged((one, other), ranks, who=f"w{number % 11}", asked=f"{number % 37}?", texts=texts))
    return found


def test_a_ranking_is_its_comparisons() -> None:
    held = comparisons_of([judged(("a", "b", "a"), (1, 0, 1), who="x"), judged(("b", "c"), (0, 0), asked="Other?")])
    told = [(held.names[a], held.names[b], o) for a, b, o in zip(held.left, held.right, held.outcome, strict=True)]
    assert told == [("a", "b", 0.0), ("b", "a", 1.0), ("b", "c", 0.5)]  # a against itself is left out
    assert held.clusters["annotator"].tolist() == [0, 0, 1] and held.clusters["prompt"].tolist() == [0, 0, 1]
    assert not held.style


def test_style_is_read_off_the_texts() -> None:
    text = "# One\n\n## Two\n- a\n* b\n3. c\n 4) d\nno - list, no # header\n####### seven"
    assert STYLE["lists"](text) == 4 and STYLE["headers"](text) == 2
    assert STYLE["log length"]("x" * 9) == pytest.approx(np.log(10))
    held = comparisons_of(contest(), style=True)
    assert list(held.style) == ["log length"]  # nobody wrote a list or a header
    assert held.style["log length"].std() == pytest.approx(1.0)


def test_style_beside_strength() -> None:
    """Without it the one who writes long looks strong."""
    plain, beside = (rating_of(comparisons_of(contest(), style=style)) for style in (False, True))
    assert plain.models[0].name == "weak"
    assert [model.name for model in beside.models] == ["strong", "middle", "weak"]
    assert all(model.apart for model in beside.models[:2]) and not beside.models[2].apart
    assert beside.style["log length"] > 100 and plain.style == {}
    assert plain.comparisons == 400 and plain.ties == sum(record.ranks == (0, 0) for record in contest())
    assert sum(model.comparisons for model in plain.models) == 800


def test_points_are_the_scales() -> None:
    held = comparisons_of(contest())
    scale, told = rate(held, ties="davidson"), rating_of(held, ties="davidson")
    for model in told.models:
        interval = scale.interval(model.name)
        assert model.strength[:3] == pytest.approx([ELO_PER_NAT * value for value in interval[:3]])
        assert model.elo_low <= model.elo_high and model.elo_low != model.elo_high
    assert told.tie == scale.tie
    other = rating_of(held, ties="davidson", seed=1)
    assert other.models[0].strength == told.models[0].strength and other.models[0].elo_low != told.models[0].elo_low


def test_refusals() -> None:
    nameless = Judgement(prompt=(Message("user", "?"),), responses=("x", "y"), ranks=(0, 1), annotator="w")
    with pytest.raises(DataError, match="record 2 does not say which model wrote each response"):
        comparisons_of([judged(("a", "b"), (0, 1)), nameless])
    with pytest.raises(DataError, match="no two responses of different models"):
        comparisons_of([judged(("a", "a"), (0, 1))])
    with pytest.raises(DataError, match="either never lost to the others, or never won"):
        rating_of(comparisons_of([judged(("a", "b"), (0, 1))]))


def test_names_must_be_one_for_each_response(tmp_path: Path) -> None:
    file = tmp_path / "judged.jsonl"
    row = judged(("a", "b"), (0, 1)).to_dict()
    file.write_text(json.dumps(row | {"models": ["a"]}) + "\n")
    with pytest.raises(DataError, match=r"'models' is \[.*a.*\]; one name for each response, or none"):
        read(file)


@pytest.mark.parametrize("names", ["ab", [1, 2], ["a", " "], ["a", None], 7, {"a": "b"}])
def test_names_are_texts(names: object, tmp_path: Path) -> None:
    file = tmp_path / "judged.jsonl"
    file.write_text(json.dumps(judged(("a", "b"), (0, 1)).to_dict() | {"models": names}) + "\n")
    with pytest.raises(DataError, match=r"'models' is .*; one name for each response, or none"):
        read(file)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "judged.jsonl"
    write(file, contest())
    assert [record.id for record in read(file).records] == [record.id for record in contest()]
    assert {record.models for record in read(file).records} == {record.models for record in contest()}
    assert main(["data", "rate", str(file), "--style"]) == 0
    out = capsys.readouterr().out
    assert "400 comparisons, " in out and "of 3 models" in out and "one standard deviation more log length" in out
    told = rating_of(comparisons_of(contest(), style=True)).models[0]
    assert f"  1 {told.strength.mean:+6.0f} [{told.strength.low:+.0f}, {told.strength.high:+.0f}]   strong" in out
    assert f"Elo {told.elo:+.0f}, {told.elo_low:+.0f} to {told.elo_high:+.0f})" in out
    assert main(["data", "rate", str(file), "--as-json", "--ties", "davidson"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["models"][0]["name"] == "weak" and again["log_nu"] < 0 and len(again["models"]) == 3


def test_the_models_of_tulu(shared_data: Path) -> None:
    records = read(shared_data / "tulu1_human_eval" / "eval_annotations.jsonl.gz", record="judgement").records
    told = rating_of(comparisons_of(records))
    assert [model.name for model in told.models] == ["chatgpt", "tulu_65B", "tulu_7B", "tulu_human_only_65B"]


def test_one_annotator_is_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a judge that is a model: intervals by prompt; of one prompt as well, by comparison."""
    alone = [replace(record, annotator="judge") for record in contest()]
    told = rating_of(comparisons_of(alone))
    assert told.clusters == ("prompt",) and all(np.isfinite(model.strength.low) for model in told.models)
    one = [replace(record, prompt=contest()[0].prompt) for record in alone]
    told = rating_of(comparisons_of(one))
    assert told.clusters == () and all(np.isfinite(model.strength.low) for model in told.models)
    file = tmp_path / "judged.jsonl"
    write(file, [replace(record, models=("a\n    9 +9999", "b"), responses=("x", "yy")) for record in alone])
    assert main(["data", "rate", str(file)]) == 0
    out = capsys.readouterr().out
    assert "hold together what is of one prompt" in out and not any(
        line.startswith("    9 +9999") for line in out.split("\n")
    )


def test_few_clusters_never_tell_apart_what_is_not_known() -> None:
    for seed in range(20):
        few = [replace(record, annotator=f"w{place % 2}") for place, record in enumerate(contest(seed, judgements=60))]
        for model in rating_of(comparisons_of(few)).models:
            assert not np.isnan([*model.strength[:3]]).any() and model.strength.low <= model.strength.high


def test_style_that_explains_everything_is_refused() -> None:
    always = [judged(("a", "b"), (0, 1), asked=f"{n}?", texts=("x" * (20 + n), "y")) for n in range(40)]
    always += [judged(("b", "a"), (0, 1), asked=f"{n}!", texts=("x" * (20 + n), "y")) for n in range(40)]
    with pytest.raises(DataError, match="strength, style and ties cannot be told apart"):
        rating_of(comparisons_of(always, style=True))
    ties = [judged(("a", "b"), (0, 0), asked=f"{n}?") for n in range(9)]
    with pytest.raises(DataError, match="strength, style and ties cannot be told apart"):
        rating_of(comparisons_of(ties), ties="davidson")


def test_an_answer_of_newlines_ends() -> None:
    """Where blank lines are tried again from each of them, this takes hours."""
    assert STYLE["lists"]("\n" * 200_000 + "- a") == 1


def rankings(seed: int = 0, *, count: int = 300, cycle: float = 0.0, code: float = 0.0) -> list[Judgement]:
    """Four models ranked three at a time by ten annotators; d is better by `code` at code, a, b and c go round."""
    rng = np.random.default_rng(seed)
    strength = {"a": 0.6, "b": 0.2, "c": -0.2, "d": -0.6}
    found = []
    for number in range(count):
        names = rng.permutation(list(strength))[: 3 if not cycle else 2].tolist()
        kind = ("chat", "code")[number % 2]
        seen = {name: strength[name] + (code if name == "d" and kind == "code" else 0.0) for name in names}
        for one, other in ("ab", "bc", "ca"):
            if cycle and {one, other} == set(names):
                seen = {one: cycle, other: 0.0}
        noisy = [seen[name] + rng.gumbel() for name in names]
        ranks = np.argsort(np.argsort(-np.array(noisy))).tolist()
        record = judged(names, ranks, who=f"w{number % 40}", asked=f"{number % 97}?")
        found.append(replace(record, kind=kind))
    return found


def test_rankings_are_taken_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strengths and intervals are those of `rate_rankings`; of one text neither is better; one model alone is out."""
    held = rankings_of(rankings())
    scale = rate_rankings(held)
    told = rating_of(comparisons_of(rankings()), rankings=held, bootstrap=50)
    assert [model.name for model in told.models] == scale.order() == ["a", "b", "c", "d"]
    assert told.models[0].strength.mean == pytest.approx(ELO_PER_NAT * scale.interval("a").mean)
    assert told.models[0].strength.high == pytest.approx(ELO_PER_NAT * scale.interval("a").high)
    assert told.rankings == 300 and told.misfit is None and told.to_dict()["misfit"] is None
    drawn = told.models[0].redrawn
    assert drawn is not None and drawn.low < told.models[0].strength.mean < drawn.high
    same = rankings_of(
        [judged(("a", "b", "c"), (0, 1, 2), texts=("x", "y", "x")), judged(("a", "a"), (0, 1)), *rankings(count=2)]
    )
    assert len(same.item) == 3 and [same.names[at] for at in same.item[0]] == ["a", "c", "b"]
    assert same.first[0].tolist() == [0, 0, 2]
    file = tmp_path / "judged.jsonl"
    write(file, rankings())
    assert main(["data", "rate", str(file), "--model", "plackett-luce", "--bootstrap", "50"]) == 0
    out = capsys.readouterr().out
    assert "300 rankings taken whole" in out and "0 of which had no rating" in out
    low, high = drawn.low, drawn.high
    assert f"drawn [{low:+.0f}, {high:+.0f}]" in out and "strengths do not say" not in out
    assert main(["data", "rate", str(file), "--model", "plackett-luce", "--style"]) == 2
    assert "plackett-luce has no --style and no --ties davidson" in capsys.readouterr().err


def test_what_strengths_do_not_say_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "kinds.jsonl", tmp_path / "cycle.jsonl"
    write(file, rankings(count=3000, code=1.0))
    assert main(["data", "rate", str(file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"strengths do not say: d is \d+ points better where kind is 'code' than elsewhere", out)
    assert main(["data", "rate", str(file), "--as-json"]) == 0
    found = json.loads(capsys.readouterr().out)["misfit"]
    first = next(one for one in found["found"]["kind"] if one["context"] == "code" and one["z"] > 0)
    assert first["name"] == "d" and first["adjusted"] < 1e-3
    assert found["tests"] == {"pairs": 6, "kind": 8}
    write(other, rankings(count=3000, cycle=0.8))
    assert main(["data", "rate", str(other)]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"{one} is \d+ points better against {two} than", out) for one, two in ("ab", "bc", "ca"))
    assert main(["data", "rate", str(other), "--as-json"]) == 0
    assert json.loads(capsys.readouterr().out)["misfit"]["pairs"]["p"] < 1e-6
