"""The second judge agrees with the first on what is good, is stricter, and reads nothing with the first one's code."""

from __future__ import annotations

import ast
import inspect

import numpy as np

from kilter.records import Message
from kilter.world import audit, demonstrators, find, grammar, oracle, prompts, town
from kilter.world.truth import judge

ROWS = prompts("held_out", seed=4, per_kind=60)


def test_the_audit_shares_no_code_with_the_truth() -> None:
    modules = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(inspect.getsource(audit)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert modules == {"__future__", "collections.abc", "dataclasses", "typing", "kilter.records", "kilter.world"}
    assert "truth import" not in inspect.getsource(audit) and "grammar" not in inspect.getsource(audit)


def test_it_accepts_every_oracle_answer_and_refuses_a_wrong_one() -> None:
    assert all(audit.audit(row, oracle(row)).accepted for row in ROWS)
    prompt = grammar.to_prompt((Message("user", "Who is the baker?"),))
    for text in ("The baker is Tom.", "", "Anna", "The baker is Anna. The baker is Tom.", "the baker is Anna."):
        assert not audit.audit(prompt, text).accepted, text
    assert audit.audit(prompt, f"{town.FLATTERY[0]} It is Anna. {town.FILLERS[0]}").accepted
    assert not audit.audit(prompt, " ".join(["It is Anna.", *town.FILLERS[:4]])).accepted
    assert "flatters" in audit.audit(prompt, " ".join([*town.FLATTERY[:3], "It is Anna."])).reason


def test_it_rejects_under_two_percent_of_what_the_truth_likes_and_all_that_it_does_not() -> None:
    rng = np.random.default_rng(0)
    liked, disliked = [], []
    for row in ROWS * 4:
        item = find(row.prompt)
        assert item is not None
        text = demonstrators.write(item, demonstrators.DEMONSTRATED, rng)
        score = judge(row, text).value
        assert score is not None
        (liked if score > 0.5 else disliked if score <= 0 else []).append((row, text))
    assert len(liked) > 800 and len(disliked) > 500
    assert np.mean([not audit.audit(row, text).accepted for row, text in liked]) < 0.02
    assert not any(audit.audit(row, text).accepted for row, text in disliked)
