"""Rows as a model sees them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kilter.data.chat import ChatEncoder
from kilter.data.show import show
from kilter.records import (
    Conversation,
    Demonstration,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    StepLabels,
    UnpairedFeedback,
)

ASKED: Conversation = (Message("user", "Hi é"),)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    """Bytes are tokens: what is shown can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={piece: place for place, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return ChatEncoder(tokenizer)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (PreferencePair(prompt=ASKED, chosen="Yes", rejected="No"), [("chosen", " Yes</s>"), ("rejected", " No</s>")]),
        (PreferencePair(prompt=ASKED, chosen="Y", rejected="N", tie=True), [("tie", " Y</s>"), ("tie", " N</s>")]),
        (Ranking(prompt=ASKED, responses=("a", "b"), ranks=(1, 0)), [("rank 1", " a</s>"), ("rank 0", " b</s>")]),
        (
            Judgement(prompt=ASKED, responses=("a", "b"), ranks=(0, 0), annotator="w"),
            [("rank 0", " a</s>"), ("rank 0", " b</s>")],
        ),
        (UnpairedFeedback(prompt=ASKED, response="a", desirable=False), [("undesirable", " a</s>")]),
        (StepLabels(prompt=ASKED, steps=("a", "b"), labels=(1, 0)), [("steps", " a\nb</s>")]),
        (Prompt(prompt=ASKED), [("prompt", "")]),
        (
            Demonstration(
                messages=(*ASKED, Message("assistant", "Yes"), Message("user", "So?"), Message("assistant", "No"))
            ),
            [("demonstration", " Yes</s> No</s>")],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Record) else "",
)
def test_every_response_is_a_row_with_its_scored_tokens(
    encoder: ChatEncoder, record: Record, expected: list[tuple[str, str]]
) -> None:
    rows = list(show([record], encoder))
    found = [(row.label, "".join(token.text for token in row.tokens if token.scored)) for row in rows]
    assert found == expected
    assert all(row.scored == sum(token.scored for token in row.tokens) for row in rows)
    for row in rows:
        shown = "".join(token.text for token in row.tokens)
        assert shown.startswith("\n\nHuman: Hi ") and "\n\nAssistant:" in shown


def test_what_cannot_be_trained_on_is_said(encoder: ChatEncoder) -> None:
    rows = list(show([Demonstration(messages=ASKED), Prompt(prompt=ASKED)], encoder))
    assert "nothing would be scored" in rows[0].problem and not rows[0].tokens
    assert (rows[1].record, rows[1].problem) == (1, "")
