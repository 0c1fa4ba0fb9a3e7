"""Rule sheets: sums by hand, caps, what is unscored, mixing with functions and reward models, and every mistake."""

from __future__ import annotations

import itertools
import math
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kilter import world
from kilter.errors import CheckError, ConfigError, KilterError, ModelError
from kilter.records import Message, PreferencePair, Sample, Score, prompt_id
from kilter.scorers import RuleSheet, catalogue, check_scorer, load_rules
from kilter.scorers.registry import RULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"
SUM = {"rule": "number"}
SHORT = {"rule": "length", "longest": 2, "ramp": 4, "weight": -2.0, "name": "short"}


def sample(text: str, truth: Any = None) -> Sample:
    return Sample((Message("user", "q"),), text, truth={} if truth is None else {"answer": truth})


def one(sheet: RuleSheet, text: str, truth: Any = None) -> Score:
    (found,) = sheet.score([sample(text, truth)])
    return found


@pytest.fixture(autouse=True)
def module() -> Iterator[types.ModuleType]:
    made: Any = types.ModuleType("users_rules")
    made.lengths = lambda samples, scale=1.0: [scale * len(sample.text) for sample in samples]
    made.odd = lambda samples: [None if "?" in sample.text else 3.0 for sample in samples]
    made.with_parts = lambda samples: [Score(1.0, {"inner": 7.0}, reason="so") for _ in samples]
    sys.modules["users_rules"] = made
    yield made
    del sys.modules["users_rules"]


def test_the_sum_by_hand() -> None:
    sheet = load_rules({"rules": [SUM, SHORT, {"function": "users_rules:lengths", "options": {"scale": 0.5}}]})
    found = one(sheet, "so it is 5", truth="5")  # number 1; 4 words, 2 too many: -2 * (1 - 2 / 4); 10 characters * 0.5
    assert found.value == pytest.approx(1 - 1 + 5)
    assert found.parts == {"number": 1, "short": -1, "short/words": 4, "users_rules:lengths": 5}
    assert found.reason == "short: 4 words"


def test_scores_stand_beside_their_samples() -> None:
    sheet = load_rules({"rules": [SUM, {"rule": "ending", "weight": 0.1}]})
    found = sheet.score([sample("5.", "5"), sample("6", "5"), sample("6."), sample("6", "6")])
    assert [score.value for score in found] == [pytest.approx(1.1), 0, None, 1]
    assert sheet.score([]) == []


def test_caps_hold_for_a_value_before_its_weight_and_for_the_sum() -> None:
    capped = {"function": "users_rules:lengths", "at_least": 2, "at_most": 4, "weight": 3}
    sheet = load_rules({"rules": [capped, {"rule": "ending"}], "at_least": 7.5, "at_most": 12.5})
    assert [one(sheet, text).value for text in ("a", "aaa", "aaaaaa", "aaaaa.")] == [7.5, 9, 12, 12.5]


def test_what_cannot_be_scored_is_said_and_never_silently_zero() -> None:
    plain = load_rules({"rules": [SUM, {"rule": "ending"}]})
    found = one(plain, "5.")
    assert found.value is None and found.parts == {"ending": 1}
    assert found.reason == "number could not score: the prompt's truth has no answer 'answer' (a text or a number)"
    zero = one(load_rules({"rules": [SUM | {"unscored": 0.25, "weight": 2}, {"rule": "ending"}]}), "5.")
    assert zero.value == 1.5 and zero.parts == {"number": 0.5, "ending": 1} and "no answer" in zero.reason
    skipped = one(load_rules({"rules": [SUM | {"unscored": "skip"}, {"rule": "ending"}]}), "5.")
    assert skipped.value == 1 and skipped.parts == {"ending": 1} and "no answer" in skipped.reason
    function = load_rules({"rules": [{"function": "users_rules:odd"}, {"function": "users_rules:with_parts"}]})
    assert one(function, "a").parts["users_rules:with_parts/inner"] == 7 and one(function, "a").value == 4
    assert one(function, "a?").reason == "users_rules:odd could not score: the scorer returned None"


def test_the_range_is_stated_and_reached() -> None:
    rules = [SUM | {"unscored": 0.5, "at_most": 0.75}, SHORT, {"rule": "ending", "weight": 0.5}]
    sheet = load_rules({"rules": rules, "at_least": -1.5})
    assert sheet.range == (-1.5, 1.25)
    texts = ["5.", "5", "a b c 5.", "a b c d e f g 5.", "no", "a b 4", ""]
    found = [one(sheet, text, truth).value for text, truth in itertools.product(texts, ("5", "4", None))]
    values = [value for value in found if value is not None]
    assert len(values) == len(found) and (min(values), max(values)) == sheet.range
    assert load_rules({"rules": [{"function": "users_rules:odd", "at_most": 2}]}).range == (-math.inf, 2)
    assert load_rules({"rules": [{"function": "users_rules:odd", "at_most": 2, "weight": -1}]}).range == (-2, math.inf)


def test_a_file_is_read_with_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("rules:\n  - {rule: length, longest: 3, weight: 1e-1}\n  - {rule: ending}\n")
    sheet = load_rules(path)
    assert sheet.name == str(path) and one(sheet, "Yes.").value == pytest.approx(1.1) and not sheet.reads_truth
    assert load_rules({"rules": [SUM]}).reads_truth


