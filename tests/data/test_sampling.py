from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from aicompress.data import Data, choose, sentences, split
from aicompress.errors import RecipeError


def test_first_samples_without_a_seed_and_a_repeatable_choice_with_one() -> None:
    data = Data(text="t.txt", samples=20)
    assert choose(1000, data, None).tolist() == list(range(20))
    chosen = choose(1000, data, 3).tolist()
    assert chosen == choose(1000, data, 3).tolist() == sorted(set(chosen))
    assert chosen not in (list(range(20)), choose(1000, data, 4).tolist())
    assert choose(7, Data(text="t.txt"), 3).tolist() == list(range(7))


def test_a_source_of_fewer_samples_than_are_asked_for_is_taken_whole() -> None:
    for seed in (None, 3):
        assert choose(9, Data(text="t.txt", samples=20), seed).tolist() == list(range(9))
    with pytest.raises(RecipeError, match="holds no sample"):
        choose(0, Data(text="t.txt", samples=20), None)


@pytest.mark.parametrize(("count", "share", "size"), [(10, 0.2, 2), (3, 0.01, 1), (3, 0.99, 2), (101, 0.5, 50)])
def test_split_covers_every_sample_once(count: int, share: float, size: int) -> None:
    train, held_out = split(count, share, seed=5)
    assert len(held_out) == size
    assert sorted(train.tolist() + held_out.tolist()) == list(range(count))
    assert held_out.tolist() == split(count, share, seed=5)[1].tolist()


def test_split_depends_on_the_seed() -> None:
    assert split(1000, 0.1, seed=0)[1].tolist() != split(1000, 0.1, seed=1)[1].tolist()


@pytest.mark.parametrize(("count", "share"), [(10, 0.0), (10, 1.0), (1, 0.5), (10, float("nan"))])
def test_split_with_an_empty_side_is_refused(count: int, share: float) -> None:
    with pytest.raises(RecipeError, match="hold out"):
        split(count, share, seed=0)


def test_the_record_identifies_the_file_and_the_choice(text_file: Path) -> None:
    _, source = sentences(Data(text=str(text_file), samples=30), seed=9)
    assert source.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert source.nbytes == text_file.stat().st_size
    assert (source.kind, source.samples, source.available, source.seed) == ("text", 30, 180, 9)
