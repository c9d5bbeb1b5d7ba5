"""What every loss owes, found by discovery: a new loss file is covered without being named here."""

from __future__ import annotations

import pytest

from aicompress.methods import Method, methods
from aicompress.methods.losses import DistillMethod
from tests.methods.distill.contract import require_contract


@pytest.mark.parametrize("method", methods("distill").values(), ids=lambda method: method.name)
def test_contract(method: Method) -> None:
    assert isinstance(method, DistillMethod)
    require_contract(method)
