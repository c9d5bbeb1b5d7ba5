from pathlib import Path

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.measure import WallTimes
from aicompress.pipeline.step.timing import layer_latency
from aicompress.pipeline.step.timing.layer_latency import layers
from tests.model.compressed import compress, integers, low_rank


def test_alike_layers_are_timed_once_and_counted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three decoder layers of seven matrices; up_proj becomes 4-bit, down_proj low rank."""

    def pick(info, matrix):  # type: ignore[no-untyped-def]
        if "up_proj" in info.name:
            return integers(matrix, 4, 32)
        return low_rank(matrix, 6) if "down_proj" in info.name else None

    timed: list[int] = []

    def second_each(calls, rounds, warmup):  # type: ignore[no-untyped-def]
        for call in calls:
            call()
        timed.append(len(calls))
        return [WallTimes((1.0,) * rounds) for _ in calls]

    monkeypatch.setattr(layer_latency, "interleaved", second_each)
    found = layers(Checkpoint.open(tiny_llama), Checkpoint.open(compress(tiny_llama, tmp_path / "out", pick)))
    assert found is not None
    # Shapes: (64, 64) q o; (32, 64) k v; (128, 64) gate up and the 4-bit up; (64, 128) down, dense and low rank.
    assert sorted(timed) == [1, 1, 2, 2]
    assert found.before_ms == found.after_ms == 21_000
    assert found.what.startswith("sum over 21 matrix layers, 128 rows")


def test_blocks_of_large_layers_are_timed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer counts by its blocks; of a product the blocks of both factors do."""
    monkeypatch.setattr(layer_latency, "HELD", 1024)
    ran: list[int] = []

    def second_each(calls, rounds, warmup):  # type: ignore[no-untyped-def]
        ran.extend(call().shape[-1] for call in calls)
        return [WallTimes((1.0,) * rounds) for _ in calls]

    monkeypatch.setattr(layer_latency, "interleaved", second_each)
    source = Checkpoint.open(tiny_llama)
    found = layers(source, source)
    assert found is not None
    assert sorted(ran) == [8, 16, 16, 16]  # of 64 and of 128 columns
    assert found.before_ms == 3 * (4 + 2 + 2 + 4 + 8 + 8 + 8) * 1000
    assert found.what.endswith("; of those above 1,024 weights a block, times their number")
    for form, blocks in ((lambda w: low_rank(w, 6), 1 + 1), (lambda w: integers(w, 4, 32), 4)):
        ran.clear()
        out = compress(
            tiny_llama, tmp_path / f"{blocks}", lambda info, w, f=form: f(w) if "up_proj" in info.name else None
        )
        found = layers(source, Checkpoint.open(out))
        assert found is not None
        assert found.before_ms - found.after_ms == 3 * (8 - blocks) * 1000


def test_the_same_checkpoint_takes_the_same_time(tiny_bert: Path) -> None:
    checkpoint = Checkpoint.open(tiny_bert)
    found = layers(checkpoint, checkpoint)
    assert found is not None
    assert found.ratio == 1.0
    assert 0 < found.after_ms <= found.after_p95_ms


def test_convolutions_and_heads_count(cnn_file: Path, tiny_llama_untied: Path) -> None:
    cnn, llama = Checkpoint.open(cnn_file), Checkpoint.open(tiny_llama_untied)
    assert "3 matrix layers" in layers(cnn, cnn).what  # type: ignore[union-attr]
    assert "22 matrix layers" in layers(llama, llama).what  # type: ignore[union-attr]


def test_without_matrix_layers_there_is_no_latency(cnn_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    norms = {name: tensor for name, tensor in load_file(cnn_file).items() if name.startswith("bn")}
    save_file(norms, tmp_path / "norms.safetensors")
    empty = Checkpoint.open(tmp_path / "norms.safetensors")
    assert layers(empty, empty) is None
