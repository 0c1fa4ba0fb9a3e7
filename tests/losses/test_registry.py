"""A loss's signature is its schema: what it takes, what may be set, and what is refused before any model loads."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from kilter.losses import (
    PAIR_INPUTS,
    PAIR_LOSSES,
    RANKED_INPUTS,
    RANKED_LOSSES,
    REWARD_INPUTS,
    REWARD_LOSSES,
    UNPAIRED_INPUTS,
    UNPAIRED_LOSSES,
    PreferenceLoss,
    Range,
    all_losses,
    bind,
    pair_loss,
    ranked_loss,
    unpaired_loss,
    unusual,
)

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

    @unpaired_loss("plain")
    def thumbs(logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, *, beta: Weight = 0.5) -> Tensor:
        return desirable * (1 - torch.sigmoid(beta * (logps - ref_logps - kl)))

    assert table["plain"].inputs == ("logps", "ref_logps", "desirable", "kl")
    assert table["plain"].needs_reference
    assert not table["plain"].length_normalized
    assert bind("plain", {"beta": 2.0})(*torch.tensor([[-1.0], [-1.0], [1.0], [0.0]])).item() == 0.5
    assert unusual("plain", {"beta": 2.0}) == ["loss.beta is 2; usual for 'plain' is 0 to 1"]
    for wrong, message in (({"beta": -1.0}, "loss.beta is -1.0"), ({"gamma": 1.0}, "it takes beta")):
        with pytest.raises(ValueError, match=message):
            bind("plain", wrong)
    with pytest.raises(ValueError, match="'plain' is registered twice"):
        pair_loss("plain")(lambda chosen: chosen)
    with pytest.raises(ValueError, match="'dpo' is registered twice"):
        unpaired_loss("dpo")(lambda logps: logps)
    with pytest.raises(ValueError, match="asks for chosen; there is logps"):
        unpaired_loss("odd")(lambda chosen: chosen)


@pytest.mark.parametrize(
    ("table", "order"),
    [
        (PAIR_LOSSES, PAIR_INPUTS),
        (UNPAIRED_LOSSES, UNPAIRED_INPUTS),
        (RANKED_LOSSES, RANKED_INPUTS),
        (REWARD_LOSSES, REWARD_INPUTS),
    ],
    ids=["pair", "unpaired", "ranked", "reward"],
)
def test_inputs_stand_in_one_order(table: dict[str, PreferenceLoss], order: dict[str, str]) -> None:
    """Who calls a loss by hand can rely on it; `bind` hands inputs over in the order of the signature."""
    for name, loss in table.items():
        assert loss.inputs == tuple(key for key in order if key in loss.inputs), name


def test_units_and_lengths() -> None:
    assert {loss.unit for name, loss in PAIR_LOSSES.items() if name != "nll"} == {"pairs"}
    assert PAIR_LOSSES["nll"].unit == "chosen_tokens"
    assert {loss.unit for loss in (UNPAIRED_LOSSES | RANKED_LOSSES).values()} == {"prompts"}
    by_length = {name for name, loss in all_losses().items() if loss.length_normalized}
    assert by_length == {"ipo", "dpo_norm", "orpo", "simpo", "alphapo", "tpo_l"}
    free = {name for name, loss in PAIR_LOSSES.items() if not loss.needs_reference}
    assert free == {"nll", "orpo", "simpo", "alphapo", "cpo"}


def test_what_is_wrong_is_named() -> None:
    for name, options, message in (
        ("dop", {}, r"loss.name is 'dop'; did you mean 'dpo'\? choose one of alphapo, .*wpo"),
        ("dpo", {"betta": 0.1}, r"loss.betta: 'dpo' has no such option; did you mean 'beta'\? it takes beta, label"),
        ("dpo", {"x": 0.1}, r"loss.x: 'dpo' has no such option; it takes beta, label_smoothing"),
        ("xyzzy", {}, r"loss.name is 'xyzzy'; choose one of alphapo, "),
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


def test_a_loss_over_rankings_is_one_function_too(registry: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilter.losses.registry.RANKED_LOSSES", table := {})

    @ranked_loss("listwise", length_normalized=True)
    def listwise(logps: Tensor, group: Tensor, rank: Tensor, *, beta: Weight = 0.5) -> Tensor:
        return beta * logps * rank + group

    loss = table["listwise"]
    assert (loss.unit, loss.length_normalized, loss.needs_reference) == ("prompts", True, False)
    assert bind("listwise", {"beta": 2.0})(torch.tensor([-1.0]), torch.tensor([3]), torch.tensor([2.0])).item() == -1
    with pytest.raises(ValueError, match="'listwise' is registered twice"):
        pair_loss("listwise")(lambda chosen: chosen)
    with pytest.raises(ValueError, match="asks for chosen; there is logps, ref_logps, group"):
        ranked_loss("odd")(lambda chosen: chosen)
