"""Which samples are taken, reproducibly, and the record of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aicompress.data.section import Data
from aicompress.data.text_files import data_errors
from aicompress.errors import RecipeError


@dataclass(frozen=True)
class SampleSource:
    """Record of where samples came from. `seed`, `available` and `samples` give the very same choice again.

    Attributes:
        kind: text, jsonl, csv, parquet, arrays, pairs, hub or drawn.
        path: name of the file, without its folders, or of the dataset; of drawn tokens what their frequencies follow.
        sha256: digest of the file; empty for a dataset of the hub.
        nbytes: bytes of the file; 0 for a dataset of the hub.
        samples: samples that were taken.
        available: samples that there were, or had been read when enough were found.
        seed: seed of the choice; None where the first samples were taken.
        skipped: rows that were left out, because they are null or empty.
        asked: samples that the section asks for, where it does.
        length: tokens in a sample, where the source holds too few for as many as the section asks.
        bos: tokens at the start of every window, which the tokenizer puts before a text; empty where there are none.
    """

    kind: str
    path: str
    sha256: str
    nbytes: int
    samples: int
    available: int
    seed: int | None
    skipped: int = 0
    asked: int | None = None
    bos: str = ""
    length: int | None = None


def record(data: Data, samples: int, available: int, seed: int | None, skipped: int = 0) -> SampleSource:
    """The record of samples taken from a source; reads a file once more for its digest."""
    nbytes = Path(data.path).stat().st_size if data.is_file else 0
    return SampleSource(data.kind, data.name, digest(data), nbytes, samples, available, seed, skipped, data.samples)


def digest(data: Data) -> str:
    """sha256 of a source's file; empty for what is no file.

    Raises:
        RecipeError: it cannot be read.
    """
    if not data.is_file:
        return ""
    with data_errors(Path(data.path)), Path(data.path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose(available: int, data: Data, seed: int | None, most: int | None = None) -> Tensor:
    """Indices of the samples to take, ascending: the first ones, or a random choice when a seed is given.

    As many as are asked for are taken, or all of a source that holds fewer.

    Args:
        most: how many are taken of a source that holds more, where the data section does not say.

    Raises:
        RecipeError: there is none.
    """
    if available == 0:
        raise RecipeError(f"{data.path} holds no sample", "")
    wanted = min(data.samples or most or available, available)
    if seed is None:
        return torch.arange(wanted)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:wanted].sort().values


def split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide samples at random into training and held-out ones.

    Args:
        count: how many samples there are.
        held_out: share of them that is held out, rounded to the nearest count but never to nothing.

    Returns:
        Indices of the training and of the held-out samples, each ascending.

    Raises:
        RecipeError: a side would be empty.
    """
    if not 0 < held_out < 1 or count < 2:
        raise RecipeError(f"cannot hold out {held_out} of {count} samples", "a share between 0 and 1, of at least two")
    size = min(max(1, round(count * held_out)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[size:].sort().values, order[:size].sort().values
