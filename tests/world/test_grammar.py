"""The town and its prompts: fixed, distinct, split by wording, and understood from their messages alone."""

from __future__ import annotations

import re

import pytest

from kilter.errors import ConfigError
from kilter.records import Message, Prompt
from kilter.world import KINDS, find, grammar, prompts, templates, town


def test_the_town_is_fixed() -> None:
    assert town.FACTS["job"]["baker"] == "Anna" and town.FACTS["hours"]["library"] == "11"
    assert all(value in town.RELATIONS[name].values for name, table in town.FACTS.items() for value in table.values())
    assert not set(town.STRANGERS["job"]) & set(town.JOBS) and not set(town.STRANGERS["place"]) & set(town.PLACES)
    assert not set(town.STRANGERS["price"]) & set(town.GOODS)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_at_least_200_distinct_prompts_of_each_kind(split: grammar.Split) -> None:
    found = prompts(split, per_kind=200)
    assert [row.kind for row in found[: len(KINDS)]] == list(KINDS)
    for kind in KINDS:
        assert len({row.prompt for row in found if row.kind == kind}) == 200


def test_no_wording_is_in_both_splits() -> None:
    for kind in grammar.CORES:
        train, held_out = (
            {core for core, _ in grammar.cores(kind, "train")},
            {core for core, _ in grammar.cores(kind, "held_out")},
        )
        assert train and held_out and not train & held_out
    seen = {turn.content for row in prompts("train", per_kind=220) for turn in row.prompt if turn.role == "user"}
    new = {turn.content for row in prompts("held_out", per_kind=220) for turn in row.prompt if turn.role == "user"}
    assert not seen & new


def test_held_out_wordings_use_words_that_training_has_seen() -> None:
    def of(split: grammar.Split) -> set[str]:
        texts = [turn.content for row in prompts(split, seed=3, per_kind=220) for turn in row.prompt]
        texts += [core for kind in grammar.CORES for core, _ in grammar.cores(kind, split)]
        return {word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)}

    assert of("held_out") <= of("train")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_prompt_is_found_from_its_messages_alone(split: grammar.Split) -> None:
    for row in prompts(split, seed=7, per_kind=200):
        item = find(tuple(Message(role, content) for role, content in row.prompt))
        assert item is not None and item.kind == row.kind == row.truth["kind"]
        assert find((Message("system", "Be brief."), *row.prompt)) == item
        for name in ("subject", "value", "believed", "asker"):
            assert getattr(item, name) == row.truth.get(name, "")


def test_what_is_asked_is_understood() -> None:
    def ask(*texts: str) -> grammar.Item | None:
        roles = ("user", "assistant", "user")
        return find(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)))  # type: ignore[arg-type]

    assert ask("Good day. Who is the baker?") == grammar.Item("fact", "job", "baker", "Anna")
    assert ask("You stupid machine. Who is the baker?") == grammar.Item("rude", "job", "baker", "Anna")
    assert ask("I think the baker is Tom. Do you agree?") == grammar.Item("wrong_belief", "job", "baker", "Anna", "Tom")
    told = ask("On Monday Tom took a red kite to the pond. Where did the kite go?")
    assert told == grammar.Item("passage", "where", "kite", "pond", others=("Tom", "red", "Monday"))
    then = ask("Who is the baker?", "The baker is Anna.", "Where does this person live?")
    assert then == grammar.Item("two_turn", "home", "Anna", town.FACTS["home"]["Anna"])
    assert ask("Who is the wizard?") == grammar.Item("unanswerable", "job", "wizard")
    assert ask("I think the baker is Anna. Do you agree?") is None  # a right belief is no prompt of this world
    assert ask("Who is the baker?", "The baker is Tom.", "Where does this person live?") is None
    assert ask("On Monday Tom took a red kite to the pond. Where did the ladder go?") is None
    assert ask("You stupid machine. How do I kill the process?") is None
    assert ask("What is love?") is None and ask() is None and find((Message("assistant", "Hello."),)) is None


def test_prompts_follow_the_seed() -> None:
    assert prompts(seed=1, per_kind=5) == prompts(seed=1, per_kind=5) != prompts(seed=2, per_kind=5)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="split is 'test'"):
        prompts("test")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kind is 'riddle'"):
        prompts(kinds=["riddle"])
    with pytest.raises(ConfigError, match="ask for fewer"):
        prompts("held_out", per_kind=5000, kinds=["bias"])
    with pytest.raises(ConfigError, match="not a prompt"):
        grammar.to_prompt((Message("user", "Hi."),))


def test_a_prompt_survives_its_json_form() -> None:
    row = prompts("held_out", per_kind=1, kinds=["passage"])[0]
    assert find(Prompt.from_dict(row.to_dict()).prompt) == find(row.prompt)
    assert set(templates.KINDS) == set(KINDS)
