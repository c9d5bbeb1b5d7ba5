"""Fixtures of the tests that run steps."""

from __future__ import annotations

import pytest

from tests.pipeline.ranks import Ranks
from tests.processes import shared


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory, python: list[str]) -> Ranks:
    """Two processes that run commands as one."""
    return Ranks(shared(tmp_path_factory, "ranks"), python)
