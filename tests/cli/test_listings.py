"""What `aicompress methods` prints, for every method there is, and `aicompress inspect` of a weight."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aicompress.cli.verbs.methods import is_open
from aicompress.methods import COMMANDS, methods
from tests.cli.calls import Call, refused
from tests.weights.forms import ints, write_form

READABLE = 100


def flat(printed: str) -> str:
    return " ".join(printed.split())


def test_the_list_says_when_to_take_each_method(call: Call) -> None:
    code, printed, _ = call("methods")
    assert code == 0
    for command in COMMANDS:
        for method in methods(command).values():
            assert f"{method.name} {method.summary} take it for: {method.when}" in flat(printed)
    assert max(map(len, printed.splitlines())) <= READABLE


@pytest.mark.parametrize("command", COMMANDS)
def test_parameters_are_readable(command: str, call: Call) -> None:
    _, printed, _ = call("methods", command)
    assert max(map(len, printed.splitlines())) <= READABLE
    assert not re.search(r"pydantic|typing|NoneType|Literal| \| |\bNone\b|<class", printed)
    for method in methods(command).values():
        for field, info in method.config.model_fields.items():
            assert not is_open(field, info) or flat(info.description or "") in flat(printed)


def test_one_method_alone(call: Call) -> None:
    _, printed, _ = call("methods", "quantize", "gptq")
    shown = flat(printed)
    assert "bits 2, 3, 4, 8, auto or range; default 4" in shown
    assert "max_error number above 0 below 1" in shown
    assert "target_bytes size such as 20MB" in shown
    assert "hqq" not in printed
    assert "gptqq" in refused(call("methods", "quantize", "gptqq"))
    _, fixed, _ = call("methods", "prune", "lamp")
    assert "pattern" not in fixed  # of one value only


def test_bits_of_a_weight_are_not_rounded_and_then_given_more_digits(call: Call, tmp_path: Path) -> None:
    weight = ints(4, (6, 3), True)
    write_form(tmp_path / "fc.safetensors", weight, weight.tensors())
    _, printed, _ = call("inspect", tmp_path / "fc.safetensors")
    assert "  9.333  " in printed  # of 12: two words of codes, three scales of two bytes
