"""The error tree. Every error that a user can cause carries one clear line, a hint and an exit code.

CompressError                 1  failed while running; nothing is left at OUT
├── Refused                   2  refused before work: usage, recipe or input
│   ├── RecipeError              the recipe does not parse, validate or apply
│   ├── CheckpointError          the input checkpoint is damaged or incomplete
│   │   └── Unsupported             it may be sound, and this version does not read it
│   ├── OutputExists             OUT is taken and --overwrite was not given
│   └── Problems                 several of the above, reported at once
├── OutOfSpace                1  the disk is full
├── GateFailed                3  a gate of the recipe does not hold; the output and report are kept
└── Interrupted             130  stopped by the user; a journal is kept where the step can resume
    └── Terminated          143  stopped by the system (SIGTERM), in the same way
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class CompressError(Exception):
    """Base of every expected failure.

    Args:
        message: one line that says what is wrong.
        hint: one line that says what to do next; where it is empty, the one that fits every error of the class.
    """

    exit_code = 1
    usual_hint = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class Refused(CompressError):
    """Refused before any output byte was kept."""

    exit_code = 2


class RecipeError(Refused):
    """A recipe that does not parse, validate or apply to this checkpoint."""

    usual_hint = "change that line of the recipe, or give another value with --set KEY=VALUE"


class CheckpointError(Refused):
    """An input checkpoint that is damaged, incomplete or not supported."""

    usual_hint = "`aicompress inspect` shows what a checkpoint holds, `aicompress verify` checks all of it"


class Unsupported(CheckpointError):
    """A checkpoint in a format that this version does not read: nothing is known to be wrong with it."""


class OutputExists(Refused):
    """The output path is taken."""


class Problems(Refused):
    """Everything that is wrong with a request, found in one go; several problems that one check found are flattened."""

    def __init__(self, problems: Sequence[CompressError]) -> None:
        parts = [each.problems if isinstance(each, Problems) else (each,) for each in problems]
        told = {(type(problem), problem.message, problem.hint): problem for part in parts for problem in part}
        self.problems: tuple[CompressError, ...] = tuple(told.values())  # what two checks have found is told once
        super().__init__(f"{len(self.problems)} problems", "")


class OutOfSpace(CompressError):
    """The disk is full."""


class GateFailed(CompressError):
    """A gate does not hold. The output and its report are kept."""

    exit_code = 3


class Interrupted(CompressError):
    """Stopped by the user."""

    exit_code = 130


class Terminated(Interrupted):
    """Stopped by the system."""

    exit_code = 143


def raise_all(problems: Sequence[CompressError]) -> None:
    """Raise the one problem, or all of them as `Problems`; return when there are none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The first line of what an error says; where it says nothing the other words, or the name of its class."""
    return (str(error).strip().splitlines() or [otherwise or type(error).__name__])[0]


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first of some names, and dots for the others.

    >>> listed("abcd")
    'a, b, c, ...'
    """
    every = [str(name) for name in names]
    return ", ".join([*every[:most], *(["..."] if len(every) > most else [])])


def suggestion(word: str, known: Sequence[str]) -> str:
    """A hint that names the nearest known word, or lists what there is.

    >>> suggestion("gptk", ["gptq", "rtn"])
    "did you mean 'gptq'?"
    """
    near = nearest(word, known)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"known: {listed(sorted(known), 12)}"


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that is most like a wrong one; None where none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, known, n=1)), None)
