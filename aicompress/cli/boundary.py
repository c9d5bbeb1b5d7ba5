"""Where exceptions become messages and exit codes: the only place that exits.

0 done, 1 failed while running, 2 usage, recipe or input refused, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from aicompress.errors import CompressError, Interrupted, Problems

DEBUG = "--traceback"
STARTED = time.perf_counter()  # of the command


def run(app: Callable[[], object]) -> NoReturn:
    """Run the application and exit.

    An unexpected exception is a defect of this tool: one line names it, and `--traceback` shows where it is.
    """
    try:
        code = _code(app)
    except CompressError as error:
        if DEBUG in sys.argv:
            raise
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        report(Interrupted("interrupted"))
        code = Interrupted.exit_code
    except BrokenPipeError:
        _forget_reader()
        code = 0
    except Exception as error:
        if DEBUG in sys.argv:
            raise
        _report_defect(error)
        code = 1
    sys.exit(code)


def _code(app: Callable[[], object]) -> int:
    """Run, and flush while a reader that has gone can still be noticed."""
    code: int | str | None = 0
    try:
        app()
    except SystemExit as stop:  # how the option parser ends, also after help and usage errors
        code = stop.code
    sys.stdout.flush()
    return code if isinstance(code, int) else int(code is not None)


def guarded(command: Callable[..., object]) -> Callable[..., object]:
    """A command whose interruption comes out here: the option parser would give it a meaning of its own."""

    @functools.wraps(command)
    def call(*args: Any, **options: Any) -> object:
        try:
            return command(*args, **options)
        except KeyboardInterrupt as error:
            hint = "give --resume to go on where this run was" if "resume" in options else ""
            raise Interrupted("interrupted", hint) from error
        except BrokenPipeError:
            _forget_reader()
            return None

    return call


def _forget_reader() -> None:
    """The reader of our output has gone: nothing is wrong, and Python must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_defect(error: Exception) -> None:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        print("error: out of memory\nhint: close other programs, or use a smaller batch", file=sys.stderr)
        return
    print(f"error: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
    print(f"hint: this is a defect of aicompress; `aicompress {DEBUG} ...` shows where", file=sys.stderr)


def report(error: CompressError) -> None:
    """Print an error and its hint on standard error."""
    for problem in error.problems if isinstance(error, Problems) else (error,):
        print(f"error: {problem.message}", file=sys.stderr)
        if problem.hint:
            print(f"hint: {problem.hint}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
