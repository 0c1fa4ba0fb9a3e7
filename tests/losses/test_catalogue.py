"""The reference page says what the code says, and every loss says all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kilter.losses import PAIR_LOSSES, Range, all_losses, catalogue, pair_loss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_the_page_is_made_from_the_code() -> None:
    assert PAGE.read_text() == catalogue.markdown(), "docs/losses.md is old: kilter losses --markdown > docs/losses.md"


@pytest.mark.parametrize("name", sorted(all_losses()))
def test_every_loss_says_all_there_is_to_say(name: str) -> None:
    entry, loss = catalogue.entry(name), all_losses()[name]
    assert "loss" in entry.formula
    assert "arXiv" in entry.source or name == "nll" or re.search(r"\b19\d\d\b", entry.source)
    assert entry.use.startswith("Use it ")
    assert "|" not in entry.summary + entry.use, "they stand in a table's cells"
    assert entry.returns.startswith("float[") and any(digit in entry.returns for digit in ("0", "1", "ln 2", "ln V"))
    for option, allowed in loss.ranges.items():
        if isinstance(allowed, Range):
            assert allowed.what and allowed.allows(loss.defaults[option]) and allowed.is_usual(loss.defaults[option])
            assert allowed.usual[0] > -1e9 and allowed.usual[1] < 1e9
        else:
            assert loss.defaults[option] in allowed


def test_a_docstring_without_a_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilter.losses.registry.PAIR_LOSSES", table := dict(PAIR_LOSSES))

    @pair_loss("bare")
    def bare(chosen: Tensor) -> Tensor:
        """A sentence."""
        return -chosen

    assert "bare" in table and torch.equal(bare(torch.ones(1)), -torch.ones(1))
    with pytest.raises(ValueError, match="'bare': its docstring needs a sentence, a formula"):
        catalogue.entry("bare")


def test_a_loss_in_words() -> None:
    text = catalogue.text("f_dpo")
    assert "loss = -log sigmoid(beta [f'(u_chosen) - f'(u_rejected)])" in text
    assert "divergence = js: one of forward_kl, reverse_kl, js, alpha" in text
    assert "alpha = 0.5: of the alpha divergence; towards 0 reverse KL; > 0 and < 1, usual 0.1 to 0.9" in text
    assert "Reads summed log-probs of policy and reference; per pair." in text
    assert "Reads mean log-probs of policy alone; per pair." in catalogue.text("simpo")
    assert "per chosen token." in catalogue.text("nll")
    assert "per prompt." in catalogue.text("kto")
