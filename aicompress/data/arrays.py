"""Labelled arrays out of an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aicompress.data.sampling import Source, choose, record
from aicompress.data.section import Data
from aicompress.data.text_files import readable
from aicompress.errors import RecipeError, suggestion


def arrays(data: Data, seed: int | None = None, most: int | None = None) -> tuple[Tensor, Tensor | None, Source]:
    """Inputs, labels (samples,) int64 where they are named, and the record.

    Inputs are float32 divided by `scale`, in the shape they are stored in, (samples, ...); 32 and 64-bit integers are
    token ids and become int64.

    Args:
        most: how many are taken of a source that holds more, where the data section does not say.

    Raises:
        RecipeError: not an .npz of plain arrays, a name it does not hold, or shapes that do not fit.
    """
    if data.arrays is None or data.inputs is None:
        raise RecipeError(f"{data.path}: {data.kind} holds no arrays", "arrays: file.npz, with inputs")
    path = Path(data.arrays)
    names = [name for name in (data.inputs, data.labels) if name is not None]
    with archive(path, names) as opened:
        stored: dict[str, NDArray[np.generic]] = {name: opened[name] for name in names}
    inputs = stored[data.inputs]
    if inputs.ndim < 1 or inputs.dtype.kind not in "buif":
        raise RecipeError(f"{path.name}: {data.inputs!r} is {inputs.dtype} {inputs.shape}, not samples of numbers", "")
    taken = choose(len(inputs), data, seed, most)
    labels = None if data.labels is None else _labels(path, data.labels, stored[data.labels], len(inputs))[taken]
    return _inputs(path, data, inputs[taken.numpy()]), labels, record(data, len(taken), len(inputs), seed)


@contextmanager
def archive(path: Path, names: Sequence[str]) -> Iterator[Any]:
    """An open .npz file that is known to hold the names; an array is read where it is asked for.

    Raises:
        RecipeError: not an .npz file, a name it does not hold, or damage met while reading.
    """
    with readable(path), path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise RecipeError(f"{path.name} is not an .npz file, or is cut short", "save arrays with numpy.savez")
        try:
            with np.load(path, allow_pickle=False) as stored:
                for name in names:
                    if name not in stored.files:
                        raise RecipeError(f"{path.name} has no array {name!r}", suggestion(name, stored.files))
                yield stored
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            # numpy's words for a pickle: "Object arrays cannot be loaded when allow_pickle=False".
            pickled = "pickle" in str(error)
            reason = "holds pickled objects, which are never loaded" if pickled else f"is damaged: {error}"
            raise RecipeError(f"{path.name} {reason}", "save plain arrays with numpy.savez") from error


def _inputs(path: Path, data: Data, inputs: NDArray[np.generic]) -> Tensor:
    if inputs.dtype.kind in "ui" and inputs.dtype.itemsize >= 4 and data.scale == 1.0:
        return torch.from_numpy(inputs.astype(np.int64))
    values = torch.from_numpy(inputs.astype(np.float32)).div_(data.scale)
    if not bool(torch.isfinite(values).all()):
        raise RecipeError(f"{path.name}: {data.inputs!r} holds NaN or infinite values", "clean the data")
    return values


def _labels(path: Path, name: str, labels: NDArray[np.generic], samples: int) -> Tensor:
    if labels.shape != (samples,) or labels.dtype.kind not in "ui":
        raise RecipeError(
            f"{path.name}: labels {name!r} are {labels.dtype} {labels.shape}, not whole numbers ({samples},)",
            "one class number a sample",
        )
    return torch.from_numpy(labels.astype(np.int64))
