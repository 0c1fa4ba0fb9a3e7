"""World size is not a hyper-parameter: two processes give the untouched model's gradient, under DDP and FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import CONFIGS
from two_processes import WAYS

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[float, str]]]:
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "gaps.json").read_text())


@pytest.mark.slow
def test_sharded_policy_is_saved_whole(gaps: dict[str, dict[str, tuple[float, str]]]) -> None:
    assert gaps["saved"]["llama"][0] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes(gaps: dict[str, dict[str, tuple[float, str]]], way: str, family: str) -> None:
    gap, where = gaps[way][family]
    assert gap <= 1e-5, where
