"""Checkpoints that students and teachers of several tests are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import checkpoints


def once(path: Path, make: Callable[[Path], Path]) -> Path:
    """A checkpoint that the first worker to ask for it makes."""
    from tests import inputs  # a plugin: pytest has to be the first that imports it

    return inputs.once(path, make)


@pytest.fixture(scope="session")
def shallow_llama(built: Path) -> Path:
    """A random Llama of two layers with the tokenizer of `trained_llama`."""
    return once(built / "llama-shallow", lambda path: checkpoints.make_llama(path, num_hidden_layers=2))


@pytest.fixture(scope="session")
def wide_bert(built: Path) -> Path:
    """A BERT wider and deeper than `tiny_bert`."""
    return once(built / "bert-wide", lambda path: checkpoints.make_bert(path, hidden_size=64, num_hidden_layers=4))


@pytest.fixture(scope="session")
def other_bert(built: Path) -> Path:
    """A BERT with the shape of `tiny_bert` and other weights."""
    return once(built / "bert-other", lambda path: checkpoints.make_bert(path, initializer_range=0.2))
