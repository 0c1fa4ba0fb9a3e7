"""A tree is its responses: every gradient of packed trees equals that of the untouched model, family by family."""

from __future__ import annotations

import pytest
import torch
from families import (
    CONFIGS,
    PACKED,
    SEGMENTED,
    WINDOW,
    attending,
    expected,
    gradient_gap,
    gradients,
    mixed_loss,
    trained_model,
)

from kilter.models import segments
from kilter.models import trunk as trunk_module
from kilter.models.build import policy_trunk
from kilter.tree import Group, make_batch

BOUND = 1e-5


def micro_batches(groups: list[Group], size: int) -> list[list[list[Group]]]:
    """Rows of at most four groups: 1 x 16 is one micro-batch of four rows, 16 x 1 sixteen of one row."""
    chunks = [groups[i : i + size] for i in range(0, len(groups), size)]
    return [[chunk[i : i + 4] for i in range(0, len(chunk), 4)] for chunk in chunks]


@pytest.mark.parametrize("size", [16, 4, 1], ids=["1x16", "4x4", "16x1"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("family", "way"), [*((f, "dense") for f in CONFIGS), *((f, "segments") for f in SEGMENTED)])
def test_tree_is_its_responses(family: str, way: str, checkpointing: bool, size: int) -> None:
    groups, _, theirs = expected(family)
    model = trained_model(family)
    trunk = attending(policy_trunk(model), way)
    assert trunk.layout == ("packed" if family in PACKED else "unrolled")
    trunk.set_checkpointing(checkpointing)
    for rows in micro_batches(groups, size):
        mixed_loss(trunk, make_batch(rows)).backward()
    gap, where = gradient_gap(gradients(model), theirs)
    assert gap <= BOUND, where


@pytest.mark.parametrize("family", PACKED)
def test_leaked_mask_is_red(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that lets a response see what stands before it in the row, but is not on its path."""
    right = trunk_module.tree_masks

    def leaked(tree, kinds, dtype):
        open_tree = trunk_module.TokenTree(
            *(getattr(tree, name) for name in ("tokens", "positions", "segment")),
            torch.ones_like(tree.ancestors),
            *(getattr(tree, name) for name in ("source", "target", "leaf", "last", "group")),
        )
        return right(open_tree, kinds, dtype)

    monkeypatch.setattr(trunk_module, "tree_masks", leaked)
    groups, _, theirs = expected(family)
    model = trained_model(family)
    mixed_loss(attending(policy_trunk(model), "dense"), make_batch([groups])).backward()
    gap, _ = gradient_gap(gradients(model), theirs)
    assert gap > 1e-2


@pytest.mark.parametrize("family", [f for f in PACKED if "sliding_window" in CONFIGS[f][1]])
def test_window_over_places_is_red(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that counts places in the row instead of positions on the path."""
    right = trunk_module.tree_masks

    def by_place(tree, kinds, dtype):
        places = torch.arange(tree.tokens.shape[1]).expand_as(tree.tokens)
        fields = [getattr(tree, name) for name in ("segment", "ancestors", "source", "target", "leaf", "last", "group")]
        return right(trunk_module.TokenTree(tree.tokens, places, *fields), kinds, dtype)

    monkeypatch.setattr(trunk_module, "tree_masks", by_place)
    groups, _, theirs = expected(family)
    model = trained_model(family)
    mixed_loss(attending(policy_trunk(model), "dense"), make_batch([groups])).backward()
    assert gradient_gap(gradients(model), theirs)[0] > 1e-3


@pytest.mark.parametrize("family", SEGMENTED)
def test_a_run_that_sees_what_is_not_on_its_path_is_red(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaked(tree):
        return [
            segments.Run(run.row, run.start, run.end, ((0, run.start),) if run.start else (), run.start)
            for run in right(tree)
        ]

    right = segments.runs_of
    monkeypatch.setattr(segments, "runs_of", leaked)
    groups, _, theirs = expected(family)
    model = trained_model(family)
    mixed_loss(attending(policy_trunk(model), "segments"), make_batch([groups])).backward()
    assert gradient_gap(gradients(model), theirs)[0] > 1e-2


@pytest.mark.parametrize("family", [f for f in SEGMENTED if "sliding_window" in CONFIGS[f][1]])
def test_a_run_without_its_window_is_red(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = segments.Runs.mask, set()

    def windowless(self, run, window, like):
        seen.add(window)
        return right(self, run, None, like)

    monkeypatch.setattr(segments.Runs, "mask", windowless)
    groups, _, theirs = expected(family)
    model = trained_model(family)
    mixed_loss(attending(policy_trunk(model), "segments"), make_batch([groups])).backward()
    assert gradient_gap(gradients(model), theirs)[0] > 1e-3
    assert WINDOW in seen
