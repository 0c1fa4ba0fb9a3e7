"""The token tree: what it means, that packing loses and invents nothing, and that unrolling it changes no meaning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kilter.errors import DataError
from kilter.models.attention import visible
from kilter.tree import (
    Batch,
    Group,
    Response,
    TokenTree,
    empty_batch,
    make_batch,
    make_batches,
    make_tree,
    part,
    scored,
    size,
    split_by_response,
    unroll,
)

TOKENS = st.integers(3, 50)


@st.composite
def responses(draw: st.DrawFn, first: int) -> Response:
    """A response whose spans, if it has any, start at `first` or later."""
    ids = tuple(draw(st.lists(TOKENS, min_size=1, max_size=6)))
    if first == 0 and draw(st.booleans()):
        return Response(ids)
    cuts = draw(st.lists(st.integers(first, len(ids)), max_size=4, unique=True).map(sorted))
    return Response(ids, tuple(zip(cuts[::2], cuts[1::2], strict=False)))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    prompt = tuple(draw(st.lists(TOKENS, max_size=5)))
    return Group(prompt, tuple(draw(st.lists(responses(0 if prompt else 1), min_size=1, max_size=3))))


ROWS = st.lists(st.lists(groups(), max_size=3), max_size=3)


def wanted(rows: list[list[Group]]) -> list[tuple[tuple[int, ...], list[int], int]]:
    """By plain loops, for every response: its path, the places of its scored tokens on it, its prompt's number."""
    found = []
    number = 0
    for row in rows:
        for group in row:
            for response in group.responses:
                spans = ((0, len(response.ids)),) if response.spans is None else response.spans
                places = [len(group.prompt) + i for start, end in spans for i in range(start, end)]
                found.append((group.prompt + response.ids, places, number))
            number += 1
    return found


def path_to(tree: TokenTree, place: int) -> list[int]:
    """Flat places that the token at `place` sees, itself last, straight from the definition."""
    width = tree.tokens.shape[1]
    row, query = divmod(place, width)
    segment = tree.segment[row].tolist()
    if segment[query] < 0:
        return [place]
    seen = [key for key in range(query + 1) if segment[key] >= 0 and tree.ancestors[row, segment[query], segment[key]]]
    return [row * width + key for key in seen]


def check_meaning(tree: TokenTree, rows: list[list[Group]]) -> None:
    expected = wanted(rows)
    tokens, positions = tree.tokens.flatten(), tree.positions.flatten()
    assert tree.group.tolist() == [number for _, _, number in expected]
    for r, (path, _, _) in enumerate(expected):
        places = path_to(tree, int(tree.last[r]))
        assert tokens[places].tolist() == list(path)
        assert positions[places].tolist() == list(range(len(path)))
    targets = [(r, path[place], path[:place]) for r, (path, places, _) in enumerate(expected) for place in places]
    assert tree.leaf.tolist() == [r for r, _, _ in targets]
    assert tree.target.tolist() == [target for _, target, _ in targets]
    for source, (_, _, before) in zip(tree.source.tolist(), targets, strict=True):
        assert tuple(tokens[path_to(tree, source)].tolist()) == before


@given(ROWS)
@settings(deadline=None, max_examples=60)
def test_every_response_is_read_on_its_own_path(rows: list[list[Group]]) -> None:
    check_meaning(make_tree(rows), rows)


@given(ROWS)
@settings(deadline=None, max_examples=60)
def test_unrolled_tree_means_the_same(rows: list[list[Group]]) -> None:
    tree = make_tree(rows)
    alone = unroll(tree)
    check_meaning(alone, rows)
    assert not len(tree.last) or len(alone.tokens) == len(tree.last)
    again = unroll(alone)
    for name in TokenTree.__slots__:
        assert torch.equal(getattr(again, name), getattr(alone, name)), name


