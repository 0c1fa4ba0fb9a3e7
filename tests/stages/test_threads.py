"""How many threads a run takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import small
import torch

from kilter.config import parse
from kilter.stages.run import prepare


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("said", "jobs", "threads", "taken"),
    [
        ({}, 1, 0, 8),
        ({}, 3, 0, 2),
        ({}, 9, 0, 1),
        ({}, 1, 3, 3),
        ({"OMP_NUM_THREADS": "1"}, 1, 0, 5),  # what torch had made of it
        ({"OMP_NUM_THREADS": "1"}, 1, 3, 3),
    ],
)
def test_threads(said: dict[str, str], jobs: int, threads: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(5)
    prepare(parse(small.recipe() | {"jobs": jobs, "threads": threads}, "small"))
    assert torch.get_num_threads() == taken
