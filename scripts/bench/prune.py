"""Pruning: our methods and their peers on one model, judged alike, in one run.

    python -m scripts.bench.prune --model M --calibration calibration.txt --text heldout.txt

Each measurement is a process of its own and a line in results.jsonl, so that a run can be cut and goes on when it is
called again. The tables hold what has been measured.
"""

from __future__ import annotations

import argparse
from typing import Any

from scripts.bench import inputs, running
from scripts.bench.encoder import pruned as sentences_pruned
from scripts.bench.encoder import rows as encoder
from scripts.bench.measuring import measure
from scripts.bench.rows import Row, Target, ours
from scripts.bench.tables import FORWARD, LANGUAGE, LAYERS, WHOLE, conditions, section

LLMC = "llm-compressor"
HALF, SEVENTH, PATTERN, BYTES, WIDTH = "50 %", "70 %", "2:4", "90 %, stored sparse", "Structured"
BLOCKS = "the matrices in the blocks; the embedding stays"
ALL = "the embedding too, which the head is tied to"
EVERY_MATRIX = "select.kinds=[linear,embedding]"
KEPT = 560 / 704  # neurons that stay in each feed-forward block
DENSE = "method.store=dense"


def mask(method: str, sparsity: float, pattern: str = "") -> dict[str, object]:
    """A setting of llm-compressor."""
    return {"method": method, "sparsity": sparsity, **({"pattern": pattern} if pattern else {})}


COLUMNS = (*LANGUAGE, WHOLE, LAYERS, FORWARD)
NO_SHARE = "method.sparsity=null"
BALANCED = "effort=balanced"
TWO_FOUR = 'method.pattern="2:4"'


def calibrated(key: str, group: str, recipe: str, *overrides: str, **more: Any) -> Row:
    """One of our methods that reads the calibration text."""
    return ours(key, group, recipe, *overrides, calibrated=True, seconds=60, **more)


def structured(key: str, recipe: str, *overrides: str, **more: Any) -> Row:
    """One of our methods that makes the model smaller: its forward pass is timed."""
    return ours(key, WIDTH, recipe, *overrides, forward=True, seconds=60, **more)


NAMED = {"group": "heads and their keys", "query": "query heads"}
PER_LAYER = "method.widths=per_layer"
NARROW = ("method.sparsity=null", f"method.keep={KEPT}", "method.multiple=1")


def both(percent: int, unit: str, heads: float) -> Row:
    """Heads first, then as many feed-forward neurons as are left of a share of the parameters in the blocks."""
    sizes = (
        "method.sparsity=null",
        f"method.target_parameters={{parameters:{1 - percent / 100}}}",
        "method.multiple=1",
    )
    return structured(
        f"{unit}-width-{percent}",
        "prune/width-obs",
        *sizes,
        before=("prune/heads-obs", f"method.sparsity={heads}", f"method.unit={unit}"),
        calibrated=True,
        note=f"{percent} % of the parameters in the blocks go, {heads:g} of the {NAMED[unit]} among them",
    )


