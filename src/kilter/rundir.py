"""A run is a directory: training writes it, everything else reads it, and nothing needs the process that made it.

    runs/<name>/
      recipe.yaml  environment.json
      stages/NN-<stage>/  metrics.jsonl  spikes.jsonl  samples.jsonl  checkpoints/  result/  done.json
      summary.json  report.html  card.md

Files are written beside, synced and renamed, so that a kill at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from kilter.config import Recipe, dump, parse, read_yaml
from kilter.errors import ConfigError, RunError

PACKAGES = ("kilter", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "scipy")


# What a run leaves that was killed before its recipe was written: such a folder is as good as empty.
_BEGUN = {".lock", "environment.json", ".environment.json.part", ".recipe.yaml.part"}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system says into one line with a remedy."""
    try:
        yield
    except Exception as err:
        number = _error_number(err)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path}: the disk is full; free some space and run the same command again") from err
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = os.strerror(number)
            raise RunError(f"{path}: cannot be written ({why}); choose another folder with --out") from err
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise RunError(f"{path}: a file stands where a folder is needed; choose another folder with --out") from err
        raise


def _error_number(err: Exception) -> int | None:
    """The file system's number of an error. safetensors and tokenizers raise their own, with the number in the text."""
    if isinstance(err, OSError):
        return err.errno
    told = re.search(r"\(os error (\d+)\)", str(err))
    return int(told[1]) if told else None


def write_text(path: Path, text: str) -> None:
    """Write beside, sync, rename: the file is either the old one or the whole new one."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON. NaN is refused: a figure that is not a number is None."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`write_text` of one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of ours; a missing file has none. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as err:
            if number == len(lines):
                break
            raise RunError(f"{path}:{number}: not JSON ({err.msg}); the run directory was edited or damaged") from err
    return rows


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise RunError(f"{path}: missing; the run directory was edited or damaged") from err
    except ValueError as err:
        raise RunError(f"{path}: not JSON ({err}); the run directory was edited or damaged") from err
    if not isinstance(found, dict):
        raise RunError(f"{path}: not a JSON object; the run directory was edited or damaged")
    return found


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside `path`, then rename it into place; an older one is replaced at the end, never before."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        sync_folder(beside)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old)
        else:
            beside.rename(path)
        sync_folder(path.parent)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class StageDir:
    """One stage's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result = path / "result"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.spikes = path / "spikes.jsonl"
        self.samples = path / "samples.jsonl"

    @property
    def done(self) -> dict[str, Any] | None:
        """What the stage said when it ended, or None while it has not."""
        path = self.path / "done.json"
        if not path.exists():
            return None
        found = _json_object(path)
        if "seconds" not in found:
            raise RunError(f"{path}: no figures of a stage are in it; the run directory was edited or damaged")
        return found

    def finish(self, **figures: Any) -> None:
        """Mark the stage as ended; written last, so an unfinished stage is never taken for a finished one."""
        write_json(self.path / "done.json", figures)

    def keep_rows_until(self, step: int) -> None:
        """Drop the rows of steps that a resumed stage will do again, so that no step stands twice."""
        for path in (self.metrics, self.spikes):
            if path.exists():
                write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        _append(self.metrics, row)

    def log_spike(self, row: Mapping[str, Any]) -> None:
        """Append one row to spikes.jsonl: a step with an unusual gradient."""
        _append(self.spikes, row)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


class ToldSpike(NamedTuple):
    """What a row of spikes.jsonl tells: a step whose gradient was `times` the usual one."""

    step: int
    times: float
    rows: list[dict[str, Any]]
    """{"name", "share", "prompt", "responses"} of the data rows behind it, the largest share first."""


def spikes_in(rows: Iterable[Mapping[str, Any]]) -> list[ToldSpike]:
    """Those of the rows of a spikes.jsonl that are as they were written, and that no one has edited."""
    found = []
    for row in rows:
        numbers = all(isinstance(row.get(name), int | float) for name in ("step", "grad_norm", "usual"))
        behind = row.get("rows")
        if numbers and row["usual"] and isinstance(behind, list) and all(map(_is_told, behind)):
            found.append(ToldSpike(int(row["step"]), row["grad_norm"] / row["usual"], behind))
    return found


def _is_told(row: Any) -> bool:
    kinds = {"name": str, "share": int | float, "prompt": str, "responses": list}
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(isinstance(text, str) for text in row["responses"])


def furthest(spikes: Sequence[ToldSpike], *, most: int = 3, most_rows: int = 3) -> list[ToldSpike]:
    """The few steps that were furthest from usual, in their order, each with the first of its rows: enough to tell."""
    worst = sorted(spikes, key=lambda spike: -spike.times)[:most]
    return [spike._replace(rows=spike.rows[:most_rows]) for spike in sorted(worst, key=lambda spike: spike.step)]


class RunDir:
    """A run's directory, opened for one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    @classmethod
    def open(cls, path: Path, recipe: Recipe, *, environment: Mapping[str, Any]) -> RunDir:
        """Make the directory, or go on in one of the same recipe.

        Raises:
            RunError: the folder belongs to another recipe, to something else, or to a process that is running.
        """
        run = cls(path)
        file = path / "recipe.yaml"
        text = dump(recipe)
        stale = False
        if file.exists() and (path / "environment.json").exists():
            try:
                old = dump(parse(read_yaml(file), str(file)))
            except ConfigError as err:
                raise RunError(f"{path}: its recipe cannot be read ({err}); choose another folder with --out") from err
            stale = old != text and not run._has_begun()  # it was refused before any work was done
            if old != text and not stale:
                raise RunError(
                    f"{path}: holds a run of another recipe ({first_difference(old, text)}); "
                    "choose another folder with --out, or go on with the recipe that is there"
                )
            if not stale:
                run._check_inputs(environment.get("inputs", {}))
        elif path.exists() and (not path.is_dir() or any(item.name not in _BEGUN for item in path.iterdir())):
            raise RunError(f"{path}: exists and is not a run of Kilter; choose another folder with --out")
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            run._take(path / ".lock")
        if stale or not file.exists():
            write_json(path / "environment.json", {"versions": versions(), **environment})
            write_text(file, text)
        return run

    def _has_begun(self) -> bool:
        """Has any stage written something?"""
        return any(item.is_file() and not item.name.startswith(".") for item in (self.path / "stages").rglob("*"))

    def _check_inputs(self, now: Mapping[str, str]) -> None:
        """Refuse to go on from other data or another model than the run began with."""
        then = _json_object(self.path / "environment.json").get("inputs", {})
        for name, digest in now.items():
            if then.get(name, digest) != digest:
                raise RunError(
                    f"{self.path}: {name} has changed since this run began: its SHA-256 was {then[name][:12]}..., now "
                    f"{digest[:12]}...; put the old one back, or choose another folder with --out"
                )

    def _take(self, path: Path) -> None:
        self._lock = path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self.close()
            raise RunError(f"{self.path}: another process is at work in it; wait for it or end it") from err

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stage(self, number: int, name: str) -> StageDir:
        """The folder of the stage at place `number` (from 1)."""
        path = self.path / "stages" / f"{number:02d}-{name}"
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
        return StageDir(path)


def first_difference(old: str, new: str) -> str:
    """The first line in which two recipes differ."""
    for before, after in zip(old.splitlines(), new.splitlines(), strict=False):
        if before != after:
            return f"there `{before.strip()}`, here `{after.strip()}`"
    return "one has more stages"
