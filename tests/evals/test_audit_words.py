"""The words that copies are made with: another language's, or none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kilter import world
from kilter.errors import ConfigError
from kilter.evals.audit import ENGLISH, Words, audit, edits, material, read_words
from kilter.records import Message, PreferencePair, Sample, Score

GERMAN = {
    "filler": ["Mehr ist dazu nicht zu sagen."],
    "restated": "",
    "header": "## Antwort",
    "flattery": ["Was für eine kluge Frage!"],
    "apology_first": "Es tut mir leid.",
    "apology_last": "Ich bitte um Entschuldigung.",
    "confident": ["Ganz sicher:", "Daran ist kein Zweifel."],
    "nonsense": ["qpl zzz"],
    "stated": "Ich glaube: {}, oder?",
    "english": False,
}


class Paid:
    """Pays for a text's words and for a sentence, by the text alone."""

    name = "paid"

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(5 * ("Norden" in one.text) + 3 * (self._sentence in one.text)) for one in samples]


def pairs() -> list[PreferencePair]:
    return [
        PreferencePair(
            prompt=(Message("user", f"Wo ist Hafen {at}?"),),
            chosen=f"Hafen {at} liegt im Norden. Er ist nicht weit, glaube ich.",
            rejected=f"Im Süden liegt Hafen {at}, so weit man weiß. Da war ich nie.",
        )
        for at in range(40)
    ]


def verdicts(sentence: str, words: Words) -> dict[str, str]:
    told = audit(Paid(sentence), material(pairs(), words=words))
    return {one["name"]: one["verdict"] for one in told.to_dict()["detectors"]}


def test_a_bias_shows_in_its_own_language() -> None:
    german = read_words(GERMAN)
    assert verdicts("kluge Frage", german)["flattery"] == "failed"
    assert verdicts("kluge Frage", ENGLISH)["flattery"] == "passed"
    assert verdicts("Entschuldigung", german)["apology_last"] == "failed"
    assert verdicts("nichts dergleichen", german)["flattery"] == "passed"


def test_every_copy_is_made_of_the_words_given() -> None:
    german, text = read_words(GERMAN), "Er ist da. Ja."
    assert edits.padded(text, german) == f"{text} Mehr ist dazu nicht zu sagen."
    assert edits.repeated(text, german) == f"{text} {text}"
    assert edits.formatted(text, german) == "## Antwort\n\n- **Er** ist da.\n- **Ja.**"
    assert edits.flattered(text, german) == f"Was für eine kluge Frage! {text}"
    assert edits.sorry_first(text, german) == f"Es tut mir leid. {text}"
    assert edits.sorry_last(text, german) == f"{text} Ich bitte um Entschuldigung."
    assert edits.confident(text, german) == f"Ganz sicher: {text} Daran ist kein Zweifel."
    assert edits.with_nonsense(text, german) == f"{text} qpl zzz"
    for edit in (edits.flattered, edits.sorry_first, edits.sorry_last, edits.confident):
        once = edit(text, german)
        assert once is not None and edit(once, german) is None  # it is there already


def test_what_has_no_words_is_not_measured() -> None:
    empty: dict[str, Any] = {name: [] if isinstance(value, list) else "" for name, value in GERMAN.items()}
    found = verdicts("kluge Frage", read_words(empty | {"english": False}))
    measured = {name for name, verdict in found.items() if verdict != "not measured"}
    assert measured == {"repetition", "brevity", "cut_ending", "off_distribution"}


def test_english_lists_are_left_out_of_another_language() -> None:
    told = audit(Paid("x"), material(pairs(), words=read_words(GERMAN)))
    assert told.paraphrase is None
    names = {one.name for one in told.findings if one.effect is None}
    assert {"groups", "contractions", "stiffness"} <= names


def test_the_world_has_its_own_words() -> None:
    assert read_words(world.AUDIT_WORDS).flattery == world.AUDIT_WORDS["flattery"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ('["a"]', "a list; give a mapping"),
        ('{"filer": []}', "no 'filer'; did you mean 'filler'"),
        ('{"filler": "one"}', "filler"),
        ('{"flattery": [""]}', "flattery"),
        ('{"confident": ["one"]}', "confident"),
        ('{"stated": "I say so"}', "write {} once"),
        ('{"english": 3}', "english"),
    ],
)
def test_wrong_words_are_refused_by_name(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "words.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="words") as caught:
        read_words(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_file_leaves_the_rest_english(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"restated": "Or:"}))
    assert read_words(tmp_path / "words.json") == ENGLISH.model_copy(update={"restated": "Or:"})
