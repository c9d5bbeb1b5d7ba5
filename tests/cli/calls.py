"""What a call of the command gives, and the shape of a refusal."""

from __future__ import annotations

from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], code: int = 2) -> str:
    """Check the shape of a refusal; its first line."""
    assert result[0] == code, result
    assert result[1] == ""
    lines = result[2].splitlines()
    assert lines[0].startswith("error: ")
    assert all(line.startswith(("error: ", "hint: ")) for line in lines)
    assert any(line.startswith("hint: ") for line in lines)
    assert "Traceback" not in result[2]
    assert "defect" not in result[2]
    return lines[0]
