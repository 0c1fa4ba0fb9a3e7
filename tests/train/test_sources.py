"""Records become groups without losing a response's end; groups become the same steps however a run is cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kilter.data.chat import Encoded
from kilter.errors import DataError
from kilter.records import (
    Conversation,
    Demonstration,
    Document,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    UnpairedFeedback,
)
from kilter.train.reference import with_reference
from kilter.train.sources import GroupSource, Pool, groups_of, with_mismatched
from kilter.tree import Batch, Group, Response, make_batch, scored

BOS, END, USER, ANSWER = 1, 2, 3, 4


class Letters:
    """Every character is a token: BOS, then each turn as a marker, its text, and END if it is an answer."""

    def __init__(self, *, stable: bool = True) -> None:
        self.stable = stable

    def _turns(self, messages: Conversation) -> list[int]:
        ids = [BOS]
        for message in messages:
            ids += [ANSWER if message.role == "assistant" else USER, *map(ord, message.content)]
            ids += [END] if message.role == "assistant" else []
        return ids

    def prompt(self, messages: Conversation) -> tuple[int, ...]:
        return (*self._turns(messages), ANSWER)

    def response(self, messages: Conversation, text: str) -> tuple[int, ...]:
        return (*map(ord, text), END)

    def document(self, text: str) -> tuple[int, ...]:
        return (BOS, *map(ord, text), END)

    def rows(self, messages: Conversation) -> tuple[Encoded, ...]:
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if not self.stable:
            rows = []
            for place in answers:
                prompt = self.prompt(messages[:place])
                answer = self.response(messages[:place], messages[place].content)
                rows.append(Encoded(prompt + answer, ((len(prompt), len(prompt) + len(answer)),)))
            return tuple(rows)
        spans = []
        for place in answers:
            start = len(self.prompt(messages[:place]))
            spans.append((start, start + len(messages[place].content) + 1))
        return (Encoded((*self._turns(messages), 99), tuple(spans)),)  # the template writes something behind


QUESTION: Conversation = (Message("user", "ab"),)
CHAT: Conversation = (
    Message("user", "ab"),
    Message("assistant", "cd"),
    Message("user", "e"),
    Message("assistant", "fgh"),
)


def convert(*records: Record, encoder: Any = None, **options: Any) -> Any:
    return groups_of(encoder or Letters(), records, **{"max_tokens": 100, **options})


def scored_text(group: Group, place: int = 0) -> str:
    response = group.responses[place]
    spans = response.spans or ((0, len(response.ids)),)
    return "".join(chr(i) if i > 20 else "$" for start, end in spans for i in response.ids[start:end])


def test_a_demonstration_scores_every_answer_and_its_end() -> None:
    (group,) = convert(Demonstration(messages=CHAT)).groups
    assert scored_text(group) == "cd$fgh$"
    assert group.prompt == (BOS, USER, ord("a"), ord("b"), ANSWER)
    assert group.responses[0].ids[-1] == END
    tree = make_batch([[group]]).tree
    flat = tree.tokens.flatten()
    assert tree.target.tolist() == flat[tree.source + 1].tolist()
    assert flat[tree.source[0]] == ANSWER


def test_a_template_that_is_not_stable_gives_a_row_for_each_answer() -> None:
    found = convert(Demonstration(messages=CHAT), encoder=Letters(stable=False))
    assert [scored_text(group) for group in found.groups] == ["cd$", "fgh$"]
    assert found.records == [0, 0]


def test_a_first_token_that_is_scored_has_nothing_to_be_predicted_from() -> None:
    class Bare(Letters):
        def rows(self, messages: Conversation) -> tuple[Encoded, ...]:
            return (Encoded((50, 51, 52), ((0, 3),)),)

    (group,) = convert(Demonstration(messages=CHAT), encoder=Bare()).groups
    assert (group.prompt, group.responses[0].ids, scored(group.responses[0])) == ((50,), (51, 52), 2)


def test_a_pair_is_two_ranked_responses_and_a_tie_two_equal_ones() -> None:
    pair = PreferencePair(prompt=QUESTION, chosen="x", rejected="yz", margin=1.5)
    tie = PreferencePair(prompt=QUESTION, chosen="x", rejected="yz", tie=True)
    one, two = convert(pair, tie).groups
    assert [scored_text(one, place) for place in (0, 1)] == ["x$", "yz$"]
    assert [dict(response.per_response) for response in one.responses] == [
        {"rank": 0.0, "margin": 1.5, "weight": 1.0},
        {"rank": 1.0, "margin": 0.0, "weight": 1.0},
    ]
    assert [response.per_response["rank"] for response in two.responses] == [0.0, 0.0]


def test_rankings_judgements_and_feedback() -> None:
    ranking = Ranking(prompt=QUESTION, responses=("x", "y", "z"), ranks=(2, 0, 0))
    judgement = Judgement(prompt=QUESTION, responses=("x", "y"), ranks=(1, 0), annotator="a")
    one, two = convert(ranking, judgement).groups
    assert [response.per_response["rank"] for response in one.responses] == [2.0, 0.0, 0.0]
    assert [response.per_response["rank"] for response in two.responses] == [1.0, 0.0]
    make_batch([[one, two]])  # one batch can hold both
    (thumb,) = convert(UnpairedFeedback(prompt=QUESTION, response="x", desirable=True)).groups
    assert dict(thumb.responses[0].per_response) == {"desirable": 1.0}
    with pytest.raises(DataError, match="a Prompt cannot be trained on"):
        convert(Prompt(prompt=QUESTION))


def test_too_long_is_dropped_and_counted() -> None:
    long = PreferencePair(prompt=QUESTION, chosen="x" * 9, rejected="y")
    short = PreferencePair(prompt=QUESTION, chosen="x", rejected="y")
    found = convert(long, short, long, max_tokens=14)
    assert found.records == [1]
    assert found.tally.dropped == Counter({"longer than 14 tokens": 2})
    assert str(found.tally) == "2 dropped (longer than 14 tokens)"
    assert convert(long, max_tokens=15).tally.dropped == Counter()  # 5 of the prompt and 10 of the longer response
    with pytest.raises(DataError, match=r"no record is left of 1 \(1 dropped \(longer than 14 tokens\)\)"):
        convert(long, max_tokens=14)


def test_cutting_takes_from_the_prompts_beginning_and_never_from_a_response() -> None:
    long = PreferencePair(prompt=QUESTION, chosen="x" * 9, rejected="y", source="file.jsonl:7")
    found = convert(long, max_tokens=13, over_long="cut_prompt")
    assert found.groups[0].prompt == (ord("a"), ord("b"), ANSWER)
    assert [len(response.ids) for response in found.groups[0].responses] == [10, 2]
    assert (found.tally.cut, str(found.tally)) == (1, "1 prompts cut")
    (kept,) = convert(long, max_tokens=13, over_long="cut_prompt", bos_id=BOS).groups
    assert kept.prompt == (BOS, ord("b"), ANSWER)
    found = convert(
        long, PreferencePair(prompt=QUESTION, chosen="x", rejected="y"), max_tokens=10, over_long="cut_prompt"
    )
    assert found.tally.dropped == Counter({"response longer than 10 tokens": 1})
    with pytest.raises(DataError, match=r"file.jsonl:7: 15 tokens, at most 13 fit"):
        convert(long, max_tokens=13, over_long="error")


# Steps -------------------------------------------------------------------------------------------------------------


def numbered(count: int) -> list[Group]:
    return [Group((1, 5 + number), (Response((5 + number, 2)),)) for number in range(count)]


def drawn(source: GroupSource) -> list[int]:
    return [group.prompt[1] - 5 for group in source.draw()]


def source(count: int = 10, **options: Any) -> GroupSource:
    return GroupSource(numbered(count), **{"batch_groups": 4, "row_tokens": 8, "batch_tokens": 16, **options})


def test_every_epoch_has_every_group_once_in_a_new_order() -> None:
    one = source(epochs=3)
    seen = [number for _ in range(one.num_steps) for number in drawn(one)]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert one.num_steps == 8
    with pytest.raises(DataError, match="at its end after 8 steps"):
        one.draw()


def test_the_order_is_a_function_of_the_seed() -> None:
    orders = [[drawn(one) for _ in range(2)] for one in (source(seed=1), source(seed=1), source(seed=2))]
    assert orders[0] == orders[1] != orders[2]
    assert drawn(source(shuffle=False)) == [0, 1, 2, 3]


def test_packing_does_not_change_what_a_step_holds() -> None:
    wide, narrow = source(row_tokens=100, batch_tokens=1000), source(row_tokens=4, batch_tokens=4)
    for _ in range(3):
        one, two = wide.next_step(), narrow.next_step()
        assert len(one) < len(two)
        held = [sorted(torch.cat([batch.tree.target for batch in step]).tolist()) for step in (one, two)]
        assert held[0] == held[1]


def test_a_source_goes_on_in_the_middle_of_an_epoch() -> None:
    whole = source(epochs=3, seed=5)
    expected = [drawn(whole) for _ in range(8)]
    begun = source(epochs=3, seed=5)
    begun_rows = [drawn(begun) for _ in range(3)]
    resumed = source(epochs=3, seed=5)
    resumed.load_state_dict(begun.state_dict())
    assert begun_rows + [drawn(resumed) for _ in range(5)] == expected
    with pytest.raises(DataError, match="seed 5 and now has 6"):
        source(seed=6).load_state_dict(begun.state_dict())


def test_part_of_an_epoch_and_more_groups_a_step_than_there_are() -> None:
    assert source(epochs=0.5).num_steps == 2
    many = source(count=3, batch_groups=7, epochs=5)
    assert sorted(Counter(drawn(many)).values()) == [2, 2, 3]
    with pytest.raises(DataError, match="nothing to train on"):
        GroupSource([], batch_groups=1, row_tokens=1, batch_tokens=1)


def test_the_reference_is_data_for_the_very_tokens(make: Any) -> None:
    trunk, groups = make.trunk(), make.groups(7, k=3)
    filled = with_reference(trunk, groups, row_tokens=30, batch_tokens=60)
    assert trunk.training
    whole: Batch = make_batch([filled])
    expected = trunk(whole.tree, {"reference": "logprobs"})["reference"]
    assert whole.ref_logprobs is not None
    assert torch.allclose(whole.ref_logprobs, expected, atol=1e-5)
    assert not whole.ref_logprobs.requires_grad
    assert torch.equal(whole.extras["rank"], make_batch([groups]).extras["rank"])
    policy = trunk(whole.tree, {"policy": "logprobs"})["policy"]
    assert (policy - expected).abs().max() > 0.1
    again = with_reference(trunk, groups, row_tokens=30, batch_tokens=60)
    assert torch.equal(make_batch([again]).ref_logprobs, whole.ref_logprobs)  # type: ignore[arg-type]


def test_every_response_gets_a_sibling_from_another_prompt() -> None:
    groups = [
        Group((1, 5 + place // 2), (Response((10 + place, 2), per_response={"desirable": float(place % 2)}),))
        for place in range(8)
    ]
    found = with_mismatched(groups, seed=3)
    belongs = {group.responses[0].ids: group.prompt for group in groups}
    for before, after in zip(groups, found, strict=True):
        own, borrowed = after.responses
        assert (after.prompt, own.ids) == (before.prompt, before.responses[0].ids)
        assert belongs[borrowed.ids] != after.prompt
        assert dict(own.per_response) == {**before.responses[0].per_response, "mismatched": 0.0}
        assert dict(borrowed.per_response) == {**before.responses[0].per_response, "mismatched": 1.0}
    assert len({group.responses[1].ids for group in found}) > 4
    assert with_mismatched(groups, seed=3) == found != with_mismatched(groups, seed=4)
    with pytest.raises(DataError, match="every prompt is the same"):
        with_mismatched(groups[:2])


# Plain text, all tokens, several pools ------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "pieces"), [(100, 1), (8, 1), (7, 2), (4, 3), (2, 7)])
def test_every_token_of_a_document_but_the_first_is_scored_once(max_tokens: int, pieces: int) -> None:
    groups = groups_of(Letters(), [Document(text="abcdef")], max_tokens=max_tokens).groups
    assert len(groups) == pieces
    ids = Letters().document("abcdef")
    assert groups[0].prompt + tuple(token for group in groups for token in group.responses[0].ids) == ids
    for group, before in zip(groups[1:], groups[:-1], strict=True):
        assert group.prompt == before.responses[0].ids[-1:]
    for group in groups:
        assert len(group.prompt) == 1 and scored(group.responses[0]) == len(group.responses[0].ids)
        assert len(group.prompt + group.responses[0].ids) <= max_tokens


@pytest.mark.parametrize("stable", [True, False])
def test_all_tokens_of_a_conversation_can_be_scored(stable: bool) -> None:
    turns = (Message("user", "ab"), Message("assistant", "c"), Message("user", "d"), Message("assistant", "ef"))
    encoder = Letters(stable=stable)
    groups = groups_of(encoder, [Demonstration(messages=turns)], max_tokens=100, score="all").groups
    assert len(groups) == (1 if stable else 2)
    for group, row in zip(groups, encoder.rows(turns), strict=True):
        assert group.prompt == row.ids[:1]
        assert group.responses[0].ids == row.ids[1:]
        assert scored(group.responses[0]) == len(row.ids) - 1


def pool(first: int, count: int) -> list[Group]:
    return [Group((1,), (Response((first + place,)),)) for place in range(count)]


def places(groups: list[Group]) -> list[int]:
    return [group.responses[0].ids[0] for group in groups]


def test_pools_are_drawn_by_weight_and_each_once_before_again() -> None:
    def made() -> GroupSource:
        more = [Pool(pool(100, 7), 1.0), Pool(pool(200, 3), 0.5)]
        return GroupSource(
            pool(0, 40), batch_groups=5, row_tokens=9, batch_tokens=9, epochs=2, seed=3, weight=2.0, more=more
        )

    whole = made()
    assert whole.total == 140  # 80 of the first, 40 of the second, 20 of the third
    drawn = places([group for _ in range(whole.num_steps) for group in whole.draw()])
    kinds = [place // 100 for place in drawn]
    assert Counter(kinds) == {0: 80, 1: 40, 2: 20}
    for n in range(1, 141):
        for kind, share in ((0, 4 / 7), (1, 2 / 7), (2, 1 / 7)):
            assert abs(kinds[:n].count(kind) - share * n) < 1.0 + 1e-9
    first = [place for place in drawn if place < 100]
    assert sorted(first[:40]) == sorted(first[40:]) == list(range(40)) and first[:40] != first[40:]
    second = [place for place in drawn if 100 <= place < 200]
    assert sorted(second[:7]) == sorted(second[7:14]) == list(range(100, 107)) and second[:7] != second[7:14]
    resumed, half = made(), made()
    for _ in range(11):
        half.draw()
    resumed.load_state_dict(half.state_dict())
    rest = places([group for _ in range(whole.num_steps - 11) for group in resumed.draw()])
    assert rest == drawn[55:]


def test_one_pool_alone_is_drawn_as_ever() -> None:
    """A weight alone changes nothing, and other pools leave the order of the first as it is."""
    order = drawn(source(batch_groups=10))
    assert drawn(source(batch_groups=10, weight=7.0)) == order
    beside = [Group((1, 100 + place), (Response((7,)),)) for place in range(5)]
    mixed = source(batch_groups=20, more=[Pool(beside, 1.0)])
    assert [place for place in drawn(mixed) if place < 90] == order


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        source(more=[Pool([], 1.0)])


def test_a_source_saved_with_other_pools_is_refused() -> None:
    state = source().state_dict()
    with pytest.raises(DataError, match="num_groups"):
        source(more=[Pool(pool(100, 5), 1.0)]).load_state_dict(state)
