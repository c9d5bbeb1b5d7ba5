"""Options that commands share: one spelling and one meaning each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aicompress.pipeline.step.options import Mode


def to_do(*names: str, help: str, **settings: Any) -> Any:
    """An option that says what to do; it names no default."""
    return typer.Option(*names, help=help, rich_help_panel="What to do", show_default=False, **settings)


def where(*names: str, help: str, **settings: Any) -> Any:
    """An option that says where and how; of a switch or a choice the default is shown."""
    shown = "metavar" not in settings
    return typer.Option(*names, help=help, rich_help_panel="Where and how", show_default=shown, **settings)


Source = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="A Hugging Face directory, one .safetensors, an index.json, or hf://org/name.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="A directory, or one file if it ends in .safetensors.", show_default=False)
]
RecipeName = Annotated[
    str | None,
    to_do(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped one such as quantize/rtn-w4. One that needs no data if left out.",
    ),
]
Adapters = Annotated[
    list[str],
    to_do(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        help="A LoRA adapter (PEFT) that is merged into IN as it is read, times WEIGHT. Repeatable.",
    ),
]
Overrides = Annotated[
    list[str],
    to_do(
        "--set",
        metavar="KEY=VALUE",
        help="Edit the recipe: --set method.bits=3. Paths start here, those of a recipe at its folder. Repeatable.",
    ),
]
Text = Annotated[
    Path | None,
    to_do(
        "--text",
        metavar="FILE",
        help="The text that the recipe reads for calibration, training and figures: one sample a line, or running; of "
        ".jsonl, .json, .csv, .tsv and .parquet the field 'text' of every row. Rows with labels, pairs or arrays for "
        "recipes that read these.",
    ),
]
Drawn = Annotated[
    int | None,
    to_do(
        "--drawn",
        metavar="N",
        min=1,
        help="Calibrate without data: on N samples drawn from the tokenizer's vocabulary. With --text, on both.",
    ),
]
EffortName = Annotated[
    Literal["fast", "balanced", "best"] | None,
    to_do(
        "--effort",
        help="How long the method may take, as `effort` in the recipe; `aicompress methods COMMAND NAME` lists them.",
    ),
]
Base = Annotated[
    str | None,
    to_do(
        "--base",
        metavar="BASE",
        help="The checkpoint that IN was fine-tuned from, say: only the difference to it is stored.",
    ),
]
DryRun = Annotated[bool, where("--dry-run", help="Print the plan and the exact output bytes; write nothing.")]
Overwrite = Annotated[bool, where("--overwrite", help="Replace an earlier output at OUT, and nothing else in it.")]
Resume = Annotated[bool, where("--resume", help="Go on where a stopped run of the same step was.")]
ShardSize = Annotated[
    str | None,
    where("--max-shard-size", metavar="SIZE", help="Split a directory's weights into files of this size, e.g. 5GB."),
]
LatencyMode = Annotated[Mode, where("--latency", help="What to time for the report.")]
DeviceName = Annotated[Literal["auto", "cpu", "cuda"], where("--device", help="Where to run.")]
Quiet = Annotated[bool, where("--quiet", "-q", help="No progress, no summary: only errors.")]
AsJson = Annotated[bool, where("--json", help="Print the result as JSON on standard output.")]
Stats = Annotated[
    list[Path],
    where(
        "--stats",
        metavar="FILE",
        help="Input statistics: read where FILE.safetensors exists, else collected from IN and kept there. Several are "
        "merged.",
    ),
]
StoredTeacher = Annotated[
    Path | None,
    where(
        "--cache-teacher",
        metavar="DIR",
        help="Keep the teacher's outputs for all samples in DIR, and learn from them: where they are there already, no "
        "teacher is loaded or needed. `signals` in the recipe says how logits are stored.",
    ),
]
Movement = Annotated[
    Path | None,
    where(
        "--stats",
        metavar="FILE",
        help="Keep in FILE.safetensors how training moved every weight, for `prune` with the method movement.",
    ),
]
LogFolder = Annotated[
    Path | None,
    where(
        "--log-dir",
        metavar="DIR",
        help="Log loss, rate and speed of every step in DIR/metrics.jsonl, and as events that TensorBoard draws.",
    ),
]
AllowCode = Annotated[
    bool,
    where("--allow-code", help="Run the Python function that the recipe's model.factory names."),
]
