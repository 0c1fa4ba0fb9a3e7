"""A stage whose answers vLLM draws; and one that asks for it where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small

import kilter
from kilter.errors import CheckError, ConfigError, ModelError
from kilter.models.vllm_sampler import has_vllm
from kilter.rundir import read_jsonl

RL = {key: value for key, value in small.RL.items() if key not in ("audit", "snapshots")}
RL |= {"model": "kilter.world:MODEL_PATH", "reward": "kilter.world:true_reward", "rollouts": 3}
with_vllm = [
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def run(out: Path, **changes: Any) -> Path:
    stage = RL | changes | {"sampler": {"engine": "vllm", "dtype": "float32", **changes.get("sampler", {})}}
    return kilter.align({"threads": 1, "stages": {"rl": stage}}, out=out).path / "stages/01-rl"


def test_it_is_refused_before_any_work_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilter.stages.training.has_vllm", lambda: False)
    with pytest.raises(ModelError, match=r"stages\.rl\.sampler\.engine is vllm, and vLLM is not installed"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("stages/*"))


def test_a_server_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    stage = RL | {"sampler": {"engine": "vllm", "url": "http://127.0.0.1:9"}}
    with pytest.raises(ModelError, match=r"stages\.rl\.sampler\.url: no vLLM answers at http://127\.0\.0\.1:9"):
        kilter.align({"stages": {"rl": stage}}, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("stages/*"))


@pytest.mark.parametrize(
    ("stage", "sampler", "says"),
    [
        ("rl", {"url": "http://127.0.0.1:8000"}, "url is http://127.0.0.1:8000, but Kilter's own sampler"),
        ("rl", {"engine": "vllm", "url": "file:///x"}, "url"),
        ("rl", {"engine": "vllm", "url": "http://x", "memory": 0.5}, r"memory is 0\.5, but a server computes as"),
        ("rl", {"cap": 3.0}, r"cap is 3\.0, but Kilter's own sampler has no use for it"),
        ("rl", {"dtype": "float32"}, "dtype is float32, but"),
        ("online", {"engine": "vllm", "max_gap": 0.1}, r"sampler\.max_gap is 0\.1, but pairs are compared as they are"),
    ],
)
def test_options_that_nothing_reads_are_refused(stage: str, sampler: dict[str, Any], says: str) -> None:
    changed = small.recipe()["stages"]["ppo" if stage == "rl" else stage] | {"sampler": sampler}
    with pytest.raises(ConfigError, match=says):
        kilter.recipe({"stages": {"x": changed}})


@pytest.mark.parametrize("rank", [pytest.param(0, marks=with_vllm), pytest.param(4, marks=with_vllm)])
def test_vllm_samples_the_policy_as_it_learns(rank: int, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", algorithm="rloo", num_samples=2, lora={"rank": rank})
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "rollout/score" in row]
    assert len(rows) == 3
    assert all(row["rollout/sampler_gap_mean"] < 1e-4 and row["rollout/importance_cut"] == 0 for row in rows)
    assert rows[-1]["rollout/kl_exact"] > rows[0]["rollout/kl_exact"]


@pytest.mark.parametrize("gap", [pytest.param(1e-12, marks=with_vllm)])
def test_vllm_that_differs_is_refused(gap: float, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="it does not run this policy"):
        run(tmp_path / "run", sampler={"max_gap": gap})
