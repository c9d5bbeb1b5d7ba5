import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint import Checkpoint, files
from aicompress.measure import directory_nbytes
from aicompress.pipeline import analysis
from aicompress.pipeline.analysis import Analysis, Distribution, RoundingLoss
from aicompress.pipeline.inspect import inspect
from tests.model.compressed import compress, integers, low_rank


def distribution(tensor: torch.Tensor) -> Distribution:
    return analysis.distribution([lambda: tensor])


def rounding(matrix: torch.Tensor, wanted: Analysis) -> RoundingLoss:
    return analysis.rounding([lambda: matrix], matrix.shape[1], distribution(matrix), wanted)


def test_every_parameter_has_a_row(tiny_llama: Path) -> None:
    found = inspect(tiny_llama)
    assert found.architecture == "LlamaForCausalLM"
    assert found.layout == "plain"
    rows = {row.name: row for row in found.rows}
    assert len(rows) == 1 + 3 * 9 + 1
    up = rows["model.layers.0.mlp.up_proj"]
    assert (up.kind, up.form, up.shape, up.dtype) == ("linear", "dense", (128, 64), "float32")
    assert up.bits == 32
    assert rows["model.norm.weight"].kind == "other"
    assert found.rows[0].distribution is None


def test_totals_add_up(tiny_bert: Path) -> None:
    found = inspect(tiny_bert)
    assert sum(total.count for total in found.totals) == len(found.rows)
    assert sum(total.numbers for total in found.totals) == found.side.parameters
    assert found.side.bytes == directory_nbytes(tiny_bert)
    sizes = [total.nbytes for total in found.totals]
    assert sizes == sorted(sizes, reverse=True)


def test_compressed_layers_say_how(tiny_llama: Path, tmp_path: Path) -> None:
    def pick(info, matrix):  # type: ignore[no-untyped-def]
        return (
            integers(matrix, 4, 32)
            if "up_proj" in info.name
            else (low_rank(matrix, 6, 8) if "down_proj" in info.name else None)
        )

    found = inspect(compress(tiny_llama, tmp_path / "out", pick))
    rows = {row.name: row for row in found.rows}
    assert found.layout == "native"
    assert rows["model.layers.2.mlp.up_proj"].detail == "4-bit, groups of 32"
    assert rows["model.layers.2.mlp.up_proj"].bits == 4 + 32 / 32
    assert rows["model.layers.2.mlp.down_proj"].detail == "rank 6 (8-bit × 8-bit)"
    assert rows["model.layers.2.mlp.down_proj"].numbers == 6 * (128 + 64)
    assert found.lineage == ({"command": "test"},)


def test_distribution_by_hand() -> None:
    found = distribution(torch.tensor([[0.0, 0.0], [2.0, -2.0]]))
    assert (found.low, found.high, found.mean, found.std) == (-2, 2, 0, pytest.approx(math.sqrt(2)))
    assert found.kurtosis == pytest.approx(8 / 4)  # mean of x⁴ is 8, the variance 2
    assert found.zeros == 0.5
    assert found.outliers == 0


def test_distribution_of_normal_numbers() -> None:
    values = torch.randn(1000, 300, generator=torch.Generator().manual_seed(0))
    found = distribution(values)
    assert found.kurtosis == pytest.approx(3, abs=0.05)
    assert found.outliers == pytest.approx(6.3e-5, abs=5e-5)
    values[3, 5] = 40.0
    spiked = distribution(values)
    assert found.row_spread is not None
    assert spiked.row_spread is not None
    assert spiked.row_spread > 4 * found.row_spread
    assert spiked.kurtosis > 4


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_do_not_change_a_distribution(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    whole = distribution(values)
    monkeypatch.setattr(analysis, "PIECE", 77)
    blocks = [lambda part=part: part for part in values.split(7, dim=axis)]  # type: ignore[misc]
    of_blocks = analysis.distribution(blocks, axis)
    assert of_blocks.kurtosis == pytest.approx(whole.kurtosis)
    assert of_blocks.row_spread == pytest.approx(whole.row_spread)
    assert (of_blocks.low, of_blocks.high, of_blocks.outliers) == (whole.low, whole.high, whole.outliers)


def test_constants_and_empty_tensors_have_a_distribution() -> None:
    assert distribution(torch.ones(4)).kurtosis == 0
    assert distribution(torch.zeros(3, 3)).row_spread is None
    assert distribution(torch.empty(0, 3)).std == 0


def test_analysis_covers_every_floating_parameter(cnn_file: Path) -> None:
    rows = {row.name: row for row in inspect(cnn_file, Analysis(group_size=4)).rows}
    assert rows["conv1"].distribution is not None
    assert rows["conv1"].distribution.std > 0
    assert rows["bn1.num_batches_tracked"].distribution is None


def test_an_analysis_reads_blocks_of_rows(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a layer that is stored (in, out) are columns of its tensor; what is found is that of the whole."""
    monkeypatch.setattr(files, "NARROW", 8)
    read_rows, sizes = Checkpoint.rows, list[int]()

    def noting(*given: Any) -> torch.Tensor:
        block = read_rows(*given)
        sizes.append(block.numel())
        return block

    monkeypatch.setattr(Checkpoint, "rows", noting)
    whole = inspect(tiny_gpt2, Analysis()).rows
    assert not sizes
    monkeypatch.setattr("aicompress.pipeline.inspect.PIECE", 2048)
    blocks = inspect(tiny_gpt2, Analysis()).rows
    assert max(sizes) <= 2048
    for row, other in zip(whole, blocks, strict=True):
        assert row.distribution is not None
        assert dataclasses.asdict(row.distribution) == pytest.approx(dataclasses.asdict(other.distribution))
        if row.rounding is not None:
            assert row.rounding.errors == pytest.approx(other.rounding.errors)
            assert row.rounding.levels == pytest.approx(other.rounding.levels)


def test_rounding_by_hand() -> None:
    """Codes -8 and 7 with scale 1 / 7.5, four of each: 2 levels in use; std 1, so the peak is 1."""
    found = rounding(torch.tensor([[-1.0, 1.0] * 4]), Analysis(group_size=8))
    assert found.levels == pytest.approx(2)
    assert found.peak == pytest.approx(1)
    # With b bits and n = (2^b - 1) / 2 steps to either end: |-1| is coded as round(n) / n and 1 as (round(n) - 1) / n.
    for bits, error in found.errors.items():
        n = (2**bits - 1) / 2
        assert error == pytest.approx(0.5 / n, rel=1e-4)
    assert found.proposed == 4
    assert rounding(torch.tensor([[-1.0, 1.0] * 4]), Analysis(8, 0.001)).proposed is None
    assert rounding(torch.zeros(2, 6), Analysis(4)).errors == {2: 0, 3: 0, 4: 0, 8: 0}


def test_proposals_are_those_of_range(tiny_llama: Path, tmp_path: Path) -> None:
    """What inspect proposes is what a recipe with bits: range does, layers of one input together."""
    from tests.pipeline.calibration.steps import planned, write_recipe

    method = {"name": "rtn", "bits": "range", "group_size": 16, "max_error": 0.085}
    recipe = write_recipe(tmp_path, None, method=method)
    summary = planned(tiny_llama, tmp_path / "out", recipe).summary()
    found = {row.name: row.rounding for row in inspect(tiny_llama, Analysis(16, 0.085)).rows if row.rounding}
    assert {row.name: row.detail["bits"] for row in summary.rows} == {
        row.name: found[row.name].proposed for row in summary.rows
    }
    assert {rounding.group for rounding in found.values()} == {16}