def test_a_reward_model_is_mixed_in_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is looked at at once; its weights are read when it is first asked."""
    asked: list[str] = []

    class Two:
        name = "two"

        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [Score(2.0 * len(sample.text)) for sample in samples]

    def loads(folder: str, *, compute_dtype: Any) -> Two:
        asked.append(folder)
        return Two()

    monkeypatch.setattr("kilter.scorers.reward_model.load_reward_scorer", loads)
    folder = str(world.MODEL_PATH)
    sheet = load_rules({"rules": [{"model": folder, "weight": 0.5, "at_most": 5}, {"rule": "ending"}]})
    assert asked == [] and sheet.models == (folder,)
    assert [one(sheet, text).value for text in ("a.", "aaaa.", "a")] == [3, 3.5, 1] and asked == [folder]
    with pytest.raises(ModelError, match=r"rules\[0\] \(model\): /no/such: no such folder"):
        load_rules({"rules": [{"model": "/no/such"}]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules:\n  - {rule: lenght, longest: 3}", "rules[0] (lenght): rule is 'lenght'; did you mean 'length'?"),
        (
            "rules:\n  - {rule: ending}\n  - {rule: length, longst: 3}",
            "rules[1] (length): 'length' has no option 'longst'",
        ),
        ("rules:\n  - {rule: length, longest: -3}", "rules[0] (length): 'length': longest is -3"),
        ("rules:\n  - {rule: regex, must: '('}", "rules[0] (regex): 'regex': must: the pattern '(' is no regular"),
        ("rules:\n  - {rule: ending, weight: 1, weight: 2}", ":2: the key 'weight' stands twice"),
        ("rules: []\nrules: []", ":2: the key 'rules' stands twice"),
        ("rules: []", "rules is []"),
        ("rules: 3", "a rule sheet is a mapping with a list of `rules:`"),
        ("- {rule: ending}", "a rule sheet is a mapping with a list of `rules:`"),
        ("", "a rule sheet is a mapping with a list of `rules:`"),
        ("rules: [ending]", "rules[0] is 'ending'; an entry is a mapping"),
        ("rules: [{rule: ending, function: a:b}]", "rules[0]: an entry is one of `rule`, `function` and `model`"),
        ("rules: [{weight: 2}]", "rules[0]: an entry is one of"),
        ("rules: [{rule: ending, weight: 0}]", "rules[0]: weight is 0"),
        ("rules: [{rule: ending, weight: .nan}]", "rules[0]: weight is nan"),
        ("rules: [{rule: ending, at_least: 2, at_most: 1}]", "rules[0]: at_least is 2 and at_most is 1"),
        ("rules: [{rule: ending, unscored: never}]", "rules[0]: unscored"),
        ("rules: [{rule: ending}, {rule: ending}]", "rules[1] is called 'ending'; it stands twice"),
        ("rules: [{rule: ending, name: a/b}]", "a `/` in it is for parts"),
        ("rules: [{rule: ending, marks: x, options: {marks: y}}]", "marks stands among the options and beside"),
        ("rules: [{function: no_such_module:f}]", "rules[0] (no_such_module:f): no_such_module:f: cannot import"),
        ("rules: [{function: 'users_rules:lengths', scale: 2}]", "unknown key 'scale'; it takes"),
        ("rules: [{function: 'users_rules:lengths', options: {scales: 2}}]", "['scales'] do not fit"),
        ("rules: [{rule: ending}]\nat_mots: 3", "unknown key 'at_mots'; did you mean 'at_most'?"),
        ("rules: [", "mend the YAML"),
    ],
)
def test_every_mistake_names_the_file_and_the_entry(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(KilterError) as caught:
        load_rules(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file; give the path of a rule sheet"):
        load_rules("none.yaml")


def test_held_out_pairs_are_verified_where_their_prompt_has_a_truth() -> None:
    prompts = [(Message("user", f"{at} + 1?"),) for at in range(4)]
    pairs = [PreferencePair(prompt=prompt, chosen=str(at + 1), rejected="0") for at, prompt in enumerate(prompts)]
    truths = {prompt_id(prompt): {"answer": str(at + 1)} for at, prompt in enumerate(prompts[:3])}
    sheet = load_rules({"rules": [SUM]})
    found = check_scorer(sheet, pairs, truths=truths)
    assert (found.accuracy.mean, found.accuracy.n, found.unscored) == (1, 3, 1)
    with pytest.raises(CheckError, match=r"none of 4 held-out pairs .* \(number could not score: the prompt's truth"):
        check_scorer(sheet, pairs)


def test_the_page_is_made_from_the_code() -> None:
    told = "docs/rewards.md is old: write kilter.scorers.catalogue.markdown() into it"
    assert PAGE.read_text() == catalogue.markdown(), told


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_says_all_there_is_to_say(name: str) -> None:
    said = catalogue.entry(name)
    assert said.summary.startswith(("Whether", "How much")) and "value" in said.formula
    assert any(digit in said.known for digit in "01") and "|" not in said.summary
    for line in catalogue.options(RULES[name].options):
        assert line.partition(": ")[2].strip(), line


def test_the_example_on_the_page_is_a_sheet(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(catalogue.EXAMPLE)
    good = one(load_rules(path), "Therefore it is\n#### 5 ducks.", truth="5")
    assert good.value == 1.5 and good.parts["style"] == pytest.approx(0.5)
    assert one(load_rules(path), "I'm sorry,\n#### 6", truth="5").value == pytest.approx(0.2)
