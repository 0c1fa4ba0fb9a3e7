"""`kilter reward audit` on a real reward model, its page, and the gate before training that reads it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
from rich.console import Console

import kilter
from kilter.cli import main
from kilter.cli.audit import AuditOptions
from kilter.cli.options import parse
from kilter.config import Combine, RlStage
from kilter.errors import CheckError
from kilter.report.audit import audit_page
from kilter.rundir import read_jsonl, write_json
from kilter.stages.audit import check_audit
from kilter.stages.inputs import AUDIT, fingerprints, folder_hash
from kilter.stages.progress import Watch
from kilter.stages.worker import Relay
from kilter.stages.workers import _Worker

BASE = "kilter.world:MODEL_PATH"


@pytest.fixture
def reward(finished: Path, tmp_path: Path) -> Path:
    """A copy of the small run's reward model without its audit, the pairs that it was not trained on beside it."""
    left_out = shutil.ignore_patterns(AUDIT, "audit.html")
    shutil.copytree(finished / "stages" / "03-reward" / "result", tmp_path / "reward", ignore=left_out)
    shutil.copy(finished / "stages" / "03-reward" / "held_out.jsonl", tmp_path / "pairs.jsonl")
    return tmp_path / "reward"


def told_of(reward: Path, *words: str) -> dict[str, Any]:
    main(["reward", "audit", str(reward), "--data", str(reward.parent / "pairs.jsonl"), *words])
    folder = Path(words[words.index("--out") + 1]) if "--out" in words else reward
    found: dict[str, Any] = json.loads((folder / AUDIT).read_text())
    return found


def rl(reward: Path, **changes: Any) -> dict[str, Any]:
    pairs = str(reward.parent / "pairs.jsonl")
    stage = {**small.RL, "model": BASE, "reward": str(reward), "pairs": pairs, "rollouts": 1, "snapshots": 0}
    stage["audit"] = "heed"
    return {"name": "gate", "threads": 1, "stages": {"ppo": stage | changes}}


def said(told: dict[str, Any], reward: Path, **changes: Any) -> None:
    write_json(reward / AUDIT, told | changes)


