"""The guard of a stage: what it adds to a rollout's figures, what it keeps, when it goes back, and when it stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kilter.config import DataRef, GuardConfig, PolicyConfig, RlStage, parse, stage_inputs
from kilter.errors import CheckError, ConfigError
from kilter.guard import ALARMS
from kilter.models.generation import Completion
from kilter.records import Message, Prompt, Sample, Score, prompt_id
from kilter.rollout.collect import Rollout
from kilter.rollout.source import Scored, Verdict
from kilter.stages.context import TRAINED_ON
from kilter.stages.guard import Guard, check_guard, seen_by_reward
from kilter.stages.inputs import fingerprints
from kilter.stages.scoring import check_rewards

PROMPT = Prompt(prompt=(Message("user", "Hm?"),))
DONE = Completion((1,), (2,), (0.0,), finished=True)


def passes(prompt: Prompt, text: str) -> bool:
    return prompt is PROMPT and text.startswith("good")


def probe(samples: Sequence[Sample]) -> list[Score]:
    """The number at the end of the text; of none, nothing is said."""
    ends = [sample.text.split()[-1] for sample in samples]
    return [Score(None, reason="no number") if end == "none" else Score(float(end)) for end in ends]


class Said:
    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self.name = "ppo"
        self.watch = SimpleNamespace(say=self.lines.append)
        self.folder = SimpleNamespace(path=folder)
        self.recipe = SimpleNamespace(stages={})

    def function(self, _place: str, ref: DataRef) -> Any:
        return {"a:passes": passes}[ref.path]


def guard(folder: Path, weight: torch.Tensor, **config: Any) -> Guard:
    path = DataRef(path="somewhere")
    stage = RlStage(model="sft", reward="reward", prompts=path, guard=GuardConfig(**config))
    return Guard(Said(folder), stage, [weight])  # type: ignore[arg-type]


def answers(texts: Sequence[str], scores: Sequence[float] | None = None) -> Scored:
    paid = scores or [float(at) for at in range(len(texts))]
    return [[(Rollout(PROMPT, DONE, text), Score(score)) for text, score in zip(texts, paid, strict=True)]]


def of(good: int, bad: int) -> Scored:
    return answers(["good"] * good + ["bad"] * bad)


def failing(folder: Path, weight: torch.Tensor, patience: int) -> Guard:
    given = {"passing": DataRef(path="a:passes"), "least_passing": 0.5, "actions": {"failing": "roll_back"}}
    return guard(folder, weight, patience=patience, **given)


def test_a_policy_that_stumbles_goes_on_from_the_last_good_one(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    found = failing(tmp_path, weight, 2)
    for good, again, kept in ((4, False, 0), (1, True, 0), (2, False, 1), (0, True, 1)):
        assert found(of(good, 4 - good), {}) == Verdict(again=again)
        assert weight.tolist() == [kept]
        weight.add_(1)
    stop = found(of(1, 3), {}).stop
    assert stop == "the guard saw failing, 2 times without a better policy"
    assert found.restore() and weight.tolist() == [1]  # that of the third rollout


def test_a_run_that_ends_after_a_bad_rollout_goes_back_too(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    found = failing(tmp_path, weight, 3)
    found(of(4, 0), {})
    weight.add_(1)
    assert not found.restore() and weight.tolist() == [1]  # the last rollout was good: nothing to undo
    assert found(of(0, 4), {}) == Verdict(again=True)
    weight.add_(1)  # what was learned since, nobody has judged
    assert found.restore() and weight.tolist() == [0]


def test_a_policy_that_never_was_good_stays(tmp_path: Path) -> None:
    weight = torch.ones(1)
    found = failing(tmp_path, weight, 2)
    assert found(of(0, 4), {}) == Verdict()  # no other answers to be had
    assert found(of(0, 4), {}).stop is not None
    assert not found.restore() and weight.tolist() == [1]


def test_kept_is_the_best_by_the_probe_and_stop_ends_at_once(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    config = {"probe": "test_guard:probe", "actions": {"longer": "stop"}, "thresholds": {"longer": 0.5, "phrase": 2.0}}
    found = guard(tmp_path, weight, **config)
    stops = []
    for value, length in ((0.1, 4.0), (0.9, 4.0), (0.5, 4.0), (0.2, 8.0), (0.2, 8.0)):
        figures = {"rollout/length": length}
        stops.append(found(answers([f"x {value}", f"y {value}"]), figures).stop)
        assert figures["rollout/probe"] == pytest.approx(value)
        weight.add_(1)
    assert stops == [None, None, None, None, "the guard saw longer"]
    assert found.restore() and weight.tolist() == [1]  # of the second rollout, whose probe was 0.9
    told = [json.loads(line) for line in (tmp_path / ALARMS).read_text().splitlines()]
    assert [(one["symptom"], one["rollout"], one["action"]) for one in told] == [("longer", 4, "stop")]


def test_a_phrase_that_spreads_is_named(tmp_path: Path) -> None:
    found = guard(tmp_path, torch.zeros(1))
    plain = ["the duck is blue", "ask the baker", "no idea at all", "on oak street"]
    said = [f"{text}, my dear friend" for text in plain]
    for texts in (plain, said, said):
        figures: dict[str, float] = {}
        assert found(answers(texts), figures) == Verdict()  # it only warns
    assert figures["rollout/phrase"] == 1.0 and figures["rollout/tied"] == 0.0
    assert [(one["symptom"], one["phrase"]) for one in found.alarms] == [("phrase", "my dear friend")]
    assert '"my dear friend"' in found.alarms[0]["says"]


def test_the_price_of_kl_rises_for_as_long_as_it_is_needed(tmp_path: Path) -> None:
    found = guard(tmp_path, torch.zeros(1), actions={"kl_explodes": "raise_kl"}, kl_factor=2.0)
    factors = [
        found(of(4, 0), {"rollout/kl_k1": kl, "rollout/length": 10.0}).raise_kl for kl in (0.0, 15.0, 15.0, 15.0, 1.0)
    ]
    assert factors == [1.0, 1.0, 2.0, 2.0, 1.0]


def test_what_shows_before_the_first_update_is_refused(tmp_path: Path) -> None:
    alike = answers(["good one", "bad one"], [1.0, 1.0])
    with pytest.raises(CheckError, match=r"no_signal: all answers .* likely: the reward gives one number"):
        guard(tmp_path, torch.zeros(1))(alike, {})
    for config in ({"action": "off"}, {"actions": {"no_signal": "warn"}}):
        assert guard(tmp_path, torch.zeros(1), **config)(alike, {}) == Verdict()
    turned = [f"good {score}" for score in range(20)]
    with pytest.raises(CheckError, match="against_probe: reward and probe disagree"):
        guard(tmp_path, torch.zeros(1), probe="test_guard:probe")(
            answers(turned, [-float(score) for score in range(20)]), {}
        )


def test_a_probe_that_scores_too_few_answers_refuses_nothing(tmp_path: Path) -> None:
    """Of 200 answers it scores four, and those the other way round than the reward."""
    texts = [f"good {score}" if score < 4 else "good none" for score in range(200)]
    figures = {"rollout/samples": 200.0}
    judge = guard(tmp_path, torch.zeros(1), probe="test_guard:probe")
    assert judge(answers(texts, [-float(score) for score in range(200)]), figures) == Verdict()
    assert figures["rollout/probe_samples"] == 4 and figures["rollout/probe_correlation"] == pytest.approx(-1)


@pytest.mark.parametrize("bad", [0, 1])
def test_goes_on_after_a_kill_where_it_was(tmp_path: Path, bad: int) -> None:
    weight = torch.zeros(1)
    found = failing(tmp_path, weight, 2)
    for good in (4, 0)[: bad + 1]:
        found.step({"policy/clip_fraction": 0.9})
        found(of(good, 4 - good), {})
        weight.add_(1)
    found.step({"policy/clip_fraction": 0.9})
    resumed = failing(tmp_path, weight, 2)
    resumed.load_state_dict(found.state_dict())
    ends = [one(of(0, 4), {}) for one in (found, resumed)]
    assert ends[0] == ends[1] and (ends[0].stop is None) == (bad == 0)
    assert resumed.restore() and weight.tolist() == [0]
    assert resumed.alarms == found.alarms


def test_prompts_that_the_reward_model_learned_from_are_counted(tmp_path: Path) -> None:
    told = Said(tmp_path)
    prompts = [PROMPT, Prompt(prompt=(Message("user", "Another"),))]
    (tmp_path / "rules.yaml").write_text(f"rules: [{{model: '{tmp_path}'}}, {{rule: number, key: value}}]")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other").mkdir()
    folder, sheet, other = (str(tmp_path / name) for name in (".", "rules.yaml", "other"))
    nothing = [folder, sheet, other, "kilter.world:truth"]
    assert seen_by_reward(told, nothing, prompts) is None  # type: ignore[arg-type]
    (tmp_path / TRAINED_ON).write_text(json.dumps({"prompt_id": prompt_id(PROMPT.prompt)}) + "\n")
    assert seen_by_reward(told, [folder], prompts[1:]) == 0.0 and not told.lines  # type: ignore[arg-type]
    assert seen_by_reward(told, [other], prompts) is None  # type: ignore[arg-type]
    for rewards in ([folder], [sheet], ["kilter.world:truth", folder]):
        told.lines.clear()
        assert seen_by_reward(told, rewards, prompts) == 0.5  # type: ignore[arg-type]
        assert len(told.lines) == 1 and "50% of the prompts are among those" in told.lines[0]
    (tmp_path / "other" / TRAINED_ON).write_text(json.dumps({"prompt_id": prompt_id(prompts[1].prompt)}) + "\n")
    assert seen_by_reward(told, [folder, other], prompts) == 1.0  # type: ignore[arg-type]


def test_refuses_before_any_work_what_it_could_not_do() -> None:
    price = PolicyConfig(kl_coef=0.1, kl_in="reward")
    check_guard(GuardConfig(action="raise_kl"), price)
    check_guard(GuardConfig(action="raise_kl"), changed(price, kl_in="loss"))
    with pytest.raises(ConfigError, match=r"policy\.kl_coef is 0, which no factor raises"):
        check_guard(GuardConfig(actions={"longer": "raise_kl"}), changed(price, kl_coef=0.0))
    with pytest.raises(ConfigError, match=r"guard.thresholds names 'lonfer'; did you mean 'longer'"):
        check_guard(GuardConfig(thresholds={"lonfer": 1.0}), price)
    with pytest.raises(ConfigError, match="give both, or neither"):
        check_guard(GuardConfig(least_passing=0.5), price)


def changed(config: PolicyConfig, **changes: Any) -> PolicyConfig:
    return config.model_copy(update=changes)


def test_probe_and_passing_are_inputs_of_the_stage(tmp_path: Path) -> None:
    """They are waited for, hashed, and refused before any work like whatever else a stage reads."""
    guard_of = {"probe": "gold", "passing": "kilter.world:is_sentences", "least_passing": 0.5}
    stage = {"stage": "rl", "model": "m", "reward": "r", "prompts": "p.jsonl", "guard": guard_of}
    read = parse({"stages": {"a": stage}}, "r")
    inputs = stage_inputs(read.stages["a"])
    assert inputs[-2:] == [("guard.probe", "gold"), ("guard.passing", "kilter.world:is_sentences")]
    with pytest.raises(ConfigError, match=r"stages\.a\.guard\.probe is 'b', which is not an earlier stage"):
        parse({"stages": {"a": stage | {"guard": {"probe": "b"}}, "b": stage}}, "r")
    sheet = tmp_path / "gold.yaml"
    sheet.write_text("rules:\n  - {rule: no_such}\n")
    with pytest.raises(ConfigError, match=r"stages\.a\.guard\.probe: .*no_such"):
        check_rewards(parse({"stages": {"a": stage | {"guard": {"probe": str(sheet)}}}}, "r"))
    sheet.write_text("rules:\n  - {rule: ending}\n")
    assert str(sheet) in fingerprints(parse({"stages": {"a": stage | {"guard": {"probe": str(sheet)}}}}, "r"))