@given(ROWS)
@settings(deadline=None, max_examples=40)
def test_visible_is_its_definition(rows: list[list[Group]]) -> None:
    tree = make_tree(rows)
    seen = visible(tree)
    width = tree.tokens.shape[1]
    for place in range(tree.tokens.numel()):
        row, query = divmod(place, width)
        assert (seen[row, query].nonzero()[:, 0] + row * width).tolist() == path_to(tree, place)


@given(st.lists(groups(), min_size=1, max_size=8), st.integers(5, 40), st.integers(5, 80))
@settings(deadline=None, max_examples=60)
def test_batches_hold_every_group_once_within_budget(kept: list[Group], row_tokens: int, batch_tokens: int) -> None:
    numbered = []
    for i, group in enumerate(kept):
        held = tuple(
            Response(r.ids, r.spans, {"value": torch.arange(scored(r)) + 100.0 * i}, {"index": 10 * i + j})
            for j, r in enumerate(group.responses)
        )
        numbered.append(Group(group.prompt, held))
    batches = make_batches(numbered, row_tokens=row_tokens, batch_tokens=batch_tokens)
    seen: list[int] = []
    for batch in batches:
        num_rows, width = batch.tree.tokens.shape
        assert width <= row_tokens or num_rows * width <= batch_tokens or num_rows == 1
        assert num_rows == 1 or num_rows * width <= batch_tokens
        longest = max(size(group) for group in numbered)
        assert width <= max(row_tokens, longest)
        index = [int(value) for value in batch.extras["index"]]
        seen += index
        assert batch.units["responses"] == len(index) == len(batch.tree.last)
        assert batch.units["tokens"] == len(batch.tree.source)
        values = split_by_response(batch.extras["value"], batch.tree.leaf, len(index))
        for number, value, last in zip(index, values, batch.tree.last.tolist(), strict=True):
            group = numbered[number // 10]
            response = group.responses[number % 10]
            assert torch.equal(value, response.per_token["value"])
            path = batch.tree.tokens.flatten()[path_to(batch.tree, last)]
            assert tuple(path.tolist()) == group.prompt + response.ids
    assert sorted(seen) == [10 * i + j for i, group in enumerate(kept) for j in range(len(group.responses))]
    assert sum(batch.units["prompts"] for batch in batches) == len(kept)
    pairs = sum(len(g.responses) * (len(g.responses) - 1) // 2 for g in kept)
    assert sum(batch.units["pairs"] for batch in batches) == pairs
    again = make_batches(numbered, row_tokens=row_tokens, batch_tokens=batch_tokens)
    assert all(torch.equal(a.tree.tokens, b.tree.tokens) for a, b in zip(batches, again, strict=True))


def test_golden_tree() -> None:
    """Written out by hand: a pair, then a demonstration of two turns, then a tail."""
    pair = Group((5, 6), (Response((7, 8)), Response((9,))))
    turns = Group((5,), (Response((10, 11, 12, 13), spans=((0, 2), (3, 4))),))
    tree = make_tree([[pair, turns], [Group((4,), (Response((14,)),))]], pad_id=1)
    assert tree.tokens.tolist() == [[5, 6, 7, 8, 9, 5, 10, 11, 12, 13], [4, 14, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert tree.positions.tolist()[0] == [0, 1, 2, 3, 2, 0, 1, 2, 3, 4]
    assert tree.segment.tolist() == [[0, 0, 1, 1, 2, 3, 4, 4, 4, 4], [0, 1, -1, -1, -1, -1, -1, -1, -1, -1]]
    assert tree.source.tolist() == [1, 2, 1, 5, 6, 8, 10]
    assert tree.target.tolist() == [7, 8, 9, 10, 11, 13, 14]
    assert tree.leaf.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert tree.last.tolist() == [3, 4, 9, 11]
    assert tree.group.tolist() == [0, 0, 1, 2]


def test_over_long_group_gets_its_own_row() -> None:
    long = Group(tuple(range(3, 33)), (Response((7,) * 10),))
    short = Group((5,), (Response((6,)),))
    batches = make_batches([short, long, short], row_tokens=8, batch_tokens=16)
    assert [tuple(batch.tree.tokens.shape) for batch in batches] == [(1, 40), (1, 4)]


def test_rows_fill_up() -> None:
    """Best fit: 6, 4, 3, 3, 2, 2 tokens need two rows of ten."""
    kept = [Group((5,) * (n - 1), (Response((6,)),)) for n in (3, 6, 2, 4, 3, 2)]
    (batch,) = make_batches(kept, row_tokens=10, batch_tokens=20)
    assert batch.tree.tokens.shape == (2, 10) and bool((batch.tree.segment >= 0).all())


def test_nothing_makes_one_empty_batch() -> None:
    (batch,) = make_batches([], row_tokens=8, batch_tokens=8)
    assert batch.tree.tokens.shape == (1, 1) and len(batch.tree.source) == len(batch.tree.last) == 0
    assert batch.units == {"tokens": 0, "responses": 0, "prompts": 0, "pairs": 0}
    assert unroll(batch.tree) is batch.tree
    assert split_by_response(torch.zeros(0), batch.tree.leaf, 0) == []


def test_empty_batch_has_the_names_of_another() -> None:
    response = Response((4,), per_token={"ref_logprobs": torch.zeros(1), "advantages": torch.ones(1)})
    batch = make_batch([[Group((3,), (response,))]])
    assert batch.ref_logprobs is not None and list(batch.extras) == ["advantages"]
    empty = empty_batch(batch)
    assert empty.ref_logprobs is not None and empty.ref_logprobs.shape == (0,)
    assert empty.extras["advantages"].shape == (0,) and set(empty.units.values()) == {0}


@pytest.mark.parametrize(
    ("group", "says"),
    [
        (Group((3,), (Response(()),)), "no tokens"),
        (Group((), (Response((4, 5)),)), "no token before it"),
        (Group((3,), (Response((4, 5), spans=((1, 1),)),)), "span"),
        (Group((3,), (Response((4, 5), spans=((0, 3),)),)), "span"),
        (Group((3,), (Response((4, 5, 6), spans=((1, 2), (0, 1))),)), "span"),
        (Group((3,), (Response((4, 5, 6), spans=((0, 2), (1, 3))),)), "span"),
    ],
)
def test_what_cannot_be_scored_is_refused(group: Group, says: str) -> None:
    with pytest.raises(DataError, match=says):
        make_tree([[group]])


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="scored tokens"):
        make_batch([[Group((3,), (Response((4, 5), per_token={"a": torch.zeros(1)}),))]])
    with pytest.raises(DataError, match="index"):
        make_batch([[Group((3,), (Response((4,), per_response={"index": 1}), Response((5,))))]])


def test_wide_rows_are_about_equally_long() -> None:
    """21 groups of 100 tokens in rows of at most 2,000: two rows of 1,000 and 1,100, not of 2,000 and 100."""
    groups = [Group((1,) * 60, (Response((2,) * 40),)) for _ in range(21)]
    (batch,) = make_batches(groups, row_tokens=2000, batch_tokens=10_000)
    assert batch.tree.tokens.shape == (2, 1100)
    (narrow,) = make_batches(groups, row_tokens=200, batch_tokens=10_000)
    assert narrow.tree.tokens.shape == (11, 200)
    uneven = [Group((1,) * length, (Response((2,)),)) for length in (900, 500, 450, 80, 40, 20)]
    rows = make_batches(uneven, row_tokens=1000, batch_tokens=1)
    assert sorted(batch.units["prompts"] for batch in rows) == [1, 1, 4]  # 901; 451; 501, 81, 41 and 21
    assert max(batch.tree.tokens.shape[1] for batch in rows) <= 1000


def carried(rows: Sequence[Sequence[Group]]) -> Batch:
    """With a number on each scored token, one on each response and one on the step."""
    seen = count()
    groups = [
        [
            replace(
                group,
                responses=tuple(
                    replace(
                        response,
                        per_token={
                            name: torch.tensor([float(next(seen)) for _ in range(scored(response))])
                            for name in ("ref_logprobs", "old")
                        },
                        per_response={"mark": float(next(seen))},
                    )
                    for response in group.responses
                ),
            )
            for group in row
        ]
        for row in rows
    ]
    batch = make_batch(groups)
    return replace(batch, extras=batch.extras | {"kl": torch.tensor(3.0)})


@given(st.lists(st.lists(groups(), min_size=1, max_size=3), min_size=1, max_size=3), st.randoms())
@settings(max_examples=100, deadline=None)
def test_a_part_is_the_batch_of_those_responses(rows: list[list[Group]], rng: random.Random) -> None:
    """Of rows of groups with one to three responses, some kept: what each kept response sees, reads and carries is as
    before, and nothing is left that none of them needs."""
    whole = carried(rows)
    keep = torch.tensor([rng.random() < 0.5 for _ in whole.tree.last], dtype=torch.bool)
    found = part(whole, keep, extras=("mark", "none"))
    assert found.units == whole.units and list(found.extras) == ["mark"]
    kept = [place for place, wanted in enumerate(keep.tolist()) if wanted]
    assert len(found.tree.last) == len(kept) == len(found.extras["mark"])
    old_paths, new_paths = paths(whole.tree), paths(found.tree)
    for new, old in enumerate(kept):
        assert new_paths[new] == old_paths[old]
        assert found.extras["mark"][new] == whole.extras["mark"][old]
        assert found.ref_logprobs is not None and whole.ref_logprobs is not None
        known, before = found.ref_logprobs[found.tree.leaf == new], whole.ref_logprobs[whole.tree.leaf == old]
        assert known.tolist() == before.tolist()
    together = whole.tree.group[keep]
    assert torch.equal(found.tree.group[:, None] == found.tree.group, together[:, None] == together)
    needed = sum(map(len, held_places(whole.tree, kept)))
    assert int((found.tree.segment >= 0).sum()) == needed and found.tree.tokens.shape[1] <= whole.tree.tokens.shape[1]


def held_places(tree: TokenTree, kept: Sequence[int]) -> list[set[int]]:
    """The places in each row that stand on the path of a kept response."""
    width = tree.tokens.shape[1]
    rows: list[set[int]] = [set() for _ in tree.tokens]
    for response in kept:
        row, end = divmod(int(tree.last[response]), width)
        own = int(tree.segment[row, end])
        rows[row] |= {
            place
            for place in range(width)
            if tree.segment[row, place] >= 0 and tree.ancestors[row, own, tree.segment[row, place]]
        }
    return rows


def paths(tree: TokenTree) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """By response: (token, position) of all that its last token sees, and (position read, target) of what is scored."""
    width = tree.tokens.shape[1]
    seen = visible(tree)
    found = []
    for response, last in enumerate(tree.last.tolist()):
        row, end = divmod(last, width)
        places = seen[row, end].nonzero().flatten().tolist()
        path = [(int(tree.tokens[row, place]), int(tree.positions[row, place])) for place in places]
        mine = (tree.leaf == response).nonzero().flatten().tolist()
        assert all(int(tree.source[n]) // width == row for n in mine)
        scored_here = [(int(tree.positions.flatten()[tree.source[n]]), int(tree.target[n])) for n in mine]
        found.append((path, scored_here))
    return found


def test_no_part_is_an_empty_row() -> None:
    whole = carried([[Group((1, 2), (Response((3, 4)),))]])
    none = part(whole, torch.tensor([False]), extras=("mark",))
    assert none.tree.tokens.shape == (1, 1) and len(none.tree.source) == len(none.tree.last) == 0
    assert part(empty_batch(), torch.zeros(0, dtype=torch.bool), extras=()).tree.tokens.shape == (1, 1)
