"""`reward: rules.yaml` in every stage that takes a reward, what it writes, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small

import kilter
from kilter import data, world
from kilter.cli import main
from kilter.config import parse
from kilter.errors import CheckError, ConfigError
from kilter.records import PreferencePair, Prompt
from kilter.rundir import read_jsonl
from kilter.scorers import load_rules
from kilter.stages.inputs import fingerprints

BASE = "kilter.world:MODEL_PATH"
SHEET = """rules:
  - {rule: exact, how: contains, key: word, name: says it}
  - {rule: length, longest: 4, ramp: 8, weight: 0.5}
"""


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(SHEET)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The town's questions in a plain layout; the reference stands in the user's own column."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": one.prompt[-1].content, "truth": {"word": "not" if at % 2 else "is"}}
        for at, one in enumerate(world.prompts(split="train", per_kind=4))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rl(sheet: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    given = {"model": BASE, "reward": str(sheet), "prompts": str(prompts), "rollouts": 2, "snapshots": 0}
    return {**small.RL, **given, **changes}


def online(sheet: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    values = dict(small.recipe()["stages"]["online"]) | {"model": BASE, "reward": str(sheet), "prompts": str(prompts)}
    return values | {"sync_every": 0, "snapshots": 0, "probe": {"prompts": 0}} | changes


def test_a_sheet_pays_in_every_stage_that_takes_a_reward(sheet: Path, prompts: Path, tmp_path: Path) -> None:
    longer = {"rounds": 16, "prompts_per_round": 16, "sampling": {"max_new_tokens": 24}}
    optim = {**small.OPTIM, "batch_size": 16, "learning_rate": 1e-3}
    evaluation = {
        "stage": "eval",
        "models": {"base": BASE, "best": "best", "online": "online"},
        "reference": BASE,
        "reward": str(sheet),
        "prompts": str(prompts),
        "sampling": {"max_new_tokens": 24},
        "curve_prompts": 4,
        "slider_prompts": 1,
    }
    stages = {
        "ppo": rl(sheet, prompts),
        "online": online(sheet, prompts, **longer, optim=optim),
        "best": {"stage": "best_of_n", "model": BASE, "reward": str(sheet), "num_samples": 8},
        "evaluation": evaluation,
    }
    run = kilter.align({"stages": stages}, out=tmp_path / "run")
    rows = read_jsonl(run.path / "stages" / "01-ppo" / "metrics.jsonl")
    assert all(row["rollout/unscored"] == 0 for row in rows if "rollout/unscored" in row)
    rows = read_jsonl(run.path / "stages" / "02-online" / "metrics.jsonl")
    assert rows[-1]["rollout/score"] > rows[0]["rollout/score"] + 0.2
    figures = json.loads((run.path / "summary.json").read_text())["models"]
    proxy = {name: figures[name]["proxy_reward"] for name in ("base", "best", "online")}
    assert proxy["best"]["mean"] > proxy["base"]["mean"] + 0.2
    assert proxy["online"]["mean"] > proxy["base"]["mean"] + 0.2
    curve = [row for row in read_jsonl(run.path / "evaluation" / "curve.jsonl") if row["method"] == "best"]
    [first, *_, last] = [row["proxy_reward"]["mean"] for row in curve]
    assert [row["step"] for row in curve] == [1, 2, 4, 8] and last > first > 0
    [answer, *_] = read_jsonl(run.path / "evaluation" / "base.jsonl")
    truths = {one.prompt[-1].content: one.truth for one in data.read(str(prompts), record="prompt").records}
    said = truths[answer["prompt"][-1]["content"]]["word"] in answer["text"].lower().replace(".", " ").split()
    assert (answer["proxy_reward"] >= 1) == said


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_answers_to_one_prompt_are_compared_without_a_critic(
    algorithm: str, sheet: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = rl(sheet, prompts, algorithm=algorithm, num_samples=4, policy={"kl_coef": 0.1})
    run = kilter.align({"stages": {"a": stage}}, out=tmp_path / "run")
    rows = read_jsonl(run.path / "stages" / "01-a" / "metrics.jsonl")
    assert {row["rollout/samples"] for row in rows if "rollout/samples" in row} == {4.0 * stage["prompts_per_rollout"]}
    assert not any("values/mean" in row for row in rows)
    assert any("policy/ref_kl" in row for row in rows) == (algorithm == "grpo")
    capsys.readouterr()
    words = ["--model", str(BASE), "--reward", str(sheet), "--prompts", str(prompts), "--out", str(tmp_path / "dry")]
    assert main(["rl", "--algorithm", algorithm, *words, "--dry-run"]) == 0
    assert "two models: policy, reference: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "grpo", "policy": {"vf_coef": 0.1}}, r"policy\.vf_coef is 0\.1, but grpo has no critic"),
        ({"algorithm": "raft", "policy": {"clip_range": 0.2}}, "'reinforce' clips nothing"),
        ({"sampling": {"min_p": 0.1}}, r"min_p 0\.1 .* set temperature 1"),
        ({"prompts_per_rollout": 1}, r"prompts_per_rollout is 1 and policy\.minibatches is 2"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_before_any_work(
    changes: dict[str, Any], message: str, sheet: Path, prompts: Path, tmp_path: Path
) -> None:
    stages = {"first": rl(sheet, prompts), "then": rl(sheet, prompts, **changes)}
    with pytest.raises(ConfigError, match=rf"stages\.then: .*{message}"):
        kilter.align({"stages": stages}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [rl, online])
def test_a_wrong_sheet_is_refused_before_any_work(make: Any, sheet: Path, prompts: Path, tmp_path: Path) -> None:
    sheet.write_text(SHEET.replace("longest: 4", "longest: 4, rump: 3"))
    with pytest.raises(ConfigError, match=r"stages\.a\.reward: .*rules\.yaml: rules\[1\] \(length\): .*did you mean"):
        kilter.align({"stages": {"a": make(sheet, prompts)}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["rl"], ["prefer", "--online"]])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_the_command_line_says_so_in_one_line(
    command: list[str], more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command, "--model", BASE, "--prompts", "p.jsonl", "--reward", str(tmp_path / "none.yaml"), *more]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none.yaml: no such file" in error and not (tmp_path / "run").exists()


def test_a_sheet_and_its_models_are_inputs_of_the_run(sheet: Path, prompts: Path, tmp_path: Path) -> None:
    recipe = parse({"stages": {"a": rl(sheet, prompts)}}, "r")
    before = fingerprints(recipe)
    sheet.write_text(SHEET + f"  - {{model: {world.MODEL_PATH}, weight: 0.5}}\n")
    after = fingerprints(recipe)
    assert before[str(sheet)] != after[str(sheet)]
    assert set(after) - set(before) == {str(world.MODEL_PATH)}


def test_held_out_pairs_are_read_with_the_truth_of_the_prompts(sheet: Path, prompts: Path, tmp_path: Path) -> None:
    known: list[Prompt] = list(data.read(str(prompts), record="prompt").records)  # type: ignore[arg-type]
    good = [
        PreferencePair(prompt=one.prompt, chosen=f"It {one.truth['word']} so.", rejected="Yes.") for one in known[:9]
    ]
    turned = [PreferencePair(prompt=one.prompt, chosen=one.rejected, rejected=one.chosen) for one in good]
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("good", "turned")}
    data.write(paths["good"], good)
    data.write(paths["turned"], turned)
    run = kilter.align({"stages": {"a": rl(sheet, prompts, pairs=str(paths["good"]))}}, out=tmp_path / "run")
    done = json.loads((run.path / "stages" / "01-a" / "done.json").read_text())
    assert done["reward_accuracy"]["mean"] == 1 and done["reward_accuracy"]["n"] == 9
    with pytest.raises(CheckError, match=r"rules\.yaml: prefers the better answer on 0\.0% of 9 .* turned round"):
        kilter.align({"stages": {"a": rl(sheet, prompts, pairs=str(paths["turned"]))}}, out=tmp_path / "other")


def test_a_function_may_be_what_an_evaluation_scores_by(prompts: Path, tmp_path: Path) -> None:
    values = {"stage": "eval", "models": {"base": BASE}, "reference": BASE, "prompts": str(prompts)}
    more = {"reward": "test_rule_sheets:lengths", "sampling": {"max_new_tokens": 6}, "curve_prompts": 2}
    run = kilter.align({"stages": {"a": values | more}}, out=tmp_path / "run")
    answers = read_jsonl(run.path / "evaluation" / "base.jsonl")
    assert [one["proxy_reward"] for one in answers] == [len(one["text"]) for one in answers]


def lengths(samples: Any) -> list[float]:
    return [float(len(sample.text)) for sample in samples]


def test_gsm8k_is_verified_as_it_lies_there(shared_data: Path) -> None:
    """Questions read as prompts carry their own solution as truth."""
    path = str(shared_data / "gsm8k" / "test.jsonl.gz")
    prompts: list[Any] = list(data.read(path, record="prompt").records)
    solutions: list[Any] = list(data.read(path, record="demonstration").records)
    scorer = load_rules({"rules": [{"rule": "number", "find": "marker"}]})
    samples = [
        kilter.records.Sample(one.prompt, solution.messages[-1].content, truth=one.truth)
        for one, solution in zip(prompts, solutions, strict=True)
    ]
    assert [score.value for score in scorer.score(samples)] == [1.0] * 1319
