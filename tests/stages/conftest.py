"""The small run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

import kilter


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    kilter.align(small.recipe(), out=folder)
    return folder
