"""Where exceptions become messages and exit codes: the only place that exits.

0 done, 1 failed while running, 2 usage, recipe or input refused, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from aicompress.errors import CompressError, Problems

DEBUG = "--traceback"


def run(app: Callable[[], object]) -> NoReturn:
    """Run the application and exit.

    An unexpected exception is a defect of this tool: one line names it, and `--traceback` shows where it is.
    """
    try:
        app()
    except CompressError as error:
        if DEBUG in sys.argv:
            raise
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; give --resume to go on where this run was", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone: nothing is wrong. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError:
        print("error: out of memory\nhint: close other programs, or use a smaller batch", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if DEBUG in sys.argv:
            raise
        print(f"error: {type(error).__name__}: {_one_line(error)}", file=sys.stderr)
        print(f"hint: this is a defect of aicompress; `aicompress {DEBUG} ...` shows where", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def report(error: CompressError) -> None:
    """Print an error and its hint on standard error."""
    for problem in error.problems if isinstance(error, Problems) else (error,):
        print(f"error: {problem.message}", file=sys.stderr)
        if problem.hint:
            print(f"hint: {problem.hint}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
