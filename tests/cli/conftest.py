"""The command, called in the process of the tests."""

from __future__ import annotations

import sys

import pytest
import typer.main

from aicompress.cli.app import app
from aicompress.cli.boundary import run
from tests.cli.calls import Call

COMMAND = typer.main.get_command(app)  # what `app()` makes anew at every call


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in this process: its exit code, standard output and standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aicompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run(COMMAND)
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return command
