"""Times of factorized layers on one thread beside what their multiply-adds tell, and of ranks that kernels like.

python -m scripts.bench.factorize.times
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = ((1024, 1024), (1024, 4096))
ROWS = (1, 64, 512)
DTYPES = (torch.float32, torch.bfloat16)
SHARES = (1 / 8, 1 / 4)  # of the smaller side
LIMIT = 1.3  # times the share of the dense layer's time that the share of its multiply-adds is
ROUNDS = 12


@torch.inference_mode()
def ratios(shape: tuple[int, int], rows: int, dtype: torch.dtype, ranks: Sequence[int]) -> list[float]:
    """A factorized layer's time over its share of the dense one's, for each rank: the least of interleaved rounds.

    A thread's own time counts, so that others on the machine count less.
    """
    from aicompress.model.kernels.select import fast_linear
    from aicompress.weights import Dense, LowRank

    draw = torch.Generator().manual_seed(0)

    def made(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(dtype)

    inputs, (out, columns) = made(rows, shape[1]), shape
    weights = [Dense(made(*shape)), *(LowRank(Dense(made(out, r)), Dense(made(r, columns))) for r in ranks)]
    layers = [fast_linear(weight, None, dtype, resident=False) for weight in weights]
    least, repeats = [float("inf")] * len(layers), 1 if rows > 16 else 16
    for _, (at, layer) in itertools.product(range(ROUNDS), enumerate(layers)):
        start = time.thread_time()
        for _ in range(repeats):
            layer(inputs)
        least[at] = min(least[at], time.thread_time() - start)
    dense, *others = least
    return [each / dense * out * columns / (rank * (out + columns)) for each, rank in zip(others, ranks, strict=True)]


def table() -> list[str]:
    """Lines of Markdown: a row per layer, number of inputs and dtype, a column per share of the full rank."""
    torch.set_num_threads(1)
    shown = " | ".join(f"rank {share:g} of the full one" for share in SHARES)
    lines = [f"| layer | rows | dtype | {shown} |", f"|---|---:|---|{'---:|' * len(SHARES)}"]
    missed = 0
    for shape, rows, dtype in itertools.product(SHAPES, ROWS, DTYPES):
        found = ratios(shape, rows, dtype, [int(share * min(shape)) for share in SHARES])
        missed += sum(ratio > LIMIT for ratio in found)
        cells = " | ".join(f"{ratio:.2f}" for ratio in found)
        lines.append(f"| {shape[0]} x {shape[1]} | {rows} | {str(dtype).removeprefix('torch.')} | {cells} |")
    told = "met" if not missed else f"**missed** in {missed} cells"
    return [*lines, "", f"- time over the share of the multiply-adds, at most {LIMIT} is the target: {told}"]


if __name__ == "__main__":
    print("\n".join(table()))
