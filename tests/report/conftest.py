"""One realistic report, written by hand."""

from __future__ import annotations

import pytest

from aicompress.report.model import Gate, Latency, LayerRow, Report, Side

HIDDEN, INTERMEDIATE, BLOCKS = 384, 1536, 6


def sample_layers() -> tuple[LayerRow, ...]:
    """The layers of a six-block encoder: linears at 4 bits (down projections at 8), the embedding left alone."""
    rows = [
        LayerRow(
            "embeddings.word_embeddings",
            "embedding",
            "-",
            "-",
            "dense",
            {},
            46881792,
            46881792,
            0.0,
            0.0,
            "left as it is",
        )
    ]
    shapes = {
        "attention.self.query": HIDDEN * HIDDEN,
        "attention.self.value": HIDDEN * HIDDEN,
        "intermediate.dense": HIDDEN * INTERMEDIATE,
        "output.dense": HIDDEN * INTERMEDIATE,
    }
    for block in range(BLOCKS):
        for at, (name, count) in enumerate(shapes.items()):
            bits = 8 if name == "output.dense" else 4
            rows.append(
                LayerRow(
                    name=f"encoder.layer.{block}.{name}",
                    kind="linear",
                    rule="rules[0]: *.output.dense" if bits == 8 else "method",
                    method="rtn",
                    form="int_grouped",
                    detail={"bits": bits, "group_size": 64},
                    bytes_before=4 * count,
                    bytes_after=count * bits // 8 + count // 64 * 2,
                    rel_error=(0.0061 if bits == 8 else 0.0912) * (1 + 0.04 * block + 0.02 * at),
                    seconds=0.0123 + 0.001 * at,
                    note="kept at 8 bits: most sensitive" if block == 0 and bits == 8 else "",
                )
            )
    return tuple(rows)


def sample_report() -> Report:
    """A quantization of a small sentence encoder, one gate failed."""
    return Report(
        command="quantize",
        tool_version="0.1.0",
        before=Side(
            "build/minilm",
            91_600_000,
            90_868_376,
            22_713_216,
            {"linear": 42_467_328, "embedding": 47_671_296, "other": 716_912, "header": 12_840},
            {"model.safetensors": "a" * 64},
        ),
        after=Side(
            "build/minilm-q4",
            56_900_000,
            56_123_456,
            22_713_216,
            {"linear": 7_372_800, "embedding": 47_671_296, "scale": 347_508, "other": 716_912, "header": 14_940},
            {"model.safetensors": "b" * 64},
        ),
        layers=sample_layers(),
        latency=Latency("whole model, 8 x 64 tokens", 48.2, 29.4, 51.0, 31.75, 30),
        quality={
            "kl": {"value": 0.0123, "low": 0.0117, "high": 0.0129, "n": 102400},
            "accuracy": {"value": 0.8123, "low": 0.79, "high": 0.83, "n": 1500, "baseline": 0.8201},
            "similarity": {"spearman": 0.9876},
        },
        training={
            "best_step": 300,
            "curve": [
                {"step": 0, "loss": 2.5, "held_out": 2.6},
                {"step": 150, "loss": 1.25, "held_out": 1.5},
                {"step": 300, "loss": 0.75, "held_out": 1.0},
            ],
        },
        warnings=("1 layer was not selected: it holds 83.5 % of the output's bytes",),
        gates=(Gate("size.ratio <= 0.3", 0.6176, False), Gate("quality.kl <= 0.05", 0.0123, True)),
        environment={"python": "3.12.1", "torch": "2.13.0", "threads": 2, "cpu": {"model": "x86_64", "cores": 2}},
        recipe={
            "version": 1,
            "method": {"name": "rtn", "bits": 4, "group_size": 64},
            "rules": [{"match": "*.output.dense", "bits": 8}],
            "seed": 0,
            "gates": ["size.ratio <= 0.3", "quality.kl <= 0.05"],
        },
        lineage=(
            {
                "command": "prune",
                "recipe": {"method": {"name": "depth", "keep": 6}},
                "recipe_sha256": "c" * 64,
                "tool": "aicompress 0.1.0",
                "seed": 0,
                "inputs": {"model.safetensors": "d" * 64},
            },
        ),
        seconds=12.34,
        peak_rss=412_000_000,
    )


@pytest.fixture
def report() -> Report:
    return sample_report()
