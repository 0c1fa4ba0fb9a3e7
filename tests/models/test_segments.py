"""Runs of a tree, their masks, and what attention by segments refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import trained_model, untouched_model

from kilter.errors import ModelError
from kilter.models import segments
from kilter.models.build import policy_trunk
from kilter.models.segments import Run, Runs, runs_of
from kilter.tree import Group, Response, TokenTree, make_tree


def group(prompt: int, *responses: int) -> Group:
    return Group(tuple(range(1, 1 + prompt)), tuple(Response((9,) * length) for length in responses))


def test_a_first_response_goes_on_with_its_prompt() -> None:
    tree = make_tree([[group(3, 2, 4), group(2, 5)], [group(4, 1, 1, 1)]])
    assert runs_of(tree) == [
        Run(0, 0, 5, (), 0),
        Run(0, 5, 9, ((0, 3),), 3),
        Run(0, 9, 16, (), 0),
        Run(1, 0, 5, (), 0),
        Run(1, 5, 6, ((0, 4),), 4),
        Run(1, 6, 7, ((0, 4),), 4),
    ]


def test_responses_without_a_prompt_and_an_empty_tree() -> None:
    bare = Group((), (Response((1, 2), ((1, 2),)), Response((3, 4, 5), ((1, 3),))))
    assert runs_of(make_tree([[bare]])) == [Run(0, 0, 2, (), 0), Run(0, 2, 5, (), 0)]
    assert runs_of(make_tree([])) == []


def test_deeper_trees() -> None:
    """A root of 2, a branch of 3 below it, two leaves below that, and one leaf below the root."""
    segment = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 4, 4, -1]])
    ancestors = torch.eye(5, dtype=torch.bool)[None].clone()
    for child, parents in ((1, [0]), (2, [0, 1]), (3, [0, 1]), (4, [0])):
        ancestors[0, child, parents] = True
    nothing = torch.zeros(0, dtype=torch.int64)
    tree = TokenTree(segment, segment, segment, ancestors, nothing, nothing, nothing, nothing, nothing)
    assert runs_of(tree) == [Run(0, 0, 7, (), 0), Run(0, 7, 8, ((0, 2), (2, 5)), 5), Run(0, 8, 10, ((0, 2),), 2)]


def test_masks() -> None:
    runs = Runs(make_tree([[group(3, 2, 2)]]))
    first, second = runs.runs
    like = torch.zeros(1)
    assert runs.mask(first, None, like) is None and runs.mask(first, 5, like) is None

    def seen(run: Run, window: int | None) -> list[list[int]]:
        mask = runs.mask(run, window, like)
        assert mask is not None and set(mask.unique().tolist()) <= {0.0, -torch.inf}
        return (mask == 0).int().tolist()

    assert seen(second, None) == seen(second, 5) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen(second, 2) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert seen(first, 2)[4] == [0, 0, 0, 1, 1]
    assert runs.mask(second, None, like.double()).dtype == torch.float64  # type: ignore[union-attr]


def ask(**more: Any) -> None:
    heads = torch.zeros(1, 2, 4, 8)
    segments.attend(torch.nn.Identity(), heads, heads, heads, None, runs=Runs(make_tree([[group(2, 2)]])), **more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"softcap": 30.0}, "softcap 30.0"),
        ({"is_causal": False}, "not causal"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
    ],
)
def test_what_it_does_not_know_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ask(**more)
    ask(position_ids=torch.zeros(1), s_aux=None, is_causal=True)


def test_without_runs_it_is_sdpa_to_the_bit() -> None:
    """Sampling and the untouched model: masks and numbers of transformers' own, windows included."""
    for family in ("llama", "mistral", "gemma3"):
        plain, ours = untouched_model(family), trained_model(family).eval()
        trunk = policy_trunk(ours)
        assert ours.config._attn_implementation == segments.SEGMENTS and trunk.layout == "packed"
        ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        with torch.no_grad():
            theirs = plain(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(ours(input_ids=ids, attention_mask=mask).logits, theirs)
            assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_half_precision_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 8, generator=generator).bfloat16() for _ in range(3))
    runs = Runs(make_tree([[group(3, 2, 4)]]))
    low, _ = segments.attend(torch.nn.Identity(), query, key, value, None, runs=runs)
    high, _ = segments.attend(torch.nn.Identity(), query.float(), key.float(), value.float(), None, runs=runs)
    assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())
    turned, _ = segments.attend(torch.nn.Identity(), query.float(), key.float(), value, None, runs=runs)  # by autocast
    assert turned.dtype == torch.bfloat16 and torch.equal(turned, low)


@pytest.mark.parametrize("window", [None, 3])
def test_gradient(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    runs = Runs(make_tree([[group(2, 2, 3), group(1, 2)], [group(2, 1, 1)]]))
    shapes = [(2, 4, 10, 8), (2, 2, 10, 8), (2, 2, 10, 8)]  # grouped heads
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attended(*heads: torch.Tensor) -> torch.Tensor:
        return segments.attend(torch.nn.Identity(), *heads, None, runs=runs, sliding_window=window)[0]

    assert torch.autograd.gradcheck(attended, inputs)
