"""onnxruntime: a sentence encoder exported to ONNX, and its dynamic 8-bit quantization."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.peers.job import Job

BATCH = 32  # sentences that are embedded at a time


def compress(job: Job) -> None:
    """model.onnx and int8.onnx in the output, and the sentences' embeddings under the quantized one.

    Setting: `linears` leaves the embedding in float, as our 8-bit recipe does; `texts` is a JSON file of sentences.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    job.out.mkdir(parents=True, exist_ok=True)
    exported, quantized = job.out / "model.onnx", job.out / "int8.onnx"
    with job.timed("export_seconds"):
        export(job, exported)
    only = {"op_types_to_quantize": ["MatMul", "Gemm"]} if job.setting.get("linears") else {}
    with job.timed("compress_seconds"):
        quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8, **only)
    job.finished(quantized.stat().st_size)
    if "texts" in job.setting:
        with job.timed("dump_seconds"):
            texts = json.loads(Path(job.setting["texts"]).read_text(encoding="utf-8"))
            np.save(job.out / "embeddings.npy", embed(job, quantized, texts))


def export(job: Job, path: Path) -> None:
    """The encoder's last hidden state, any batch and length, in one file."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(job.model, dtype=torch.float32).eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.ones(2, 16, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    names = ["input_ids", "attention_mask"]
    program = torch.onnx.export(
        Encoder(), (ids, torch.ones_like(ids)), input_names=names, dynamic_shapes=(sizes, sizes), dynamo=True
    )
    program.save(str(path))


def session(path: Path) -> Any:
    """A running ONNX file, with the threads that OMP_NUM_THREADS names."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def embed(job: Job, path: Path, texts: list[str]) -> np.ndarray:
    """Mean of the token states of each sentence, (sentences, width)."""
    running, tokenizer = session(path), job.tokenizer()
    rows = []
    for at in range(0, len(texts), BATCH):
        taken = tokenizer(texts[at : at + BATCH], padding=True, truncation=True, max_length=128, return_tensors="np")
        mask = taken["attention_mask"]
        (states,) = running.run(None, {"input_ids": taken["input_ids"], "attention_mask": mask})
        rows.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))
    return np.concatenate(rows)
