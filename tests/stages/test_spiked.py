"""A row that does not belong among the others makes the gradient jump, and is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small

import kilter
from kilter.cli.main import main
from kilter.rundir import read_jsonl
from kilter.world import demonstrations

ODD = "qx zv jk wq xz vj kq zx qv jz xk vq"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of the embedded world, and one that no model would expect, on line 40."""
    rows = [record.to_dict() for record in demonstrations(seed=0, split="train", per_kind=12)]
    odd = {
        "type": "demonstration",
        "messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": ODD}],
    }
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:39], odd, *rows[39:]]))
    return path


def run(data: Path, out: Path, **optim: float) -> Path:
    stage = {**small.recipe()["stages"]["sft"], "data": str(data), "optim": {**small.OPTIM, "batch_size": 4, **optim}}
    kilter.align({"threads": 1, "stages": {"sft": stage}}, out=out)
    return out / "stages/01-sft/spikes.jsonl"


def test_the_row_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    spikes = read_jsonl(run(data, out, spike=3.0))
    assert spikes, "no step stood out"
    worst = max(spikes, key=lambda spike: spike["grad_norm"] / spike["usual"])
    first = worst["rows"][0]
    assert first["name"] == "rows.jsonl:40" and first["share"] > 0.5
    assert "Say." in first["prompt"] and ODD in first["responses"][0]
    (row,) = (row for row in read_jsonl(out / "stages/01-sft/metrics.jsonl") if row["step"] == worst["step"])
    assert row["grad_norm"] == worst["grad_norm"]
    assert main(["report", "why", str(out)]) == 0
    assert f"step {worst['step']}: its gradient was" in (said := capsys.readouterr().out) and "rows.jsonl:40" in said
    assert main(["report", str(out)]) == 0
    assert "rows.jsonl:40" in (out / "report.html").read_text()


def test_it_is_not_looked_for_where_that_is_not_wanted(data: Path, tmp_path: Path) -> None:
    assert not run(data, tmp_path / "run", spike=0).exists()
