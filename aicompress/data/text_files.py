"""Text files, read line by line or in large pieces; what is no text is refused with its line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aicompress.errors import RecipeError

PIECE = 1 << 22  # characters that are tokenized in one go; a smaller file is tokenized whole


@contextmanager
def data_errors(path: Path) -> Iterator[None]:
    """Say clearly why a data file cannot be read.

    Raises:
        RecipeError: it is missing, a folder, forbidden, or not UTF-8 text.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise RecipeError(
            f"data file {path} does not exist",
            "give --text FILE, or set the path: one in a recipe is relative to the recipe's folder",
        ) from error
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path} cannot be read: it is a folder", "name a file in it") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from error


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 text with their ends, as `open` divides them.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, or holds NUL characters.
    """
    with data_errors(path), path.open(encoding="utf-8-sig", newline=newline) as file:
        for line in file:
            if "\0" in line:
                raise _no_text(path)
            yield line


def pieces(path: Path) -> Iterator[str]:
    """The text in large pieces that end at a line end, so that memory is bounded and no word is cut.

    Raises:
        RecipeError: as `lines`.
    """
    with data_errors(path), path.open(encoding="utf-8-sig") as file:
        while piece := file.read(PIECE):
            piece += file.readline()
            if "\0" in piece:
                raise _no_text(path)
            yield piece


def require_text(path: Path) -> None:
    """Check the whole of a file for what is no text, without dividing it into lines.

    Raises:
        RecipeError: as `lines`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with data_errors(path), path.open("rb") as file:
        while piece := file.read(PIECE):
            if b"\0" in piece:
                raise _no_text(path)
            decoder.decode(piece)
        decoder.decode(b"", final=True)


def _no_text(path: Path) -> RecipeError:
    """Which line of a file is no text, and what the file may be instead."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return RecipeError(f"{path} is not UTF-8 text but UTF-16", _CONVERT.format("UTF-16"))
        file.seek(0)
        begin = file.read(LONGEST_MARK)
        for mark, (what, hint) in _BINARY.items():
            if begin.startswith(mark):
                return RecipeError(f"{path} is no text, but {what}", hint)
        file.seek(0)
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                hint = "give plain text: this is a binary file, or UTF-16 without a mark"
                return RecipeError(f"{path}, line {number}: holds NUL characters, so it is no text", hint)
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"{path}, line {number}: is not UTF-8 text: {error.reason}"
                return RecipeError(message, _CONVERT.format("WINDOWS-1252"))
    return RecipeError(f"{path} is not UTF-8 text", _CONVERT.format("WINDOWS-1252"))


_BINARY = {  # by their first bytes
    b"PAR1": ("a parquet file", "read its rows: `parquet:` in the place of `text:`"),
    b"\x1f\x8b": ("packed by gzip", "unpack it first, with `gunzip -k`"),
    b"PK\x03\x04": ("a zip archive or an office document", "unpack it first, or save it as plain text"),
    b"%PDF": ("a PDF", "save it as plain text, for example with `pdftotext`"),
}
LONGEST_MARK = max(map(len, _BINARY))
_CONVERT = "convert it, for example with `iconv -f {} -t UTF-8`"
