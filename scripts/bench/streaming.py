"""A large random Llama in bfloat16, from files to files: data-free quantization beside `cp -r` of its folder."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from scripts.bench import running
from scripts.bench.inputs import LENGTH, SAMPLES, Inputs
from scripts.bench.measuring import Bench, Failed, measure
from scripts.bench.rows import Row, Target, ours
from scripts.bench.store import Record
from scripts.bench.tables import LANGUAGE, section

NAME = "streaming"
GROUP = "From files to files"
ROWS = (
    Row("cp", "cp", GROUP, seconds=10),
    ours("stream-rtn-w4", GROUP, "quantize/rtn-w4", against=("cp", "llmc-stream-w4"), seconds=20, note="groups of 128"),
    ours("stream-rtn-w8", GROUP, "quantize/rtn-w8", against=("cp", "llmc-stream-w8"), seconds=20, note="per channel"),
    ours("stream-hqq-w4", GROUP, "quantize/hqq-w4", against=("cp", "hqq-stream-w4"), seconds=90, note="groups of 64"),
    Row(
        "llmc-stream-w4", "llm-compressor-stream", GROUP, setting={"scheme": "W4A16"}, seconds=30, note="groups of 128"
    ),
    Row("llmc-stream-w8", "llm-compressor-stream", GROUP, setting={"scheme": "W8A16"}, seconds=30, note="per channel"),
    Row(
        "hqq-stream-w4",
        "hqq",
        GROUP,
        setting={"bits": 4, "dump": False},
        seconds=400,
        long=True,
        note="groups of 64; the model is in memory",
    ),
)
TARGETS = (
    Target("stream-rtn-w4", "seconds", 2.8, "cp"),
    Target("stream-rtn-w4", "peak_rss", 700e6),
    Target("stream-hqq-w4", "seconds", 0.2, "hqq-stream-w4"),
)
COLUMNS = tuple(column for column in LANGUAGE if column.figure in ("seconds", "wall", "peak_rss", "bytes"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    group = parser.add_argument_group("streaming")
    group.add_argument("--layers", type=int, default=20, help="of the random Llama, 36 million parameters each")


def make_model(folder: Path, layers: int) -> Path:
    """A Llama of about 36 million parameters a layer with random weights, bfloat16, in four files."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size=sum(p.numel() for p in model.parameters()) * 2 // 4)
    return folder


def run(given: argparse.Namespace, bench: Bench, schedule: running.Schedule) -> int:
    """Measure the rows; returns how many measurements are left."""
    model = make_model(given.folder / f"llama-{given.layers}", given.layers)
    nothing = Inputs(model, Path(), Path(), SAMPLES, LENGTH, 0, 0)
    if not schedule.chosen(ROWS):
        return 0
    with suppress(Failed):  # the row itself will tell it
        measure(ROWS[0], nothing, bench, judge=False)  # once, so that the input is in the page cache for all
    return running.run_rows(
        ROWS, bench, schedule, lambda row: measure(row, nothing, bench, judge=False), {"layers": given.layers}
    )


def tables(records: list[Record]) -> str:
    """The tables of this part."""
    return section("Streaming", ROWS, records, TARGETS, COLUMNS)
