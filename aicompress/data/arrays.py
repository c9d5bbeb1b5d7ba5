"""Arrays out of a file: the inputs of any model, one or several by name, and their labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aicompress.data.sampling import SampleSource, choose, record
from aicompress.data.section import Data
from aicompress.data.text_files import data_errors
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
    with data_errors(path), path.open("rb") as file:
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

    with data_errors(path), path.open("rb"):
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


WHOLE = ("_ids", "_mask")  # ends of the names of inputs that are whole numbers, however they are stored


def arrays(data: Data, seed: int | None = None, most: int | None = None) -> tuple[Tensor, Tensor | None, SampleSource]:
    """Inputs, labels (samples,) int64 where they are named, and the record.

    Inputs are float32 divided by `scale`, in the shape they are stored in, (samples, ...); 32 and 64-bit integers are
    token ids and become int64.

    Args:
        most: how many are taken of a source that holds more, where the data section does not say.

    Raises:
        RecipeError: no file of plain arrays, a name it does not hold, or shapes that do not fit.
    """
    named, labels, source = named_arrays(data, seed, most)
    if len(named) != 1:
        raise RecipeError(f"{data.path}: {len(named)} inputs are named, and one is read here", "inputs: one name")
    return next(iter(named.values())), labels, source


def named_arrays(
    data: Data, seed: int | None = None, most: int | None = None
) -> tuple[dict[str, Tensor], Tensor | None, SampleSource]:
    """Inputs by name, labels (samples,) int64 where they are named, and the record.

    Of several inputs those called `..._ids` or `..._mask` are whole numbers, however they are stored.

    Args:
        most: as for `arrays`.

    Raises:
        RecipeError: as for `arrays`.
    """
    if data.arrays is None:
        raise RecipeError(f"{data.path}: {data.kind} holds no arrays", "arrays: file.npz, with inputs")
    path = Path(data.arrays)
    names = data.input_names
    labelled = [] if data.labels is None else [data.labels]
    with array_file(path, [*names, *labelled]) as opened:
        count = _count(path, opened, data)
        stored = {name: opened.read(name) for name in (*names, *labelled)}
    for name in names:
        if stored[name].ndim < 1 or stored[name].dtype.kind not in "buif":
            what = f"{stored[name].dtype} {stored[name].shape}"
            raise RecipeError(f"{path.name}: {name!r} is {what}, not samples of numbers", "(samples, ...) is expected")
    taken = choose(count, data, seed, most)
    labels = None if data.labels is None else _labels(path, data.labels, stored[data.labels], count)[taken]
    several = len(names) > 1
    inputs = {name: _inputs(path, name, stored[name][taken.numpy()], data.scale, several) for name in names}
    return inputs, labels, record(data, len(taken), count, seed)


def require_same_samples(data: Data) -> None:
    """Refuse inputs that hold different numbers of samples; their headers are enough.

    Raises:
        RecipeError: they do.
    """
    path = Path(data.path)
    labelled = [] if data.labels is None else [data.labels]
    with array_file(path, [*data.input_names, *labelled]) as opened:
        _count(path, opened, data)


def _count(path: Path, opened: ArrayFile, data: Data) -> int:
    """How many samples each of the inputs holds."""
    shapes = {name: opened.shape(name) for name in data.input_names}
    counts = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    first = data.input_names[0]
    other = next((name for name, count in counts.items() if count != counts[first]), None)
    if other is not None:
        message = f"{path.name}: {first!r} is {shapes[first]} and {other!r} is {shapes[other]}"
        raise RecipeError(message, "their first axes are the same samples: give them the same length")
    return counts[first]


def _inputs(path: Path, name: str, stored: NDArray[np.generic], scale: float, several: bool) -> Tensor:
    whole = stored.dtype.kind in "ui" and stored.dtype.itemsize >= 4 and (several or scale == 1.0)
    if whole or (several and stored.dtype.kind in "bui" and name.endswith(WHOLE)):
        return torch.from_numpy(stored.astype(np.int64))
    values = torch.from_numpy(stored.astype(np.float32)).div_(scale)
    if not bool(torch.isfinite(values).all()):
        raise RecipeError(f"{path.name}: {name!r} holds NaN or infinite values", "clean the data")
    return values


def _labels(path: Path, name: str, labels: NDArray[Any], samples: int) -> Tensor:
    if labels.shape != (samples,) or labels.dtype.kind not in "ui":
        raise RecipeError(
            f"{path.name}: labels {name!r} are {labels.dtype} {labels.shape}, not whole numbers ({samples},)",
            "one class number a sample",
        )
    return torch.from_numpy(labels.astype(np.int64))
