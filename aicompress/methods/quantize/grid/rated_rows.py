"""One step for a layer that is read in blocks of rows: how often each code occurs is held, and no code.

The step is searched on sampled rows first, as of a layer that is held. Then whole passes count the codes of every
column, and the bits that they take are those of the static models which the counts give and the stream is written
with: less than a thousandth off a stream of millions of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.rated import (
    ESTIMATED,
    MEASURED,
    SAMPLE,
    Problem,
    Rated,
    RatedConfig,
    RatedRounding,
    buckets,
    code_lengths,
    first_log,
    floor_of,
    near,
    one_pass,
    tables_of,
)
from aicompress.weights.coding.quantizers import in_use
from aicompress.weights.coding.writing import static_bits


def shared_scheme(
    blocks: Sequence[Callable[[], Tensor]], shape: tuple[int, int], bits: float, config: RatedConfig
) -> RatedRounding:
    """How to round a layer so that its codes take so many bits each once they are entropy-coded.

    Blocks are read once, and again for each of up to five passes, mostly two.

    Args:
        blocks: functions that read W's blocks of rows, in order; of a trellis each has whole blocks of its states.
        shape: of W.
        bits: per code.
        config: gives the quantizer and what a saved bit counts.
    """
    (rows, columns), trellis = shape, config.quantizer == "trellis"
    sample, spread = _sampled(blocks, shape)
    if not (spread > 0).any():
        return RatedRounding.first(0.0, columns, trellis)
    scheme = RatedRounding.first(first_log(spread, torch.ones(columns), bits, trellis), columns, trellis)
    for _ in range(ESTIMATED):
        tables, bucket, taken = tables_of(rated_rows(sample, scheme, config).codes, trellis)
        scheme = scheme.next(taken, bits, tables, bucket)
    best: tuple[float, RatedRounding] | None = None
    for _ in range(MEASURED):
        counts = torch.zeros(columns, 2 if trellis else 1, 256, dtype=torch.int64)
        for read in blocks:
            _count(rated_rows(read(), scheme, config), counts)
        taken = static_bits(counts.numpy()) / (rows * columns)
        best = (abs(taken - bits), scheme) if best is None or abs(taken - bits) < best[0] else best
        if near(taken, bits, rows * columns) or (taken > bits and int(counts[:, :, 128].sum()) == rows * columns):
            break
        bucket = buckets(_variance(counts.sum(dim=1)), rows)
        of_buckets = torch.zeros(int(bucket.max()) + 1, *counts.shape[1:], dtype=torch.int64)
        scheme = scheme.next(taken, bits, code_lengths(of_buckets.index_add_(0, bucket, counts))[0], bucket)
    assert best is not None
    return best[1]


def rated_rows(rows: Tensor, scheme: RatedRounding, config: RatedConfig) -> Rated:
    """Codes of some rows (rows, in) of a layer all of whose columns have one step."""
    problem = Problem(rows.t().contiguous(), None, torch.ones(rows.shape[1]), None)
    return one_pass(problem, floor_of(problem, config.quantizer == "trellis"), scheme, config)


def _sampled(blocks: Sequence[Callable[[], Tensor]], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows at equal distances, and the root mean square of every column."""
    rows, columns = shape
    every, first = max(1, rows // SAMPLE), 0
    sample, squares = torch.empty(-(-rows // every), columns), torch.zeros(columns)
    for read in blocks:
        weight = read()
        squares += weight.square().sum(dim=0)
        taken = weight[-first % every :: every]
        sample[-(-first // every) :][: len(taken)] = taken
        first += len(weight)
    return sample, (squares / rows).sqrt()


def _count(rated: Rated, counts: Tensor) -> None:
    """Add how often each code occurs in each column, (in, models, 256)."""
    models = counts.shape[1]
    place = torch.arange(0, len(counts) * models, models)[:, None]
    if rated.trellis:
        place = place + in_use(rated.codes.t()).t()
    place = place * 256 + (rated.codes.long() + 128)
    counts += torch.bincount(place.reshape(-1), minlength=counts.numel()).reshape(counts.shape)


def _variance(counts: Tensor) -> Tensor:
    """The variance of the codes of each column, which occur so often: (in, 256)."""
    often, code = counts.double(), torch.arange(-128.0, 128.0, dtype=torch.float64)
    total = often.sum(dim=1)
    return (often @ code.square()) / total - ((often @ code) / total).square()
