"""The whole loop at a small size: what it writes, that it goes on after a kill to the same bytes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import small
import transformers

import kilter
from kilter import data
from kilter.config import parse
from kilter.errors import CheckError, ConfigError, ModelError, RunError
from kilter.rundir import read_jsonl
from kilter.stages.inputs import fingerprints, folder_hash
from kilter.world import MODEL_PATH

METRICS = {
    "true_reward",
    "proxy_reward",
    "kl",
    "attack_success",
    "over_refusal",
    "hallucination",
    "abstention",
    "sycophancy",
    "length",
    "distinct",
    "win_rate_vs_sft",
}


def only(*names: str) -> dict[str, Any]:
    """The small recipe with these stages alone."""
    values = small.recipe()
    return values | {"stages": {name: values["stages"][name] for name in names}}


def weights(run: Path) -> dict[str, str]:
    """Hash of every result's weights, by the stage's name."""
    files = sorted(run.glob("stages/*/result/model.safetensors"))
    return {path.parts[-3][3:]: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_summary_has_every_figure_with_its_interval(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {"demonstrations", "base", "sft", "best_of_n", "ppo"} == set(summary["models"])
    for name, figures in summary["models"].items():
        assert set(figures) >= METRICS, (name, METRICS - set(figures))
        for figure in figures.values():
            assert figure is None or set(figure) == {"mean", "low", "high", "n"}
    assert summary["models"]["demonstrations"]["kl"] is None  # nobody knows it: not 0
    assert summary["models"]["sft"]["win_rate_vs_sft"]["mean"] == 0.5
    assert abs(summary["models"]["sft"]["kl"]["mean"]) < 1e-4
    assert summary["models"]["base"]["true_reward"]["n"] == 33
    assert summary["reward_model"].keys() == {"accuracy", "accuracy_on_labels"}
    assert set(summary["timings"]) == set(small.recipe()["stages"])
    assert summary["claims"] == [
        {"claim": "the reference is at KL 0", "held": True, "figure": summary["models"]["sft"]["kl"]}
    ]
    audit = next(row for row in summary["checks"] if row["name"].startswith("truth audit"))
    found = [row["audit_rejects"] for row in summary["models"].values() if row["audit_rejects"]]
    assert audit["value"] == max(found, key=lambda figure: figure["mean"])
    assert audit["verdict"] == ("passed" if audit["value"]["mean"] < 0.02 else "failed")
    assert summary["versions"]["kilter"] == kilter.__version__


def test_the_report_and_the_picture_are_there(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "embedded world" in page
    assert (finished / "card.md").stat().st_size > 500
    curve = read_jsonl(finished / "evaluation" / "curve.jsonl")
    assert {row["method"] for row in curve} == {"sft", "best_of_n", "ppo"}
    assert [row["step"] for row in curve if row["method"] == "best_of_n"] == [1, 2, 4]
    answers = read_jsonl(finished / "evaluation" / "answers.jsonl")
    shown = {row["prompt_id"] for row in answers}
    assert len(shown) == 3
    for row in answers:
        assert "".join(token["text"] for token in row["tokens"]) == row["text"]
        assert all(token["value"] is not None and token["kl"] is not None for token in row["tokens"])


def test_the_reward_model_carries_its_audit(finished: Path) -> None:
    result = finished / "stages/03-reward/result"
    told = json.loads((result / "audit.json").read_text())
    assert told["weights"] == folder_hash(result) and (result / "audit.html").exists()
    assert told["model"] == "stages/03-reward/result"  # of the run: another folder gives the same bytes
    assert told["data"]["path"] == "stages/03-reward/held_out.jsonl" and told["prompts"] == 40
    named = {one["name"]: one["verdict"] for one in told["detectors"]}
    assert named["flattery"] != "not measured" and named["format"] == "not measured"  # the world's words, not English
    done = {name: finished_stage(finished, name) for name in ("03-reward", "05-ppo", "09-online")}
    assert done["03-reward"]["audit"] == {"passed": told["passed"], "failed": told["failed"]}
    assert done["05-ppo"]["reward_audit"] == done["09-online"]["reward_audit"] == "failed"
    checks = {row["name"]: row for row in json.loads((finished / "summary.json").read_text())["checks"]}
    row = checks["audit of the reward model, reward"]
    assert row["verdict"] == "failed" and row["value"] == ", ".join(told["failed"])
    assert "The reward model’s audit: " in (finished / "report.html").read_text()


@pytest.mark.parametrize(("held_out", "prompts", "why"), [(0.3, 0, "prompts is 0"), (0.05, 20, "20 prompts or more")])
def test_a_reward_model_that_cannot_be_audited_says_why(
    finished: Path, tmp_path: Path, held_out: float, prompts: int, why: str
) -> None:
    stage = small.recipe()["stages"]["reward"] | {
        "model": str(finished / "stages/01-sft/result"),
        "data": str(finished / "stages/02-preferences/result/rankings.jsonl"),
        "held_out": held_out,
        "epochs": 0.1,
        "audit": {"prompts": prompts},
    }
    run = kilter.align({"name": "r", "stages": {"reward": stage}}, out=tmp_path / "run")
    done = run.stage(1, "reward").done
    assert done is not None and why in done["audit"]["not_audited"]
    assert not (run.stage(1, "reward").result / "audit.json").exists()
    row = next(one for one in json.loads((run.path / "summary.json").read_text())["checks"] if "audit" in one["name"])
    assert row["verdict"] == "not measured" and why in row["value"]


def test_words_that_are_not_there_are_refused_before_any_work(finished: Path, tmp_path: Path) -> None:
    stage = small.recipe()["stages"]["reward"] | {
        "model": str(finished / "stages/01-sft/result"),
        "data": str(finished / "stages/02-preferences/result/rankings.jsonl"),
        "audit": {"words": str(tmp_path / "none.json")},
    }
    stages = {"sft": small.recipe()["stages"]["sft"], "reward": stage}  # the first would have much to do
    with pytest.raises(ConfigError, match=r"stages\.reward\.audit: words .*none\.json: cannot be read"):
        kilter.align({"name": "r", "stages": stages}, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("stages/*/metrics.jsonl"))
    stage["audit"] = {"prompts": 5}
    with pytest.raises(
        ConfigError, match=r"audit\.prompts: an audit needs 20 prompts or more, and 0 leaves it out; it is 5"
    ):
        kilter.align({"name": "r", "stages": stages}, out=tmp_path / "run")


def test_the_words_of_an_audit_are_among_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_text('{"restated": "Or:"}')
    reward = small.recipe()["stages"]["reward"] | {"data": __file__, "model": str(MODEL_PATH)}
    recipe = parse({"stages": {"reward": reward | {"audit": {"words": str(path)}}}}, "r")
    before = fingerprints(recipe)[str(path)]
    path.write_text('{"restated": "So:"}')
    assert fingerprints(recipe)[str(path)] != before


def test_a_second_crowd_says_how_far_people_agree(finished: Path) -> None:
    folder = finished / "stages/02-preferences"
    first = {one.prompt: one for one in data.read(folder / "result/judgements.jsonl", record="judgement").records}
    again = data.read(folder / "again.jsonl", record="judgement").records
    assert len(again) == 30 == len({one.prompt for one in again})
    same = []
    for one in again:
        before = first[one.prompt]
        assert one.responses == before.responses
        assert one.annotator.endswith(" (again)") and not before.annotator.endswith(" (again)")
        for a, b in combinations(range(len(one.responses)), 2):
            signs = [(row.ranks[a] > row.ranks[b]) - (row.ranks[a] < row.ranks[b]) for row in (before, one)]
            same.append(signs[0] == signs[1])
    told = json.loads((folder / "agreement.json").read_text())
    assert told["items"] == len(same)
    assert told["measures"]["raw"]["mean"] == pytest.approx(sum(same) / len(same)) != 1.0
    assert finished_stage(finished, "02-preferences")["agreement"] == told["measures"]


def finished_stage(run: Path, name: str) -> dict[str, Any]:
    """What a stage said at its end."""
    return json.loads((run / "stages" / name / "done.json").read_text())


def test_results_load_in_plain_transformers(finished: Path) -> None:
    for name in ("01-sft", "04-dpo", "05-ppo"):
        transformers.AutoModelForCausalLM.from_pretrained(finished / "stages" / name / "result")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(finished / "stages/03-reward/result")
    assert classifier.config.num_labels == 1


def test_training_moved_the_weights_and_the_same_call_does_nothing(finished: Path) -> None:
    before = weights(finished)
    assert len(set(before.values())) == len(before) == 6
    done = {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/done.json")}
    kilter.align(small.recipe(), out=finished)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/done.json")} == done
    assert weights(finished) == before


def test_what_was_read_stands_in_the_environment(finished: Path) -> None:
    inputs = json.loads((finished / "environment.json").read_text())["inputs"]
    assert set(inputs) == {"kilter.world:MODEL_PATH"}
    copied = fingerprints(parse({"stages": {"a": {"stage": "sft", "model": str(MODEL_PATH), "data": __file__}}}, "r"))
    assert copied[str(MODEL_PATH)] == inputs["kilter.world:MODEL_PATH"] != copied[__file__]


def test_another_recipe_is_refused_in_the_same_folder(finished: Path) -> None:
    with pytest.raises(RunError, match="another recipe"):
        kilter.align(small.recipe() | {"seed": 9}, out=finished)


def test_killed_in_three_stages_it_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    import yaml

    names = ["sft", "preferences", "reward", "ppo", "online"]
    recipe_path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe_path.write_text(yaml.safe_dump(only(*names), sort_keys=False))
    words = [sys.executable, "-m", "kilter.cli", "align", str(recipe_path), "--out", str(out)]
    for stage, rows in (("sft", 3), ("ppo", 5), ("online", 3)):
        folder = out / "stages" / f"{names.index(stage) + 1:02}-{stage}"
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= rows):
            assert process.poll() is None, f"{stage} ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "done.json").exists()
    subprocess.run(words, check=True, capture_output=True)
    assert weights(out) == {name: value for name, value in weights(finished).items() if name in names}
    audit = Path("stages/03-reward/result/audit.json")
    assert (out / audit).read_bytes() == (finished / audit).read_bytes()
    for metrics in out.glob("stages/*/metrics.jsonl"):
        steps = [row["step"] for row in read_jsonl(metrics)]
        assert steps == list(range(1, len(steps) + 1)), metrics  # no step stands twice


def test_a_negated_reward_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    backwards = {
        **small.RL,
        "model": str(finished / "stages/01-sft/result"),
        "reward": "kilter.world:wishes_ill",
        "pairs": str(finished / "stages/03-reward/held_out.jsonl"),
    }
    del backwards["snapshots"]
    with pytest.raises(ConfigError, match="wishes_ill"):
        kilter.align({"stages": {"ppo": backwards}}, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "/no/such/folder"}, ModelError, "no such folder"),
        ({"data": {"path": "kilter.world:nothing_of_this_name"}}, ConfigError, "nothing_of_this_name"),
        ({"data": {"path": "kilter.world:demonstrations", "options": {"per_knd": 3}}}, ConfigError, "per_knd"),
    ],
)
def test_bad_input_is_refused_before_work_starts(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    stage = small.recipe()["stages"]["sft"] | change
    with pytest.raises(error, match=words):
        kilter.align({"stages": {"sft": stage}}, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("stages/*/checkpoints/*"))


def test_a_gradient_that_is_not_finite_is_not_applied(finished: Path, tmp_path: Path) -> None:
    stage = small.recipe()["stages"]["sft"]
    stage = stage | {"optim": {**small.OPTIM, "learning_rate": 1e30, "warmup": 0.0}}
    with pytest.raises(CheckError, match=r"not applied and its batches are in"):
        kilter.align({"stages": {"sft": stage}}, out=tmp_path / "run")
