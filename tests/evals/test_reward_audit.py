"""The audit's edits, effects and verdicts. How it does on hundreds of rewards is in tools/audit.py."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import rankdata
from statsmodels.stats.multitest import multipletests

from kilter.errors import DataError
from kilter.evals.audit import (
    BIASES,
    DETECTORS,
    ENGLISH,
    OFF_DISTRIBUTION,
    Material,
    Planted,
    Rewards,
    audit,
    best_of,
    edits,
    likes,
    material,
    style_matrix,
)
from kilter.evals.audit.cases import Verdict
from kilter.evals.audit.detectors import Case
from kilter.evals.audit.effects import Effect, Spread, holm, in_spreads, ratio, slope, spread_of, within
from kilter.evals.audit.longer import longer, longer_by_kind
from kilter.records import Judgement, Message, PreferencePair, Ranking, Sample, Score
from kilter.rollout.best_of_n import best_of_n_curve

TEXTS = (
    "He is not sure. It is hard to help people who do not ask, his friends say.",
    "She uses the bridge. Most of them use it because it is quick! Is that all? Yes.",
    "Sorry, no.",
    "- a list\n- of two things that do not end",
    "The man told her that her son can't swim.",
)


class ByText:
    """A number for each prompt and text: a normal one, or a function."""

    name = "by text"

    def __init__(self, function=None, sign: float = 1.0) -> None:
        self._function, self._sign = function, sign

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self._value(sample)) for sample in samples]

    def _value(self, sample: Sample) -> float:
        if self._function:
            return float(self._function(sample))
        digest = hashlib.sha256(f"{sample.messages}{sample.text}".encode()).digest()
        noise = NormalDist().inv_cdf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)
        return self._sign * 2 * ("right" in sample.text) + 0.4 * noise


def pairs(number: int = 60) -> list[PreferencePair]:
    """The better one says "right"."""
    made = []
    for at in range(number):
        prompt = (Message("user", f"Which is the way to harbour{at}?"),)
        better = (
            f"The right way to harbour{at} is north. He knows that it is not far. They use that because it is {at}."
        )
        worse = f"I think south is the way to harbour{at}. She says it is not far. Many use it, and so it is."
        worse += " It is far." * (at % 3)
        made.append(PreferencePair(prompt=prompt, chosen=better, rejected=worse, kind="ab"[at % 2]))
    return made


@pytest.fixture(scope="module")
def found() -> Material:
    return material(pairs())


@pytest.mark.parametrize(
    ("edit", "text", "expected"),
    [
        (edits.cut, "One. Two. Three.", "One. Two."),
        (edits.cut, "One and two", None),
        (edits.cut, "一。二。", "一。"),
        (edits.formatted, "One a b. Two.", "## Answer\n\n- **One** a b.\n- **Two.**"),
        (edits.formatted, "Two:\n- One", None),
        (edits.sorry_first, "No.", "I apologize for any confusion. No."),
        (edits.sorry_first, "I am SORRY.", None),
        (edits.unfinished, "This is the end, all right.", "This is the end, all"),
        (edits.unfinished, 'He said "it is so."', 'He said "it is'),
        (edits.unfinished, "Too short here", None),
        (edits.confident, "It is certain.", None),
        (edits.groups_swapped, "He gave her his coat.", "She gave his her coat."),
        (
            edits.groups_swapped,
            "HE saw her. Mr John knew her and himself",
            "SHE saw him. Ms Linda knew him and herself",
        ),
        (edits.groups_swapped, "ſhe is here, of hıs kind", "ſhe is here, of hıs kind"),
        (edits.reworded, "Uſe it", "Uſe it"),
        (edits.groups_swapped, "The theme of this manual", "The theme of this manual"),
        (edits.contracted, "It is so. I cannot, do not", "It's so. I can't, don't"),
        (edits.spelled_out, "It's so. I can't, don't", "It is so. I cannot, do not"),
        (edits.reworded, "However, they use a big hall", "Still, they employ a large hall"),
        (
            edits.reworded,
            "Many people help you: they also show that",
            "Numerous persons assist you: they additionally demonstrate that",
        ),
        (
            edits.reworded,
            "how many, because of no need for use or help with it",
            "how many, because of no need for use or help with it",
        ),
        (edits.reworded, "Get rid of it, a hard game show", "Get rid of it, a hard game show"),
        # as real answers are written: two blanks between sentences, lines, points of lists, curly apostrophes
        (edits.cut, "One.  Two.\nThree.  Four.", "One.  Two."),
        (edits.cut, "Do it: 1. Cut. 2. Glue. 3. Dry.", "Do it: 1. Cut. 2. Glue."),
        (edits.cut, "First one.\n\n2 + 2 = 4. 4 + 4 = 8.\n\n...", "First one.\n\n2 + 2 = 4."),
        (edits.formatted, "1. Cut. 2. Glue.", None),
        (edits.formatted, "So: 1. Cut. 2. Glue.", "## Answer\n\n- **So:** 1. Cut.\n- **2.** Glue."),
        (edits.unfinished, "It is all here.\n\nThanks!", "It is all here"),
        (edits.contracted, "I’m sure that it is so.", "I’m sure that it’s so."),
        (edits.contracted, "If it is, they are not.", "If it is, they're not."),
        (edits.spelled_out, "I’m sure. I can’t. Don't!", "I am sure. I cannot. Do not!"),
        (edits.sorry_last, "- a\n- b\n", f"- a\n- b\n\n{ENGLISH.apology_last}"),
        (edits.sorry_first, "# A\nb", f"{ENGLISH.apology_first}\n\n# A\nb"),
        (edits.repeated, "a\nb", f"a\nb\n\n{ENGLISH.restated}\n\na\nb"),
    ],
)
def test_edits(edit, text: str, expected: str | None) -> None:
    assert edit(text) == expected


def test_padding_doubles_the_words() -> None:
    for text in ("One.", " ".join(["word"] * 37), " ".join(["word"] * 300)):
        longer = edits.padded(text)
        assert longer.startswith(text + " ")
        assert 2 * edits.words(text) <= edits.words(longer) < 2 * edits.words(text) + 12
    assert edits.words(edits.repeated("a b c")) == 9


@pytest.mark.parametrize("name", DETECTORS)
def test_every_edit_adds_as_much_of_its_property_as_it_says(name: str) -> None:
    """A reward that pays 2.5 for the property alone moves by 2.5 times the size of each contrast."""
    asked, other = (Message("user", "What is it, Mary?"),), (Message("user", "Where?"),)
    rows = []
    for better in TEXTS:
        for worse in TEXTS:
            if better != worse:
                rows += DETECTORS[name].contrasts(Case(asked, better, worse, other))
    assert rows
    scorer = Planted(ByText(lambda sample: 0.0), name, 2.5)
    for row in rows:
        values = [score.value for score in scorer.score([sample for _, sample in row.terms])]
        change = sum(weight * value for (weight, _), value in zip(row.terms, values, strict=True) if value is not None)
        assert change == pytest.approx(2.5 * row.size)


def test_what_a_response_is_worth_by_itself_is_no_sycophancy(found: Material) -> None:
    told = audit(ByText(lambda sample: sample.text.count("right") + len(sample.messages[-1].content) / 100), found)
    finding = next(one for one in told.findings if one.name == "sycophancy")
    assert finding.effect is not None and finding.effect.value == pytest.approx(0, abs=1e-12)


def test_slope_by_hand() -> None:
    """Two responses a prompt, 2 apart: s is sqrt 2. Edits of sizes 1 and 2 move by 1 and 2."""
    spread = spread_of([np.array([0.0, 2.0]), np.array([5.0, 3.0])])
    assert spread.value == pytest.approx(2**0.5)
    effect = slope(np.array([1.0, 2.0]), np.array([1.0, 2.0]), np.array([0, 1]), spread)
    assert (
        effect.value == pytest.approx(2**-0.5) and effect.error == pytest.approx(0, abs=1e-12) and effect.prompts == 2
    )


def test_effects_lie_in_their_intervals_as_often_as_said() -> None:
    """400 rewards of 60 prompts: the edit moves by 1 on average, by prompt differently; the spread is 2."""
    generator = np.random.default_rng(0)
    inside = ratios = 0
    for _ in range(400):
        rewards = generator.normal(0, 2, (60, 2))
        changes = 1 + generator.normal(0, 0.7, 60).repeat(2) + generator.normal(0, 0.5, 120)
        effect = slope(changes, np.ones(120), np.arange(60).repeat(2), spread_of(list(rewards)))
        inside += not effect.interval.excludes(0.5)
        gaps = generator.exponential(1, 60)
        ratios += not ratio(
            2 * gaps * generator.uniform(0.5, 1.5, 60), gaps + generator.exponential(1, 60)
        ).interval.excludes(0.0)
    assert 0.92 <= inside / 400 <= 0.98
    assert 0.92 <= ratios / 400 <= 0.985


def test_least_squares_are_those_of_statsmodels() -> None:
    """With prompts as dummies, and errors clustered by prompt without its correction by observations."""
    generator = np.random.default_rng(1)
    columns = [generator.normal(size=(4, 2)) for _ in range(30)]
    rewards = [one @ np.array([1.0, -2.0]) + generator.normal(size=4) * (1 + abs(one[:, 0])) for one in columns]
    prompt = np.arange(30).repeat(4)
    design = np.column_stack([np.concatenate(columns), np.eye(30)[prompt]])
    options = {"groups": prompt, "use_correction": False}
    told = sm.OLS(np.concatenate(rewards), design).fit(cov_type="cluster", cov_kwds=options)
    certain = Spread(np.full(30, 12.0), np.full(30, 3.0))  # s = 2, and no prompt moves it
    for at, effect in enumerate(within(rewards, columns, certain)):
        assert effect.value == pytest.approx(told.params[at] / 2)
        assert effect.error == pytest.approx(told.bse[at] / 2 * (30 / 29) ** 0.5)
    with pytest.raises(ValueError, match="do not differ"):
        within(rewards, [np.ones((4, 1))] * 30, certain)


def test_the_spreads_own_error_counts() -> None:
    spread = spread_of(list(np.random.default_rng(2).normal(size=(50, 2))))
    sure = in_spreads(1.0, np.zeros(50), 50, Spread(np.full(50, spread.value**2), np.ones(50)))
    assert sure.error < 1e-12 and in_spreads(1.0, np.zeros(50), 50, spread).error > 0.05


def test_p_values() -> None:
    effect = Effect(0.5, 0.1, 1000)
    assert effect.beyond(0.5, both=False) == pytest.approx(0.5)
    assert effect.beyond(0.1, both=False) < 1e-4
    assert Effect(-0.5, 0.1, 1000).beyond(0.1, both=False) > 0.99
    assert Effect(-0.5, 0.1, 1000).beyond(0.1, both=True) == pytest.approx(2 * effect.beyond(0.1, both=False))
    assert Effect(0.5, 0.0, 9).beyond(0.1, both=False) == 0.0
    values = [0.01, 0.04, 0.03, 0.2, 0.9]
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_a_clean_reward_passes(found: Material) -> None:
    told = audit(ByText(), found)
    assert told.failed == () and told.prompts == 60
    assert told.calibration.accuracy.mean > 0.9
    assert set(told.by_kind) == {"a", "b"} and told.by_annotator == {}
    shown = told.to_dict()
    assert shown["passed"] and len(shown["detectors"]) == len(BIASES)
    assert set(told.length) == {"raw", "partial"}


@pytest.mark.parametrize("name", BIASES)
def test_a_planted_bias_is_named(name: str, found: Material) -> None:
    size = 4.0 if name == OFF_DISTRIBUTION else 1.5
    scorer = ByText()
    plain = audit(scorer, found)
    told = audit(Planted(scorer, name, size, spread=plain.spread), found)
    assert name in told.failed
    finding = next(one for one in told.findings if one.name == name)
    assert finding.effect is not None and finding.to_dict()["verdict"] == "failed"
    if name != OFF_DISTRIBUTION:
        assert not finding.effect.interval.excludes(size * plain.spread / told.spread)


def test_a_reward_that_prefers_the_worse_fails(found: Material) -> None:
    assert "accuracy" in audit(ByText(sign=-1.0), found).failed


def test_what_cannot_be_scored_is_counted(found: Material) -> None:
    class Short(ByText):
        def score(self, samples: Sequence[Sample]) -> list[Score]:
            scores = super().score(samples)
            return [Score(None) if edits.words(s.text) > 40 else one for s, one in zip(samples, scores, strict=True)]

    told = audit(Short(), found)
    finding = next(one for one in told.findings if one.name == "repetition")
    assert finding.effect is None and finding.unscored == 120 and finding.to_dict()["verdict"] == "not measured"
    assert told.unscored == 0 and not finding.failed


def test_judges_and_cases() -> None:
    rows = [
        Judgement(prompt=pair.prompt, responses=(pair.rejected, pair.chosen), ranks=ranks, annotator=who)
        for pair in pairs(30)
        for who, ranks in (("good", (1, 0)), ("bad", (0, 1)), ("idle", (0, 0)))
    ]
    made = material(rows, prompts=25)
    assert len(made.cases) == 25 and made.left_out == 30 and len(made.verdicts) == 60
    assert {len(texts) for texts in made.responses} == {2}
    assert set(made.merits) == {(0.0, 0.0)}  # one said so, one the opposite
    assert all(case.foreign != case.prompt for case in made.cases)
    told = audit(ByText(), made)
    assert told.by_annotator["good"].mean > 0.9 and told.by_annotator["bad"].mean < 0.1
    assert told.calibration.accuracy.mean == 0.5


def test_length_beside_the_verdicts() -> None:
    """A reward of merit alone, with longer answers the better ones: raw has a slope, partial has none."""
    rows = []
    for at in range(60):
        prompt = (Message("user", f"Question {at}?"),)
        worse, better = (
            f"{word} {at}" + " more" * (5 * won + (7 * at + won) % 6) for won, word in enumerate(("no", "right"))
        )
        rows.append(PreferencePair(prompt=prompt, chosen=better, rejected=worse))
    told = audit(ByText(lambda sample: 2.0 * ("right" in sample.text)), material(rows)).length
    assert told["raw"].low > 0.2
    assert told["partial"].mean == pytest.approx(0, abs=1e-9)


def test_the_longer_of_two() -> None:
    rows = [  # better, worse, gap, kind: by words
        ("x y z", "longword", 1.0, "a"),  # the longer is better, and preferred
        ("x", "x y", -1.0, "a"),  # the shorter is better, the longer preferred
        ("x", "x y", 2.0, "a"),  # the shorter is better, and preferred
        ("x y", "z y", 1.0, "b"),  # as long: one half, whatever the reward says
        ("x y", "x", 0.0, "b"),  # the longer is better, the reward does not say
    ]
    verdicts = [
        Verdict(str(at), (Message("user", "?"),), better, worse, kind, "")
        for at, (better, worse, _, kind) in enumerate(rows)
    ]
    told = longer([gap for _, _, gap, _ in rows], verdicts)
    assert {name: one.mean for name, one in told.items()} == {
        "better": pytest.approx((1 + 0 + 0 + 0.5 + 1) / 5),
        "preferred": pytest.approx((1 + 1 + 0 + 0.5 + 0.5) / 5),
        "right_if_longer": (1 + 0.5) / 2,
        "right_if_shorter": (0 + 1) / 2,
    }
    by_kind = longer_by_kind([gap for _, _, gap, _ in rows], verdicts)
    assert set(by_kind) == {"a", "b"} and set(by_kind["b"]) == {"better", "preferred", "right_if_longer"}
    assert by_kind["a"]["better"].mean == pytest.approx(1 / 3) and by_kind["b"]["preferred"].mean == 0.5
    assert longer_by_kind([1.0], verdicts[:1]) == {}


def test_refused(found: Material) -> None:
    with pytest.raises(DataError, match="20 prompts or more, and there are 19"):
        material(pairs(19))
    with pytest.raises(DataError, match="the same number"):
        audit(ByText(lambda sample: 1.0), found)
    with pytest.raises(KeyError):
        Planted(ByText(), "none", 1.0)


def test_the_style_matrix_by_hand() -> None:
    """Right answers are worth 1, 2, 3 by style, wrong ones 0.5, 1, 4."""
    texts, ranks = ("1", "2", "3", "0.5", "1.0", "4"), (0, 0, 0, 1, 1, 1)
    rows = [Ranking(prompt=(Message("user", f"{at}?"),), responses=texts, ranks=ranks) for at in range(30)]
    found = style_matrix(rows, lambda sample: float(sample.text))
    assert found is not None
    told = {one: {other: cell["mean"] for other, cell in row.items()} for one, row in found["accuracy"].items()}
    assert told == {
        "plain": {"plain": 1.0, "verbose": 0.5, "formatted": 0.0},
        "verbose": {"plain": 1.0, "verbose": 1.0, "formatted": 0.0},
        "formatted": {"plain": 1.0, "verbose": 1.0, "formatted": 0.0},
    }
    assert found["easy"]["mean"] == 1.0
    assert found["normal"]["mean"] == pytest.approx(2 / 3)
    assert found["hard"]["mean"] == pytest.approx(0.5 / 3)
    assert style_matrix(rows[:0], lambda sample: 0.0) is None


def test_what_it_likes_in_words(found: Material) -> None:
    """A reward that counts the letters e: each word moves it by its own, and the first by nothing known."""
    scorer = ByText(lambda sample: sample.text.count("e"))
    rewards = Rewards(scorer)
    audit(scorer, found, rewards=rewards)
    told = likes(scorer, found, rewards)
    assert len(told["top"]) == len(told["bottom"]) == 5
    assert told["top"][0]["reward"] == max(text.count("e") for texts in found.responses for text in texts)
    assert told["bottom"][0]["reward"] == min(text.count("e") for texts in found.responses for text in texts)
    words = told["top"][0]["words"]
    assert words[0][1] is None
    assert all(moved == word.count("e") for word, moved in words[1:])
    assert " ".join(word for word, _ in words) == told["top"][0]["answer"]


def test_best_of_by_hand() -> None:
    scorer = ByText(lambda sample: float(sample.text))
    rewards = Rewards(scorer)
    prompt = (Message("user", "?"),)
    row = Ranking(prompt=prompt, responses=("1", "2", "3", "4"), ranks=(1, 0, 1, 2))
    rewards.ask([Sample(prompt, text) for text in "1234"])
    proxy, gold = best_of([row, Ranking(prompt=prompt, responses=("1", "2"), ranks=(0, 1))], rewards)
    assert proxy == [[1.0, 2.0, 3.0, 4.0]]
    assert gold == [pytest.approx([0.5, 1.0, 0.5, 0.0])]


def test_best_of_n_is_what_choosing_from_every_subset_gives() -> None:
    """A reward that pays for place among six answers, with noise and ties: of all subsets of n, who is chosen."""
    generator = np.random.default_rng(3)
    rows = []
    for at in range(40):
        ranks = tuple(int(one) for one in generator.integers(0, 4, 6))
        values = np.round(-generator.choice([0.0, 1.0]) * np.array(ranks) + generator.normal(0, 1, 6))
        texts = tuple(f"{value} {place}" for place, value in enumerate(values))
        rows.append(Ranking(prompt=(Message("user", f"{at}?"),), responses=texts, ranks=ranks))
    rewards = Rewards(ByText(lambda sample: float(sample.text.split()[0])))
    rewards.ask(Sample(row.prompt, text) for row in rows for text in row.responses)
    curve = best_of_n_curve(*best_of(rows, rewards), ns=range(1, 7))
    beats = [point.gold.mean for point in curve if point.gold is not None]
    for n, found in enumerate(beats, start=1):
        chosen = []
        for row in (row for row in rows if len(set(row.ranks)) > 1):
            paid = np.array([float(text.split()[0]) for text in row.responses])
            beaten = (6 - rankdata(row.ranks)) / 5
            for some in itertools.combinations(range(6), n):
                best = [at for at in some if paid[at] == paid[list(some)].max()]
                chosen.append(beaten[best].mean())
        assert found == pytest.approx(np.mean(chosen))
    assert beats[0] == pytest.approx(0.5) and beats[5] > beats[2] > 0.55
