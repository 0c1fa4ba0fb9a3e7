"""Run directories: nothing half written, nothing of another recipe touched, one process at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kilter import rundir
from kilter.config import parse
from kilter.errors import RunError
from kilter.rundir import RunDir, read_jsonl, write_folder, write_json, write_text


def recipe(rate: float = 1e-3):
    stage = {"stage": "sft", "model": "m", "data": "d.jsonl", "optim": {"learning_rate": rate}}
    return parse({"stages": {"a": stage}}, "r.yaml")


def test_a_run_of_another_recipe_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", recipe(), environment={})
    run.stage(1, "a").log({"step": 1})
    run.close()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"learning_rate: 0\.001`, here `learning_rate: 0\.002`"):
        RunDir.open(tmp_path / "run", recipe(2e-3), environment={})
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    RunDir.open(tmp_path / "run", recipe(), environment={}).close()


def test_a_recipe_with_which_nothing_was_done_yet_makes_room(tmp_path: Path) -> None:
    held = RunDir.open(tmp_path, recipe(), environment={})
    with pytest.raises(RunError, match="another process is at work in it"):
        RunDir.open(tmp_path, recipe(2e-3), environment={})
    held.close()
    RunDir.open(tmp_path, recipe(2e-3), environment={}).close()
    assert "learning_rate: 0.002" in (tmp_path / "recipe.yaml").read_text()
    run = RunDir.open(tmp_path, recipe(2e-3), environment={})
    run.stage(1, "a")  # an empty folder of a stage is no work
    run.close()
    RunDir.open(tmp_path, recipe(), environment={}).close()
    assert "learning_rate: 0.001" in (tmp_path / "recipe.yaml").read_text()


def test_a_run_goes_on_from_the_data_it_began_with_alone(tmp_path: Path) -> None:
    begun = {"inputs": {"pairs.jsonl": "aa" * 32, "model": "bb" * 32}}
    RunDir.open(tmp_path, recipe(), environment=begun).close()
    RunDir.open(tmp_path, recipe(), environment=begun).close()
    changed = {"inputs": {"pairs.jsonl": "cc" * 32, "model": "bb" * 32}}
    with pytest.raises(
        RunError, match=r"pairs\.jsonl has changed since this run began: its SHA-256 was aaaaaaaaaaaa\.\.\."
    ):
        RunDir.open(tmp_path, recipe(), environment=changed)
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(RunError, match=r"environment\.json: not JSON .*edited or damaged"):
        RunDir.open(tmp_path, recipe(), environment=begun)


def test_a_damaged_end_of_a_stage_is_named(tmp_path: Path) -> None:
    stage = rundir.StageDir(tmp_path)
    for text, rule in (("", "not JSON"), ("[1]", "not a JSON object"), ("{}", "no figures of a stage")):
        (tmp_path / "done.json").write_text(text)
        with pytest.raises(RunError, match=f"done.json: {rule}.*edited or damaged"):
            _ = stage.done


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.yaml").write_text("name: mine\n")  # a recipe in a folder makes no run of it
    with pytest.raises(RunError, match="not a run of Kilter"):
        RunDir.open(tmp_path / "own", recipe(), environment={})
    assert (tmp_path / "own" / "recipe.yaml").read_text() == "name: mine\n"
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not a run of Kilter"):
        RunDir.open(tmp_path, recipe(), environment={})
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunError, match="not a run of Kilter"):
        RunDir.open(file, recipe(), environment={})
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        RunDir.open(file / "run", recipe(), environment={})


def test_a_run_killed_before_its_recipe_was_written_begins_again(tmp_path: Path) -> None:
    write_json(tmp_path / "environment.json", {})
    (tmp_path / ".lock").touch()
    RunDir.open(tmp_path, recipe(), environment={"seed": 0}).close()
    assert json.loads((tmp_path / "environment.json").read_text())["seed"] == 0


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "run", recipe(), environment={})
    code = (
        "import sys; from pathlib import Path; from kilter.config import load; from kilter.rundir import RunDir\n"
        "path = Path(sys.argv[1])\n"
        "RunDir.open(path, load(path / 'recipe.yaml'), environment={})"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "another process is at work" in done.stderr
    run.close()
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


def fill_and_fail(target: Path) -> None:
    with write_folder(target) as folder:
        (folder / "a").write_text("half")
        raise ZeroDivisionError


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with write_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(target)
    assert (target / "a").read_text() == "old"
    with write_folder(target) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_full_disk_is_named_with_its_remedy(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    stage = rundir.StageDir(tmp_path)
    stage.metrics.symlink_to("/dev/full")
    with pytest.raises(RunError, match="the disk is full; free some space"):
        stage.log({"step": 1})


FULL = """
import sys, torch
from pathlib import Path
import safetensors.torch
from tokenizers import Tokenizer, models
from kilter import rundir
from kilter.errors import RunError
weights = {"a": torch.zeros(1 << 20)}
words = Tokenizer(models.WordLevel({f"word-{n}": n for n in range(1 << 16)}, "word-0"))
full = {
    "safetensors": lambda folder: safetensors.torch.save_file(weights, folder / "model.safetensors"),
    "tokenizers": lambda folder: words.save(str(folder / "tokenizer.json")),
    "python": lambda folder: (folder / "text").write_text("x" * (1 << 22)),
}
for name, write in full.items():
    target = Path(sys.argv[1]) / name
    try:
        with rundir.write_folder(target) as folder:
            write(folder)
    except RunError as err:
        print(name, err, target.exists())
"""


def test_whoever_meets_the_full_disk_the_message_is_one_and_nothing_stands_there(tmp_path: Path) -> None:
    small = 'mount -t tmpfs -o size=1m tmpfs "$2" && exec "$0" -c "$1" "$2"'
    isolated = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, f"mount -t tmpfs tmpfs {tmp_path}"]).returncode:
        pytest.skip("no file system can be mounted here")
    told = subprocess.run([*isolated, small, sys.executable, FULL, str(tmp_path)], capture_output=True, text=True)
    rule = "the disk is full; free some space and run the same command again"
    names = ("safetensors", "tokenizers", "python")
    assert told.stdout.splitlines() == [f"{name} {tmp_path / name}: {rule} False" for name in names], told.stderr


def test_rows_after_the_checkpoint_are_dropped_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    stage = rundir.StageDir(tmp_path)
    for step in (1, 2, 3):
        stage.log({"step": step})
    with stage.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_jsonl(stage.metrics)] == [1, 2, 3]
    stage.log_spike({"step": 2})
    stage.log_spike({"step": 3})
    stage.keep_rows_until(2)
    assert [row["step"] for row in read_jsonl(stage.metrics)] == [1, 2]
    assert [row["step"] for row in read_jsonl(stage.spikes)] == [2]
    write_text(stage.metrics, "oops\n{}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1"):
        read_jsonl(stage.metrics)


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()
