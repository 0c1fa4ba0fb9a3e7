"""Stages side by side: the same bytes as one after another, errors as they are, and no process left behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small
import yaml

import kilter
from kilter.config import parse
from kilter.errors import ConfigError, RunError
from kilter.rundir import RunDir
from kilter.stages.progress import Watch
from kilter.stages.workers import Task, _Worker, tasks_of


def files(run: Path) -> dict[str, bytes]:
    """All weights and answers of a run."""
    found = [*run.glob("stages/*/result/*.safetensors"), *run.glob("evaluation/*.jsonl")]
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def workers_of(run: Path) -> list[int]:
    """Processes that work in `run`, from their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"kilter.stages.worker" in words and str(run).encode() in words:
            found.append(int(entry.parent.name))
    return found


def test_tasks_wait_for_what_they_read_and_for_nothing_else() -> None:
    needs = {task.name: set(task.needs) for task in tasks_of(parse(small.recipe(), "small"))}
    assert needs == {
        "sft": set(),
        "preferences": {"sft"},
        "reward": {"sft", "preferences"},
        "dpo": {"sft", "preferences"},
        "ppo": {"sft", "reward"},
        "ppo_without_kl": {"sft", "reward"},
        "best_of_n": {"sft", "reward"},
        "evaluation of base": {"sft", "reward"},
        "evaluation of sft": {"sft", "reward"},
        "evaluation of best_of_n": {"sft", "reward", "best_of_n"},
        "evaluation of ppo": {"sft", "reward", "ppo"},
        "online": {"sft", "reward"},
    }


def test_side_by_side_gives_the_same_bytes_as_one_after_another(finished: Path, tmp_path: Path) -> None:
    kilter.align(small.recipe() | {"jobs": 3}, out=tmp_path / "three")
    one, three = files(finished), files(tmp_path / "three")
    assert len(one) > 8
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name]] == []
    left, right = (json.loads((run / "summary.json").read_text()) for run in (finished, tmp_path / "three"))
    assert left["models"] == right["models"]
    assert right["timings"].keys() == left["timings"].keys()
    assert right["timings"]["evaluation"] > 1  # the models' part is counted though other processes did it
    assert not workers_of(tmp_path / "three")


def test_an_error_in_a_worker_is_the_error_of_the_run(tmp_path: Path) -> None:
    stages = {name: small.recipe()["stages"][name] for name in ("sft", "preferences")}
    stages["preferences"]["annotator"]["options"]["noyse"] = 1.0
    with pytest.raises(ConfigError, match="noyse"):
        kilter.align({**small.recipe(), "jobs": 2, "stages": stages}, out=tmp_path / "run")
    assert not workers_of(tmp_path / "run")
    assert (tmp_path / "run/stages/01-sft/done.json").exists()


def test_a_worker_that_dies_is_said_and_the_run_goes_on_afterwards(tmp_path: Path) -> None:
    recipe = parse({**small.recipe(), "jobs": 2}, "small")
    run = RunDir.open(tmp_path / "run", recipe, environment={})
    heard: queue.Queue[Any] = queue.Queue()
    worker = _Worker(run, heard, Watch())
    worker.start(Task("sft", None, frozenset()))
    _, first = heard.get(timeout=60)
    assert first == {"say": "sft (sft)"}
    os.kill(worker._process.pid, signal.SIGKILL)
    while (event := heard.get(timeout=60)[1]) is not None:
        worker.take(event)
    with pytest.raises(RunError, match=r"sft: its process ended with code -9 .* goes on from the last checkpoint"):
        worker.take(None)
    worker.end()
    run.close()


def test_no_worker_outlives_a_run_that_was_killed(finished: Path, tmp_path: Path) -> None:
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    stages = {name: small.recipe()["stages"][name] for name in ("sft", "preferences", "dpo")}
    path.write_text(yaml.safe_dump({**small.recipe(), "jobs": 2, "stages": stages}, sort_keys=False))
    words = [sys.executable, "-m", "kilter.cli", "align", str(path), "--out", str(run)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (run / "stages/03-dpo/metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert workers_of(run)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while workers_of(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kilter.align(yaml.safe_load(path.read_text()), out=run)
    for ended, whole in (("01-sft", "01-sft"), ("03-dpo", "04-dpo")):
        name = "result/model.safetensors"
        assert (run / "stages" / ended / name).read_bytes() == (finished / "stages" / whole / name).read_bytes()
