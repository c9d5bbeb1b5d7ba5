"""Fixtures of the tests that run steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pipeline.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that run commands as one."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
