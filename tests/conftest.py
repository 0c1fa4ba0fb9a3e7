"""Shared fixtures. Shared data and models lie beside the repository and may be absent: such tests skip."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data sets; the test skips where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of small real models; the test skips where it is absent."""
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip(f"no shared models at {folder}")
    return folder
