"""The slider's answers: which prompts, which shades, and model text made harmless to a reader's eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kilter.report.answers import before_after, choose_prompts, read_slider, shorten, turns_of, visible
from kilter.report.curve import read_curves
from kilter.report.files import RunFiles


def row(method: str, step: int, kl: float, prompt: str = "a", **more: Any) -> dict[str, Any]:
    tokens = [{"text": "yes", "value": 1.0, "kl": 0.5}]
    return {
        "method": method,
        "step": step,
        "kl": kl,
        "prompt_id": prompt,
        "prompt": [],
        "text": "yes",
        "tokens": tokens,
    } | more


def slider_of(*rows: dict[str, Any], curve: list[dict[str, Any]] | None = None) -> Any:
    run = RunFiles(Path("run"), answers=list(rows), curve=curve or [])
    return read_slider(run, read_curves(run))


def test_what_reorders_or_hides_text_is_written_out() -> None:
    assert visible("a\u202eb\u200bc\x1b[0m\ud800\r") == "a⟨U+202E⟩b⟨U+200B⟩c⟨U+001B⟩[0m⟨U+D800⟩⟨U+000D⟩"
    assert visible("línea\n\tשלום 👩\u200d🌾") == "línea\n\tשלום 👩\u200d🌾"  # a joiner inside an emoji stays
    assert (visible(None), visible(3), visible(["x"])) == ("", "3", "")
    assert shorten("abcdef", 4) == "abcd … [2 more characters]"


def test_prompts_are_those_at_most_points_and_of_different_kinds() -> None:
    rows = [
        row("ppo", 1, 1, key, kind=kind) for key, kind in (("a", "fact"), ("b", "fact"), ("c", "sum"), ("d", "harm"))
    ]
    assert choose_prompts(rows) == ["a", "c", "d"]
    assert choose_prompts([*rows, *(row("ppo", s, 1, "b", kind="fact") for s in (2, 3))]) == ["b", "c", "d"]
    assert choose_prompts([row("ppo", 1, 1, key, kind="") for key in "abcd"]) == ["a", "b", "c"]


def test_panels_follow_the_steps_of_each_method_and_sft_stands_before() -> None:
    slider = slider_of(row("sft", 0, 0, text="before"), row("ppo", 20, 4), row("ppo", 10, 1), row("dpo", 5, 2))
    assert [(p.method, p.step, p.x) for p in slider.panels] == [
        ("dpo", 5, pytest.approx(2**0.5)),
        ("ppo", 10, 1),
        ("ppo", 20, 2),
    ]
    assert slider.before["a"].text == "before"
    assert slider.methods == ["dpo", "ppo"]


def test_two_seeds_do_not_answer_for_each_other() -> None:
    slider = slider_of(row("ppo", 1, 1, seed=1, text="one"), row("ppo", 1, 1, seed=0, text="zero"))
    assert [answer.text for answer in slider.panels[0].answers] == ["zero"]


def test_the_slider_begins_at_the_true_peak_without_kl() -> None:
    points = [("ppo_without_kl", step, kl) for step, kl in ((1, 0.0), (2, 4.0), (3, 49.0))]
    curve = [
        {"method": m, "step": s, "kl": {"mean": kl}, "true_reward": {"mean": {1: 0.4, 2: 0.6, 3: -1}[s]}}
        for m, s, kl in points
    ]
    slider = slider_of(*(row(m, s, kl) for m, s, kl in points), row("ppo", 1, 1), curve=curve)
    assert (slider.first.method, slider.first.step) == ("ppo_without_kl", 2)


def test_shades_run_from_worst_to_best_around_sft() -> None:
    def tokens(*values: float | None) -> list[dict[str, Any]]:
        return [{"text": "t", "value": value, "kl": None if value is None else abs(value)} for value in values]

    slider = slider_of(
        row("sft", 0, 0, tokens=tokens(1.0, 1.0)), row("ppo", 1, 1, tokens=tokens(1.0, 3.0, -1.0, 2.0, None))
    )
    assert (slider.shading.middle, slider.shading.reach, slider.shading.most) == (1.0, 2.0, 3.0)
    shades = [(token.reward, token.kl) for token in slider.panels[0].answers[0].tokens]
    assert shades == [(0, 2), (5, 5), (-5, 2), (2, 3), (None, None)]
    assert slider.panels[0].answers[0].tokens[2].told == "reward −1.00, KL 1.00"


def test_a_log_ratio_below_zero_has_no_shade() -> None:
    slider = slider_of(row("ppo", 1, 1, tokens=[{"text": "a", "kl": -2.0}, {"text": "b", "kl": 1.0}]))
    assert [token.kl for token in slider.panels[0].answers[0].tokens] == [0, 5]


def test_before_and_after_takes_the_first_prompt_of_a_kind_that_all_models_answered() -> None:
    def said(key: str, text: str, **more: Any) -> dict[str, Any]:
        return {"prompt_id": key, "kind": "fact", "prompt": [{"role": "user", "content": key}], "text": text} | more

    run = RunFiles(Path("run"))
    run.evaluated.update(
        sft=[said("only", "x"), said("both", "old"), said("later", "z")],
        ppo=[said("both", "new", finished=False), said("later", "w")],
    )
    (pair,) = before_after(run, ["sft", "ppo"])
    assert [(item.model, item.text, item.finished) for item in pair.said] == [
        ("sft", "old", True),
        ("ppo", "new", False),
    ]
    assert pair.turns[0].text == "both"


def test_turns_of_any_prompt() -> None:
    assert [turn.text for turn in turns_of("plain")] == ["plain"]
    assert turns_of([{"role": 3}, "x", {"content": None}])[0].role == "3"
    assert turns_of(None) == ()
