"""Order and split of samples."""

from __future__ import annotations

import pytest
import torch

from aicompress.data import SampleSource
from aicompress.errors import RecipeError
from aicompress.pipeline.distillation.data.samples import TrainingSamples
from aicompress.pipeline.distillation.data.splits import Split, TokenSplit, by_tokens, split_samples

SOURCE = SampleSource("text", "text.txt", "", 0, 6, 6, None)


def padded() -> TrainingSamples:
    """Six texts of 1, 2, 3, 1, 2 and 3 tokens, the last ones padded on the left."""
    ids = torch.tensor([[7, 0, 0], [7, 8, 0], [7, 8, 9], [0, 0, 7], [0, 7, 8], [7, 8, 9]], dtype=torch.int32)
    return TrainingSamples({"input_ids": ids, "attention_mask": (ids > 0).int()}, torch.arange(6), SOURCE)


def test_a_batch_is_cut_to_its_longest_text() -> None:
    samples = padded()
    assert samples.tokens == 12
    batch = samples.batch(torch.tensor([1, 0]))
    assert batch.inputs["input_ids"].tolist() == [[7, 8], [7, 0]]
    assert batch.inputs["input_ids"].dtype is torch.int64
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0]
    assert samples.batch(torch.tensor([3, 4])).inputs["input_ids"].tolist() == [[0, 7], [7, 8]]


def test_an_epoch_uses_no_sample_twice_and_the_next_one_another_order() -> None:
    split = Split(torch.arange(10, 50), torch.arange(10), batch=8, seed=3)
    first, second = ([split.at(5 * epoch + step) for step in range(5)] for epoch in (0, 1))
    assert sorted(torch.cat(first).tolist()) == list(range(10, 50))
    assert sorted(torch.cat(second).tolist()) == list(range(10, 50))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_the_order_is_a_function_of_seed_and_step() -> None:
    steps = [Split(torch.arange(40), torch.arange(40, 44), 8, seed).at(7).tolist() for seed in (3, 3, 4)]
    assert steps[0] == steps[1]
    assert steps[0] != steps[2]


def test_batches_hold_texts_of_like_length() -> None:
    lengths = torch.arange(1, 65).flip(0)
    split = Split(torch.arange(64), torch.tensor([0]), 8, 0, lengths)
    spans = [int(lengths[split.at(step)].max() - lengths[split.at(step)].min()) for step in range(8)]
    assert max(spans) == 7


def test_used_are_the_samples_of_the_steps() -> None:
    split = Split(torch.arange(40), torch.arange(40, 44), 8, 0)
    assert split.used(2).tolist() == sorted(torch.cat([split.at(0), split.at(1)]).tolist())
    assert split.used(50).tolist() == list(range(40))


def test_a_held_out_share_is_apart() -> None:
    split = split_samples(padded(), held_out=0.3, batch=4, seed=0)
    assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == list(range(6))
    assert len(split.held_out) == 2


def test_few_samples_are_one_batch() -> None:
    assert split_samples(padded(), held_out=0.1, batch=6, seed=0).batch == 5
    assert split_samples(padded(), held_out=0.1, batch=6, seed=0, parts=2).batch == 4
    with pytest.raises(RecipeError, match="leaves 5 training samples, a batch is divided by 6"):
        split_samples(padded(), held_out=0.1, batch=6, seed=0, parts=6)


def test_steps_of_so_many_tokens() -> None:
    lengths = torch.tensor([1 + number % 12 for number in range(120)])
    split = TokenSplit(torch.arange(100), torch.arange(100, 120), 8, 3, lengths, tokens=24, sizes=lengths)
    steps = [split.at(step) for step in range(200)]
    assert all(int(lengths[index].max()) * len(index) <= 24 for index in steps)
    count = next(n for n in range(200) if not split.repeats(n) and split.repeats(n + 1))
    assert 30 <= count <= 45  # 640 tokens, and padding
    assert sorted(torch.cat(steps[:count]).tolist()) == list(range(100))
    assert torch.cat(steps[:count]).tolist() != torch.cat(steps[count : 2 * count]).tolist()
    assert split.used(count).tolist() == split.train.tolist()
    assert split.used(2).tolist() == sorted(torch.cat(steps[:2]).tolist())
    assert split.first(5).tolist() == torch.cat(steps)[:5].tolist()


def test_a_sample_that_no_step_holds_is_refused() -> None:
    split = split_samples(padded(), 0.2, 2, 0)
    assert by_tokens(split, padded(), 3).tokens == 3
    with pytest.raises(RecipeError, match="a sample takes 3"):
        by_tokens(split, padded(), 2)
    arrays = TrainingSamples({"": torch.zeros(6, 2)}, None, SOURCE)
    with pytest.raises(RecipeError, match="the data has none"):
        by_tokens(split, arrays, 8)
