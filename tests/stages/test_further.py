"""`also:` in a stage of kind `rl`: further scorers of every kind, what they write, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small

import kilter
from kilter.config import AlsoReward, RlStage, parse
from kilter.errors import CheckError, ConfigError
from kilter.rundir import read_jsonl
from kilter.stages import plan
from kilter.stages.context import Context
from kilter.stages.further import further_scorers
from kilter.stages.inputs import fingerprints
from kilter.stages.progress import Watch

BASE = "kilter.world:MODEL_PATH"


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "short.yaml"
    path.write_text("rules:\n  - {rule: length, longest: 4, ramp: 8}\n")
    return path


def rl(**changes: Any) -> dict[str, Any]:
    given = {"model": BASE, "reward": "kilter.world:true_reward", "rollouts": 2, "snapshots": 0}
    return {**small.RL, **given, **changes}


def test_every_kind_of_scorer_pays_beside_the_reward(sheet: Path, tmp_path: Path) -> None:
    also = [
        {"reward": "reward", "weight": 0.5},
        {"reward": str(sheet), "at_least": 0.9, "multiplier": 0.2},
        {"reward": "kilter.world:true_reward", "at_most": 0.1, "name": "not too good"},
    ]
    stages = {name: small.recipe()["stages"][name] for name in ("sft", "preferences", "reward")}
    stages["rl"] = rl(model="sft", also=also)
    run = kilter.align({"stages": stages}, out=tmp_path / "run")
    rows = [row for row in read_jsonl(run.path / "stages" / "04-rl" / "metrics.jsonl") if "rollout/score" in row]
    assert len(rows) == 2
    for row in rows:
        assert {"rollout/score/reward", "rollout/score/reward_sem", "rollout/score/short"} <= row.keys()
        assert row["rollout/score/not too good"] == pytest.approx(row["rollout/score"])
        assert row["rollout/multiplier/short"] >= 0 and "rollout/multiplier/reward" not in row
        excess = 0.9 - row["rollout/score/short"]
        assert row["rollout/multiplier/short"] > 0.2 if excess > 0 else row["rollout/multiplier/short"] < 0.2
    heeding = parse({"stages": stages | {"rl": rl(model="sft", also=also, audit="heed")}}, "r")
    stage = heeding.stages["rl"]
    assert isinstance(stage, RlStage)
    with Watch() as watch, pytest.raises(CheckError, match=r"stages\.rl\.also \(reward\): .*failed its audit"):
        further_scorers(Context(heeding, run, "rl", watch), stage, None)


def test_a_run_knows_the_files_of_its_further_scorers(sheet: Path) -> None:
    made = parse({"stages": {"a": rl(also=[{"reward": str(sheet), "weight": 1}])}}, "r")
    assert str(sheet) in fingerprints(made)


def test_what_figures_call_a_scorer() -> None:
    names = {
        value: AlsoReward(reward=value, weight=1).label
        for value in ("harm", "runs/harm/", "sheets/harm.v2.yaml", "mine.rewards:harm")
    }
    assert list(names.values()) == ["harm", "harm", "harm.v2", "harm"]
    assert AlsoReward(reward="runs/a/result", weight=1, name="harm").label == "harm"


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ({}, r"one of weight, at_least and at_most, and here is none of them"),
        ({"weight": 1, "at_most": 0}, r"here is weight and at_most"),
        ({"weight": 0}, r"weight is 0, and a reward that counts for nothing"),
        ({"weight": 1, "damping": 0.5}, r"damping is for a constraint"),
        ({"at_most": 0, "name": "a/b"}, r"name is 'a/b'"),
        ({"at_mots": 0}, r"did you mean 'at_most'"),
        ({"weight": 1, "combine": {"how": "min"}}, r"also\[0\]\.combine is for the heads of a reward model"),
        ({"reward": "later", "weight": 1}, r"also\[0\]\.reward is 'later', which is not an earlier stage"),
        ({"reward": "none.yaml", "weight": 1}, r"also\[0\]\.reward: .*none\.yaml: no such file"),
    ],
)
def test_a_wrong_entry_is_refused_before_any_work(also: dict[str, Any], message: str, tmp_path: Path) -> None:
    stages = {"a": rl(also=[{"reward": "kilter.world:true_reward", **also}]), "later": rl()}
    with pytest.raises(ConfigError, match=message):
        kilter.align({"stages": stages}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_of_one_name_are_refused() -> None:
    also = [{"reward": "a/harm", "weight": 1}, {"reward": "b/harm", "weight": 1}]
    with pytest.raises(ConfigError, match=r"two of `also` are called 'harm': give each a `name`"):
        parse({"stages": {"a": rl(also=also)}}, "r")


@pytest.mark.parametrize(
    ("bound", "message"),
    [({"at_most": 1.0}, "always kept"), ({"at_most": -0.1}, "never kept"), ({"at_least": 0.0}, "always kept")],
)
def test_a_bound_that_says_nothing_is_refused(
    bound: dict[str, float], message: str, sheet: Path, tmp_path: Path
) -> None:
    stage = rl(also=[{"reward": str(sheet), **bound}])
    with pytest.raises(ConfigError, match=rf"stages\.a\.also \(short\): .* gives 0 to 1: the bound is {message}"):
        kilter.align({"stages": {"a": stage}}, out=tmp_path / "run")


def test_a_dry_run_counts_further_reward_models(tmp_path: Path) -> None:
    with_model = tmp_path / "with_model.yaml"
    with_model.write_text(f"rules:\n  - {{model: {kilter.world.MODEL_PATH}}}\n  - {{rule: length, longest: 4}}\n")
    also = [{"reward": str(with_model), "weight": 1}, {"reward": BASE, "weight": 1, "name": "f"}]
    alone, more = (plan(parse({"stages": {"a": rl(also=given)}}, "r")) for given in ([], also))
    assert "further" not in alone
    assert "; 1 further reward model, as large as the policy: " in more
    figures = [
        float(text.split("resident in this stage: ")[1].split(" GiB")[0].split(": ")[-1]) for text in (alone, more)
    ]
    assert figures[1] > figures[0]
