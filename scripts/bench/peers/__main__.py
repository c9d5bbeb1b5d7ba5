"""Run one setting of one peer, in the peers' venv: load, compress, save, and write the seconds of each.

python -m scripts.bench.peers llm-compressor --model M --out O --figures F.json --setting '{"method": "rtn", "bits": 4}'
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

import torch

from scripts.bench.peers.job import Job

PEERS = {
    "llm-compressor": "llm_compressor:compress",
    "llm-compressor-stream": "llm_compressor:stream",
    "hqq": "data_free:hqq",
    "quanto": "data_free:quanto",
    "auto-round": "rounding:auto_round",
    "torch": "pruning:magnitude",
    "torch-pruning": "pruning:feed_forward",
    "onnxruntime": "onnx_int8:compress",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the output")
    parser.add_argument("--figures", type=Path, required=True, help="file of the figures")
    parser.add_argument("--setting", type=json.loads, default={}, help="JSON")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    job = Job(**{name: value for name, value in vars(given).items() if name != "peer"})
    module, function = PEERS[given.peer].split(":")
    getattr(importlib.import_module(f"scripts.bench.peers.{module}"), function)(job)
    job.write()


if __name__ == "__main__":
    main()
