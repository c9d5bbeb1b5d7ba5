"""A sentence encoder that waits for orders, so that runtimes of different venvs are timed in turn.

Each line on standard input is one order: a forward pass that is not counted, to have caches warm, and one that is; the
answer is its milliseconds. Runs in either venv.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def by_torch(path: Path, ids: np.ndarray) -> Callable[[], object]:
    """A checkpoint in any form, by aicompress.load; an uncompressed one is plain torch."""
    import torch

    import aicompress

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = aicompress.load(path)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.int64)}

    @torch.inference_mode()
    def run() -> object:
        return model(**inputs)

    return run


def by_onnx(path: Path, ids: np.ndarray) -> Callable[[], object]:
    """An ONNX file, by onnxruntime."""
    from scripts.bench.peers.onnx_int8 import session

    running = session(path)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return lambda: running.run(None, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a checkpoint, or an .onnx file")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1000)
    given = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, given.vocabulary, (given.batch, given.length), dtype=np.int64)
    run = (by_onnx if given.path.suffix == ".onnx" else by_torch)(given.path, ids)
    for _ in range(3):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        run()
        start = time.perf_counter()
        run()
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