PEERS = (
    Row("torch-magnitude-50", "torch", HALF, setting={"sparsity": 0.5}),
    Row("llmc-wanda-50", LLMC, HALF, setting=mask("wanda", 0.5), calibrated=True, seconds=60),
    Row("llmc-sparsegpt-50", LLMC, HALF, setting=mask("sparsegpt", 0.5), calibrated=True, seconds=60),
    Row("torch-magnitude-70", "torch", SEVENTH, setting={"sparsity": 0.7}),
    Row("llmc-sparsegpt-70", LLMC, SEVENTH, setting=mask("sparsegpt", 0.7), calibrated=True, seconds=60),
    Row("llmc-wanda-70", LLMC, SEVENTH, setting=mask("wanda", 0.7), calibrated=True, seconds=60),
    Row("llmc-wanda-2-4", LLMC, PATTERN, setting=mask("wanda", 0.5, "2:4"), calibrated=True, seconds=60),
    Row("llmc-sparsegpt-2-4", LLMC, PATTERN, setting=mask("sparsegpt", 0.5, "2:4"), calibrated=True, seconds=60),
    Row("torch-pruning-ffn", "torch-pruning", WIDTH, setting={"keep": KEPT}, forward=True, note="weight norm, no data"),
)
TAYLOR = "prune/taylor-50"  # with other parameters it is SNIP, and optimal brain damage
S50, S70, S24 = ("llmc-sparsegpt-50",), ("llmc-sparsegpt-70",), ("llmc-sparsegpt-2-4",)
FFN = ("torch-pruning-ffn",)
OURS = (
    ours("magnitude-50", HALF, "prune/magnitude-50", against=("torch-magnitude-50",)),
    ours("lamp-50", HALF, "prune/lamp-50", against=("torch-magnitude-50",)),
    calibrated("wanda-50", HALF, "prune/wanda-50", against=("llmc-wanda-50", *S50)),
    calibrated("sparsegpt-50", HALF, "prune/sparsegpt-50", against=S50),
    calibrated("alps-50", HALF, "prune/alps-50", against=S50),
    calibrated("alps-balanced-50", HALF, "prune/alps-50", BALANCED, against=S50),
    ours("magnitude-70", SEVENTH, "prune/magnitude-50", "method.sparsity=0.7", against=("torch-magnitude-70",)),
    calibrated("wanda-70", SEVENTH, "prune/wanda-50", "method.sparsity=0.7", against=("llmc-wanda-70", *S70)),
    calibrated("sparsegpt-70", SEVENTH, "prune/sparsegpt-50", "method.sparsity=0.7", against=S70),
    calibrated("alps-70", SEVENTH, "prune/alps-50", "method.sparsity=0.7", against=S70),
    ours("magnitude-2-4", PATTERN, "prune/magnitude-2-4", DENSE),
    calibrated("wanda-2-4", PATTERN, "prune/wanda-2-4", against=("llmc-wanda-2-4", *S24)),
    calibrated("sparsegpt-2-4", PATTERN, "prune/sparsegpt-50", NO_SHARE, TWO_FOUR, against=S24),
    calibrated("alps-2-4", PATTERN, "prune/alps-2-4", against=S24),
    calibrated("alps-balanced-2-4", PATTERN, "prune/alps-2-4", BALANCED, against=S24),
    calibrated("taylor-50", HALF, "prune/taylor-50", against=S50),
    calibrated("snip-50", HALF, TAYLOR, "method.moment=mean", "method.allocation=global", against=S50),
    calibrated("fisher-50", HALF, TAYLOR, "method.loss=own", "method.refit=false", against=S50),
    calibrated("sparsegpt-70-owl", SEVENTH, "prune/sparsegpt-70-owl", against=S70),
    calibrated("sparsegpt-70-auto", SEVENTH, "prune/sparsegpt-70-auto", against=S70),
    calibrated("sparsegpt-2-4-permuted", PATTERN, "prune/sparsegpt-2-4-permuted", against=S24),
    calibrated("taylor-2-4", PATTERN, "prune/taylor-2-4", against=S24),
    calibrated("taylor-70", SEVENTH, "prune/taylor-50", "method.sparsity=0.7", against=S70),
    ours("magnitude-90-sparse", BYTES, "prune/magnitude-90-sparse", half=True, note=BLOCKS),
    calibrated("alps-90-sparse", BYTES, "prune/alps-70-sparse", "method.sparsity=0.9", half=True, note=BLOCKS),
    ours("magnitude-90-sparse-all", BYTES, "prune/magnitude-90-sparse", EVERY_MATRIX, half=True, note=ALL),
    structured("width-norm", "prune/width-20", *NARROW, against=FFN),
    structured("width-activation", "prune/width-activation", *NARROW, calibrated=True, against=FFN),
    structured("width-taylor", "prune/width-taylor", *NARROW, calibrated=True, against=FFN),
    structured("width-obs", "prune/width-obs", *NARROW, calibrated=True, against=FFN),
    *(
        structured(
            f"width-{score}-per-layer", f"prune/width-{score}", *NARROW[:2], PER_LAYER, calibrated=True, against=FFN
        )
        for score in ("activation", "taylor", "obs")
    ),
    *(
        structured(f"hidden-{score}", f"prune/hidden-{score}", NO_SHARE, "method.hidden_size=208", calibrated=True)
        for score in ("activation", "taylor")
    ),
    both(20, "group", 0.5),
    both(20, "query", 0.5),
    both(40, "group", 0.5),
    both(40, "query", 0.5),
)
ROWS = (*PEERS, *OURS)
BEST = ("sparsegpt", "alps")
TARGETS = (
    *(Target(f"{method}-50", "kl", 1.0, "llmc-sparsegpt-50") for method in BEST),
    *(Target(f"{method}-50", "seconds", 0.5, "llmc-sparsegpt-50") for method in BEST),
    *(Target(f"{method}-2-4", "kl", 1.0, "llmc-sparsegpt-2-4") for method in BEST),
    *(Target(f"{method}-2-4", "seconds", 0.5, "llmc-sparsegpt-2-4") for method in BEST),
    *(Target(f"{method}-70", "kl", 1.0, "llmc-sparsegpt-70") for method in BEST),
    *(Target("magnitude-90-sparse", "layers", 0.2), Target("magnitude-90-sparse-all", "file", 0.2)),
    Target("width-obs", "kl", 0.79, "torch-pruning-ffn"),  # 0.20 beside 0.253
    *(Target(key, "forward_beside_parameters", 1.0) for key in ("width-obs", "group-width-20", "group-width-40")),
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_options(parser)
    encoder.add_options(parser)
    running.add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Measure what is asked for and not there yet, then print the tables."""
    given = options()
    bench, schedule = running.started(given)
    wanted, left, notes = given.parts or ("language", sentences_pruned.NAME), 0, []
    if given.list:
        print(running.listed([*ROWS, *sentences_pruned.ROWS], bench, schedule))
        return
    if "language" in wanted:
        judged = inputs.language_inputs(given, given.folder)
        notes += [note for note in (judged.in_words(), judged.note) if note]
        if not given.tables:
            left += running.run_rows(ROWS, bench, schedule, lambda row: measure(row, judged, bench), judged.described())
    if sentences_pruned.NAME in wanted and not given.tables:
        given.calibration = inputs.calibration_text(given, given.folder)
        left += sentences_pruned.run(given, bench, schedule)
    records = bench.store.records(bench.name)
    print("\n\n".join(["# Pruning", *notes, conditions(records)]), "\n")
    if "language" in wanted:
        print(section("Language model", ROWS, records, TARGETS, COLUMNS))
    if sentences_pruned.NAME in wanted:
        print(sentences_pruned.tables(records))
    if left:
        print(f"{left} measurements are left: call again, with the same --run, to go on")


if __name__ == "__main__":
    main()
