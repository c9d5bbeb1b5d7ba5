"""Times of factorized layers on one thread beside what their multiply-adds tell.

python -m scripts.bench.factorize.times

In brackets stand what both products take alone, each by the fastest call that PyTorch has for it in that dtype, and
what it takes to read the inputs and to write the outputs, by the time of a copy: thin products read and write much for
what they multiply.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

SHAPES = ((1024, 1024), (1024, 4096))
ROWS = (1, 64, 512)
DTYPES = (torch.float32, torch.bfloat16)
SHARES = (1 / 16, 1 / 8, 1 / 4)  # of the smaller side
LIMIT = 1.3  # times the share of the dense layer's time that the share of its multiply-adds is
ROUNDS = 12


def products(x: Tensor, matrix: Tensor) -> list[Callable[[], Tensor]]:
    """The ways that PyTorch has of a product x Wᵀ."""
    from aicompress.model.kernels.linear import has_fast_bfloat16

    turned = matrix.t().contiguous()
    calls = [lambda: linear(x, matrix), lambda: torch.mm(x, turned)]
    if x.dtype is torch.bfloat16 and has_fast_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "none"))
    return calls


@torch.inference_mode()
def ratios(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, ranks: Sequence[int]
) -> tuple[list[float], list[float], list[float]]:
    """A factorized layer's time over its share of the dense one's, for each rank: the least of interleaved rounds.

    A thread's own time counts, so that others on the machine count less.

    Returns:
        Of the layer as `load` runs it, of both products alone, each by its fastest call, and of reading and writing.
    """
    from aicompress.model.kernels.select import fast_linear
    from aicompress.weights import Dense, LowRank

    draw = torch.Generator().manual_seed(0)

    def made(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(dtype)

    inputs, (out, columns) = made(rows, shape[1]), shape
    weights = [Dense(made(*shape)), *(LowRank(Dense(made(out, r)), Dense(made(r, columns))) for r in ranks)]
    layers = [fast_linear(weight, None, dtype, resident=False, keep=True) for weight in weights]
    running: list[list[Callable[[], Tensor]]] = [[partial(layer, inputs)] for layer in layers]
    for rank in ranks:
        running += [products(inputs, made(rank, columns)), products(made(rows, rank), made(out, rank))]
    running.append([inputs.clone])
    least, repeats = [float("inf")] * len(running), max(2, min(16, 256 // rows))
    for _, (at, calls) in itertools.product(range(ROUNDS), enumerate(running)):
        for call in calls:
            call()  # what ran before has filled the caches with its own
            start = time.thread_time()
            for _ in range(repeats):
                call()
            least[at] = min(least[at], time.thread_time() - start)
    dense, own, parts, copied = least[0], least[1 : len(layers)], least[len(layers) : -1], least[-1]
    shares = [rank * (out + columns) / (out * columns) for rank in ranks]
    alone = [parts[at] + parts[at + 1] for at in range(0, len(parts), 2)]

    def over_ideal(times: Sequence[float]) -> list[float]:
        return [each / dense / share for each, share in zip(times, shares, strict=True)]

    return over_ideal(own), over_ideal(alone), over_ideal([copied * (columns + out) / (2 * columns)] * len(ranks))


def table() -> list[str]:
    """Lines of Markdown: a row per layer, number of inputs and dtype, a column per share of the full rank."""
    torch.set_num_threads(1)
    shown = " | ".join(f"rank {share:g} of the full one" for share in SHARES)
    lines = [f"| layer | rows | dtype | {shown} |", f"|---|---:|---|{'---:|' * len(SHARES)}"]
    missed = 0
    for shape, rows, dtype in itertools.product(SHAPES, ROWS, DTYPES):
        found, alone, moved = ratios(shape, rows, dtype, [int(share * min(shape)) for share in SHARES])
        missed += sum(ratio > LIMIT for ratio in found)
        figures = zip(found, alone, moved, strict=True)
        cells = " | ".join(f"{own:.2f} ({products:.2f}, {copied:.2f})" for own, products, copied in figures)
        lines.append(f"| {shape[0]} x {shape[1]} | {rows} | {str(dtype).removeprefix('torch.')} | {cells} |")
    told = "met" if not missed else f"**missed** in {missed} cells"
    return [*lines, "", f"- time over the share of the multiply-adds, at most {LIMIT} is the target: {told}"]


if __name__ == "__main__":
    print("\n".join(table()))
