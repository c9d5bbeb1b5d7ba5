"""Files of named arrays, .npz and .safetensors: shapes from their headers, an array where it is asked for."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aicompress.data.text_files import readable
from aicompress.errors import RecipeError, suggestion


@dataclass(frozen=True)
class ArrayFile:
    """An open file of arrays.

    Attributes:
        read: a name's array.
        shape: a name's shape, without its data.
    """

    read: Callable[[str], NDArray[Any]]
    shape: Callable[[str], tuple[int, ...]]


@contextmanager
def array_file(path: Path, names: Sequence[str]) -> Iterator[ArrayFile]:
    """An open file that is known to hold the names.

    Raises:
        RecipeError: neither .npz nor .safetensors, a name it does not hold, or damage met while reading.
    """
    with (_safetensors if path.suffix == ".safetensors" else _npz)(path, names) as opened:
        yield opened


@contextmanager
def _npz(path: Path, names: Sequence[str]) -> Iterator[ArrayFile]:
    with readable(path), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise RecipeError(f"{path.name} is not an .npz file, or is cut short", "save arrays with numpy.savez")
        try:
            with np.load(path, allow_pickle=False) as stored:
                _require_names(path, names, stored.files)
                yield ArrayFile(stored.__getitem__, lambda name: _shape(stored.zip, name))
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            # numpy's words for a pickle: "Object arrays cannot be loaded when allow_pickle=False".
            pickled = "pickle" in str(error)
            reason = "holds pickled objects, which are never loaded" if pickled else f"is damaged: {error}"
            raise RecipeError(f"{path.name} {reason}", "save plain arrays with numpy.savez") from error


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name) as member:
        version = np.lib.format.read_magic(member)
        first = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = header(member)[0]
        return shape


@contextmanager
def _safetensors(path: Path, names: Sequence[str]) -> Iterator[ArrayFile]:
    from safetensors import SafetensorError, safe_open

    with readable(path), path.open("rb"):
        try:
            with safe_open(path, framework="pt") as stored:
                _require_names(path, names, list(stored.keys()))

                def read(name: str) -> NDArray[Any]:
                    tensor = stored.get_tensor(name)
                    plain: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
                    return plain

                yield ArrayFile(read, lambda name: tuple(stored.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise RecipeError(f"{path.name} is no .safetensors file that can be read: {error}", _AGAIN) from error


_AGAIN = "save the arrays again, with safetensors or numpy.savez"


def _require_names(path: Path, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RecipeError(f"{path.name} has no array {name!r}", suggestion(name, known))