def test_an_audit_stands_in_the_models_folder(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = folder_hash(reward)
    told = told_of(reward)
    shown = capsys.readouterr().out
    assert told["weights"] == before == folder_hash(reward)  # its audit is no part of a model
    assert told["data"]["comparisons"] == len(read_jsonl(tmp_path / "pairs.jsonl")) == told["calibration"]["pairs"]
    assert {one["name"] for one in told["detectors"]} >= {"padding", "sycophancy", "groups"}
    assert "padding" in shown and str(reward / "audit.html") in shown
    again = told_of(reward, "--out", str(tmp_path / "again"), "--as-json")
    assert again == told == json.loads(capsys.readouterr().out)
    words = ["rl", "--model", BASE, "--reward", str(reward), "--prompts", "p"]
    assert main([*words, "--audit", "ignored"]) == 2


def test_the_exit_code_says_whether_it_passed(reward: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward for few words fails: of the accuracy, or because it likes what is cut."""
    words = ["--data", str(reward.parent / "pairs.jsonl"), "--out", str(reward.parent / "to")]
    assert main(["reward", "audit", f"{__name__}:brief", *words]) == 1
    told = json.loads((reward.parent / "to" / AUDIT).read_text())
    (reward.parent / "bad.jsonl").write_text((reward.parent / "pairs.jsonl").read_text() + '{"type": "pair"}\n')
    words[1] = str(reward.parent / "bad.jsonl")
    assert main(["reward", "audit", f"{__name__}:brief", *words]) == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert main(["reward", "audit", f"{__name__}:brief", *words, "--skip-bad"]) == 1
    again = json.loads((reward.parent / "to" / AUDIT).read_text())
    assert again["data"]["bad_rows"] == 1 and again["calibration"] == told["calibration"]
    assert "brevity" in told["failed"] and told["weights"] is None
    assert told["longer"]["preferred"]["mean"] < 0.1
    out = capsys.readouterr().out
    assert "FAILED brevity" in out and "the reward prefers the longer" in out


def brief(samples: Any) -> list[float]:
    """The fewer words the better."""
    return [-float(len(sample.text.split())) for sample in samples]


class Links(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "onload", "onclick", "style")]


def test_the_page_is_one_file_and_escapes_every_text(reward: Path) -> None:
    bad = "<script>alert(1)</script>\u202e"
    told = told_of(reward)
    told["model"] = told["data"]["path"] = bad
    told["failed"], told["passed"] = [bad], False
    told["by_annotator"] = {bad: told["calibration"]["accuracy"]}
    told["longer_by_kind"] = {bad: {"better": told["calibration"]["accuracy"]}}
    told["likes"]["top"][0] |= {"prompt": bad, "answer": bad, "words": [[bad, 99.0], [bad, None]]}
    told["best_of_n"] = [{"n": 1, "kl": 0.0, "reward": told["calibration"]["accuracy"], "beats": None}]
    accuracy = {"plain": {"plain": told["calibration"]["accuracy"]}}
    told["style"] = {"accuracy": accuracy, **dict.fromkeys(("easy", "normal", "hard"), told["calibration"]["brier"])}
    page = audit_page(told)
    links = Links()
    links.feed(page)
    assert "script" not in links.tags and not links.loads
    assert "&lt;script&gt;" in page and "\u202e" not in page
    effects = sum(one["effect"] is not None for one in told["detectors"])
    assert links.tags.count("circle") == len(told["calibration"]["reliability"]) + effects
    assert re.search(r"Content-Security-Policy\" content=\"default-src &#39;none&#39;", page)
    assert (
        "Failed: " in page and "Best of n" in page and "Style against substance" in page and "The longer of two" in page
    )
    assert page == audit_page(told)


def test_wrong_use(reward: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = str(reward.parent / "pairs.jsonl")
    for words, part in [
        ([], "the model comes first"),
        (["--data", pairs], "the model comes first"),
        ([str(reward)], "--data must be given"),
        (["some/model", "--data", pairs], "say where with --out"),
        ([str(reward), "--data", pairs, "--prompts", "3"], "prompts is 3"),
    ]:
        if words:
            assert main(["reward", "audit", *words]) == 2
            assert part in capsys.readouterr().err


def test_the_gate(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Warned of without an audit; refused when it failed, naming what, or is of other weights; unless ignored."""
    done = kilter.align(rl(reward), out=tmp_path / "none").stage(1, "ppo").done
    assert done is not None and done["reward_audit"] == "none"
    assert "was never audited" in " ".join(capsys.readouterr().err.split())
    told = told_of(reward)
    said(told, reward, passed=True, failed=[])
    done = kilter.align(rl(reward), out=tmp_path / "passed").stage(1, "ppo").done
    assert done is not None and done["reward_audit"] == "passed"
    said(told, reward, passed=False, failed=["padding", "groups"])
    with pytest.raises(CheckError, match=r"stages.ppo.reward: .*failed its audit: padding, groups; .*audit: ignore"):
        kilter.align(rl(reward), out=tmp_path / "failed")
    done = kilter.align(rl(reward, audit="ignore"), out=tmp_path / "ignored").stage(1, "ppo").done
    assert done is not None and done["reward_audit"] == "failed"
    assert "trained on nevertheless" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("audited", "used", "problem"),
    [
        (None, None, ""),
        (None, {"how": "mean", "variance_coef": 3.0}, ""),
        (None, {"how": "min"}, r"another way: Combination\(how='mean'.*here Combination\(how='min'"),
        ({"how": "min", "variance_coef": 2.0}, {"how": "min"}, ""),
        ({"how": "min"}, None, "another way"),
        ({"how": "mean_minus_variance"}, {"how": "mean_minus_variance", "variance_coef": 2.0}, "another way"),
        ({"weights": {"a": 2.0}}, {"weights": {"a": 3.0}}, "another way"),
        ({"weights": {"a": 2.0}}, {"weights": {"the b": 3.0}}, "another way"),
        ({"weights": {"c": 2.0}}, None, "cannot be read as an audit"),
        ("min", None, "cannot be read as an audit"),
    ],
)
def test_heads_combined_in_another_way_are_another_reward(
    audited: Any, used: Any, problem: str, tmp_path: Path
) -> None:
    heads = {"labels": ["a", "the b"], "kind": "ensemble", "usual": [0, 0], "combine": {"how": "mean"}, "base": ""}
    write_json(tmp_path / "kilter.json", {"heads": heads})
    told = {"version": 1, "weights": folder_hash(tmp_path), "passed": True, "failed": [], "combine": audited}
    write_json(tmp_path / AUDIT, told)
    with pytest.raises(CheckError, match=problem) if problem else contextlib.nullcontext() as caught:
        assert gate(tmp_path, combine=used) == "passed"
    if used and caught:
        command = shlex.split(str(caught.value).split("`")[1])
        options = parse(AuditOptions, command[4:], prog="kilter", default=AuditOptions())
        assert options.combine == Combine.model_validate(used)
    write_json(tmp_path / "kilter.json", {"heads": heads | {"labels": ["a"], "usual": [0]}})
    write_json(tmp_path / AUDIT, told | {"weights": folder_hash(tmp_path), "combine": None})
    assert gate(tmp_path, combine={"how": "min"}) == "passed"  # one head is itself however it is combined


def gate(folder: Path, watch: Watch | None = None, **changes: Any) -> str | None:
    stage = RlStage.model_validate({**small.RL, "model": BASE, "reward": str(folder), "audit": "heed", **changes})
    context: Any = SimpleNamespace(name="ppo", watch=watch or Watch())
    return check_audit(context, stage, str(folder))


def test_a_run_says_once_that_a_model_was_never_audited(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    watch = Watch(Console(file=io.StringIO(), width=1000))
    sent = io.StringIO()
    relay = Relay(sent)
    for name in ("one", "two", "one"):
        assert gate(tmp_path / name, watch) == gate(tmp_path / name, watch.beside()) == "none"
        assert gate(tmp_path / name, relay) == "none"
    assert isinstance(watch.console.file, io.StringIO)
    assert watch.console.file.getvalue().count("never audited") == 2
    events = [json.loads(line) for line in sent.getvalue().splitlines()]
    assert [list(event) for event in events] == [["say_once"]] * 3  # left to the parent, who knows what others said
    parent: Any = SimpleNamespace(task=None, _watch=watch)
    for event in events:
        _Worker.take(parent, event)
    assert watch.console.file.getvalue().count("never audited") == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights": "0" * 64}, "for other weights"),
        ({"version": 0}, "is of version 0"),
        ({"failed": None}, "cannot be"),
    ],
)
def test_an_audit_of_something_else_is_refused_online(
    changes: dict[str, Any], match: str, reward: Path, tmp_path: Path
) -> None:
    told = {"version": 1, "weights": folder_hash(reward), "passed": True, "failed": []}
    said(told, reward, **changes)
    online = small.recipe()["stages"]["online"] | {
        "model": BASE,
        "reward": str(reward),
        "sync_every": 0,
        "audit": "heed",
    }
    with pytest.raises(CheckError, match=match):
        kilter.align({"name": "gate", "threads": 1, "stages": {"online": online}}, out=tmp_path / "run")


def test_an_audit_does_not_make_a_run_another_one(reward: Path) -> None:
    recipe = kilter.recipe(rl(reward))
    before = fingerprints(recipe)
    (reward / AUDIT).write_text("{}")
    assert fingerprints(recipe) == before
    (reward / "config.json").write_text("{}")
    assert fingerprints(recipe) != before
