"""Marks on a common scale, and thumbs side by side: by hand, and where annotators are known to differ."""

from __future__ import annotations

import numpy as np
import pytest

from kilter.data.convert import pairs_of
from kilter.data.marks import standardized, thumbs_together
from kilter.errors import DataError
from kilter.records import Message, Rating, UnpairedFeedback

ONE, TWO = ((Message("user", text),) for text in ("one", "two"))


def mark(who: str, *values: float, errors: tuple[float, ...] = ()) -> Rating:
    texts = tuple(f"answer {place}" for place in range(len(values)))
    return Rating(prompt=ONE, responses=texts, values=values, errors=errors, annotator=who, kind="fact", weight=2.0)


def test_by_annotator_by_hand() -> None:
    """Anna's marks 1, 3, 5 have mean 3 and spread sqrt(8/3); Bert's 4, 4 none; Carl gave one mark."""
    rows = [mark("anna", 1.0, 3.0, errors=(0.5, 1.0)), mark("bert", 4.0, 4.0), mark("anna", 5.0), mark("carl", 5.0)]
    spread = (8 / 3) ** 0.5
    found = standardized(rows, "annotator")
    assert [one.values for one in found] == [
        pytest.approx((-2 / spread, 0.0)),
        (0.0, 0.0),
        pytest.approx((2 / spread,)),
        (0.0,),
    ]
    assert found[0].errors == pytest.approx((0.5 / spread, 1.0 / spread)) and found[1].errors == ()
    assert [(one.annotator, one.weight, one.kind) for one in found] == [
        (one.annotator, 2.0, "fact") for one in (*rows[:2], rows[2], rows[3])
    ]


def test_over_all_by_hand() -> None:
    rows = [mark("anna", 1.0, 3.0), mark("", 5.0)]  # mean 3, spread sqrt(8/3); nobody needs a name
    spread = (8 / 3) ** 0.5
    assert [one.values for one in standardized(rows, "all")] == [
        pytest.approx((-2 / spread, 0.0)),
        pytest.approx((2 / spread,)),
    ]
    with pytest.raises(DataError, match=r"names no 'annotator', .*standardise over all"):
        standardized(rows, "annotator")


def test_scales_that_only_differ_in_place_and_width_become_one() -> None:
    """Truth t, marks a + b t: after it, everybody's marks say the same of the same answer."""
    truth = np.random.default_rng(0).normal(size=40)
    rows = [
        mark(who, *(offset + stretch * truth).tolist())
        for who, offset, stretch in (("anna", 3.0, 1.0), ("bert", 4.0, 0.2), ("carl", -1.0, 5.0))
    ]
    first, *others = standardized(rows, "annotator")
    for other in others:
        assert other.values == pytest.approx(first.values)
    assert first.values == pytest.approx(((truth - truth.mean()) / truth.std()).tolist())


def thumb(prompt: tuple[Message, ...], text: str, up: bool) -> UnpairedFeedback:
    return UnpairedFeedback(prompt=prompt, response=text, desirable=up, kind="fact", source="here")


def test_thumbs_of_a_prompt_stand_side_by_side_and_each_counts_once() -> None:
    rows = [thumb(ONE, "a", True), thumb(TWO, "a", False), thumb(ONE, "b", False), thumb(ONE, "a", False)]
    found = thumbs_together(rows)
    assert [(one.prompt, one.responses, one.values) for one in found] == [
        (ONE, ("a", "b"), (1.0, 0.0)),
        (TWO, ("a",), (0.0,)),
        (ONE, ("a",), (0.0,)),
    ]
    assert {(one.kind, one.source) for one in found} == {("fact", "here")}
    assert [(pair.chosen, pair.rejected) for one in found for pair in pairs_of(one)] == [("a", "b")]
