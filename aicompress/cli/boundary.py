"""Where exceptions become messages and exit codes: the only place that exits.

0 done, 1 failed while running, 2 usage, recipe or input refused, 3 a gate failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import functools
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from aicompress.disk import expanded
from aicompress.errors import CompressError, Interrupted, OutOfSpace, Problems, Refused, Terminated, first_line

DEBUG = "--traceback"
STARTED = time.perf_counter()  # of the command
LONGEST = 1000  # characters of a message
ALIKE = 3  # errors with one hint that are printed


def pause_collector() -> None:
    """Collect no garbage while a command imports and plans.

    Imports leave half a million objects that stay: looking through them again and again takes a tenth of a short
    command's time, and finds nothing.
    """
    gc.disable()


def resume_collector() -> None:
    """Collect what is made from here on; where nothing was paused, change nothing."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


class _TermSignal(KeyboardInterrupt):
    """SIGTERM, on the way that Ctrl-C takes: what a stopped run keeps is kept."""


def run(app: Callable[[], object]) -> NoReturn:
    """Run the application and exit.

    An unexpected exception is a defect of this tool: one line names it, and `--traceback` shows where it is.
    """
    _open_streams()
    try:
        with _heeding_term():
            code = _code(app)
    except KeyboardInterrupt as error:
        code = _reported(_interruption(error, ""))
    except BrokenPipeError:
        _forget_reader()
        code = 0
    except Exception as error:
        if DEBUG in sys.argv:
            raise
        code = _reported(explained(error))
    sys.exit(_flushed(code))


def _reported(error: CompressError) -> int:
    report(error)
    return error.exit_code


def _code(app: Callable[[], object]) -> int:
    """Run, and flush while a reader that has gone can still be noticed."""
    code: int | str | None = 0
    try:
        app()
    except SystemExit as stop:  # how the option parser ends, also after help and usage errors
        code = stop.code
    except OSError as error:
        elsewhere = error.filename is not None or isinstance(error, FileNotFoundError)
        if not elsewhere and _flushed(0, "\n"):  # it is standard output that takes no more, and that was said
            return 1
        raise
    return code if isinstance(code, int) else int(code is not None)


def _flushed(code: int, more: str = "") -> int:
    """The exit code once standard output has taken what was printed; a reader that has gone has what it wanted.

    Args:
        code: the exit code so far.
        more: what to print beforehand: what a stream has failed to take is not always there to be tried again.
    """
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_reader()
    except OSError as error:
        _forget_reader()
        hint = "free space, or send it elsewhere; files that the command has written are complete"
        report(CompressError(f"standard output cannot be written: {error.strerror}", hint))
        return code or 1
    return code


def _open_streams() -> None:
    """Give streams that were closed a place that takes everything: no file may get their numbers, and a log with it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold bytes that are no text


@contextmanager
def _heeding_term() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise _TermSignal

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interruption(error: KeyboardInterrupt, hint: str) -> Interrupted:
    return Terminated("terminated", hint) if isinstance(error, _TermSignal) else Interrupted("interrupted", hint)


def guarded(command: Callable[..., object]) -> Callable[..., object]:
    """A command whose interruption comes out here: the option parser would give it a meaning of its own."""

    @functools.wraps(command)
    def call(*args: Any, **options: Any) -> object:
        try:
            return command(*args, **{name: _at_home(value) for name, value in options.items()})
        except KeyboardInterrupt as error:
            hint = "give --resume to go on where this run was" if "resume" in options else ""
            raise _interruption(error, hint) from error
        except BrokenPipeError:
            _forget_reader()
            return None

    return call


def _at_home(value: Any) -> Any:
    """A path, or a list of them, whose `~` a shell has left because it was quoted.

    Raises:
        Refused: a path is `-`, which would become a folder of that name.
    """
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    if isinstance(value, Path) and str(value) == "-":
        raise Refused("- is no place: files are read more than once, and written whole", "name a file or a directory")
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(expanded(str(value)))
    return value


def _forget_reader() -> None:
    """The reader of our output has gone: nothing is wrong, and Python must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explained(error: Exception) -> CompressError:
    """What an exception means for the user: their own mistake, the system's state, or a defect of this tool."""
    if isinstance(error, CompressError):
        return error
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return CompressError("out of memory", "close other programs, or use a smaller batch")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's, without an errno
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(error).partition("'")[2].rstrip("'"))
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error)
    hint = f"this is a defect of aicompress; `aicompress {DEBUG} ...` shows where"
    return CompressError(f"{type(error).__name__}: {first_line(error, 'no message')}", hint)


def _of_system(error: OSError) -> CompressError:
    """What the system refused: a path that cannot be one is the user's, the rest is the state of the machine."""
    if error.errno == errno.ENOENT and error.filename is None:
        return Refused("the working directory is not there any more", "change to another one")
    place = "a file" if error.filename is None else _shown(os.fsdecode(error.filename))
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return Refused(f"{place} cannot be used: {reason}", "choose another path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"{place} cannot be written: the disk is full", "free space, or write elsewhere")
    return CompressError(
        f"{place} cannot be used: {reason}", f"check the path and permissions; `aicompress {DEBUG} ...` shows where"
    )


def report(error: CompressError) -> None:
    """Print an error and its hint on standard error; of many with one hint, such as those of all layers, the first."""
    alike: dict[str, list[str]] = {}
    for problem in error.problems if isinstance(error, Problems) else (error,):
        alike.setdefault(problem.hint, []).append(problem.message)
    for hint, messages in alike.items():
        more = [f"{len(messages) - ALIKE} more like these"] if len(messages) > ALIKE + 1 else messages[ALIKE:]
        for message in (*messages[:ALIKE], *more):
            print(f"error: {_shown(message)}", file=sys.stderr)
        if hint:
            print(f"hint: {_shown(hint)}", file=sys.stderr)


def _shown(text: str) -> str:
    """A message as a line: control characters of names and values are escaped, and a long value is cut."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
