"""A loss's signature is its schema: what it takes, what may be set, and what is refused before any model loads."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from kilter.losses import PAIR_LOSSES, Range, bind, pair_loss, unpaired_loss, unusual

Weight = Annotated[float, Range(at_least=0.0, usual=(0.0, 1.0))]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A copy of the registry, so that what a test registers is gone after it."""
    monkeypatch.setattr("kilter.losses.registry.PAIR_LOSSES", copy := dict(PAIR_LOSSES))
    return copy


def test_dpo_is_described_by_its_signature() -> None:
    loss = PAIR_LOSSES["dpo"]
    assert loss.inputs == ("chosen", "rejected", "ref_chosen", "ref_rejected")
    assert loss.needs_reference
    assert not loss.length_normalized
    assert loss.defaults == {"beta": 0.1, "label_smoothing": 0.0}


def test_a_loss_without_reference_is_one_function(registry: dict[str, object]) -> None:
    @pair_loss("margin", length_normalized=True)
    def margin(
        chosen: Tensor,
        rejected: Tensor,
        chosen_tokens: Tensor,
        *,
        beta: float = 2.0,
        shape: Literal["hinge", "linear"] = "hinge",
    ) -> Tensor:
        gap = beta * (chosen - rejected)
        return torch.relu(1 - gap) if shape == "hinge" else chosen_tokens - gap

    loss = registry["margin"]
    assert (loss.needs_reference, loss.length_normalized) == (False, True)  # type: ignore[attr-defined]
    assert bind("margin", {})(*torch.tensor([[-1.0], [-1.25], [3.0]])).item() == 0.5
    assert bind("margin", {"shape": "linear", "beta": 4})(*torch.tensor([[-1.0], [-1.25], [3.0]])).item() == 2.0
    with pytest.raises(ValueError, match=r"loss.shape is 'square'; choose one of hinge, linear"):
        bind("margin", {"shape": "square"})


def test_names_are_registered_once(registry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="'dpo' is registered twice"):
        pair_loss("dpo")(lambda chosen: chosen)


def test_a_loss_cannot_ask_for_what_nobody_gives(registry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"'odd' asks for winner; there is chosen, rejected"):
        pair_loss("odd")(lambda winner, rejected: winner - rejected)


def test_a_loss_over_single_responses_is_one_function_too(
    registry: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kilter.losses.registry.UNPAIRED_LOSSES", table := {})

    @unpaired_loss("thumbs")
    def thumbs(logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, *, beta: Weight = 0.5) -> Tensor:
        return desirable * (1 - torch.sigmoid(beta * (logps - ref_logps - kl)))

    assert table["thumbs"].inputs == ("logps", "ref_logps", "desirable", "kl")
    assert table["thumbs"].needs_reference
    assert not table["thumbs"].length_normalized
    assert bind("thumbs", {"beta": 2.0})(*torch.tensor([[-1.0], [-1.0], [1.0], [0.0]])).item() == 0.5
    assert unusual("thumbs", {"beta": 2.0}) == ["loss.beta is 2; usual for 'thumbs' is 0 to 1"]
    for wrong, message in (({"beta": -1.0}, "loss.beta is -1.0"), ({"gamma": 1.0}, "it takes beta")):
        with pytest.raises(ValueError, match=message):
            bind("thumbs", wrong)
    with pytest.raises(ValueError, match="'thumbs' is registered twice"):
        pair_loss("thumbs")(lambda chosen: chosen)
    with pytest.raises(ValueError, match="'dpo' is registered twice"):
        unpaired_loss("dpo")(lambda logps: logps)
    with pytest.raises(ValueError, match="asks for chosen; there is logps"):
        unpaired_loss("odd")(lambda chosen: chosen)


def test_what_is_wrong_is_named() -> None:
    for name, options, message in (
        ("dop", {}, r"loss.name is 'dop'; choose one of .*dpo"),
        ("dpo", {"betta": 0.1}, r"loss.betta: 'dpo' has no such option; it takes beta, label_smoothing"),
        ("dpo", {"beta": 0.0}, r"loss.beta is 0.0; 'dpo' takes a number > 0"),
        ("dpo", {"beta": "high"}, r"loss.beta is 'high'; 'dpo' takes a number > 0"),
        ("dpo", {"beta": True}, r"loss.beta is True"),
        ("dpo", {"beta": math.nan}, r"loss.beta is nan"),
        ("dpo", {"label_smoothing": 0.5}, r"loss.label_smoothing is 0.5; 'dpo' takes a number >= 0 and < 0.5"),
        ("dpo", {"label_smoothing": -0.1}, r"loss.label_smoothing is -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            bind(name, options)


def test_borders_of_ranges() -> None:
    bind("dpo", {"beta": 1, "label_smoothing": 0})
    assert Range(at_least=0.0).allows(0.0)
    assert not Range(above=0.0).allows(0.0)
    assert not Range(below=1.0).allows(1.0)
    assert Range().allows(-1e9) and str(Range()) == "any finite number"


def test_unusual_values_are_allowed_and_named() -> None:
    assert unusual("dpo", {"beta": 0.1, "label_smoothing": 0.0}) == []
    assert unusual("dpo", {"beta": 0.03}) == unusual("dpo", {"beta": 0.5}) == []
    assert unusual("dpo", {"beta": 5.0}) == ["loss.beta is 5; usual for 'dpo' is 0.03 to 0.5"]
    assert unusual("dpo", {"beta": 0.001})
    assert unusual("dpo", {"label_smoothing": 0.45})
    assert Range().is_usual(0.0)


def test_the_dry_call_shows_a_broken_loss_before_a_model_loads(registry: dict[str, object]) -> None:
    @pair_loss("broken")
    def broken(chosen: Tensor, rejected: Tensor, *, power: float = 1.0) -> Tensor:
        return (chosen - rejected).reshape(2, 3) * power

    with pytest.raises(RuntimeError, match="shape"):
        bind("broken", {})
