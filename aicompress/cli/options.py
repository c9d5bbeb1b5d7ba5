"""Options that commands share: one spelling and one meaning each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

STEP, RUN = "What to do", "Where and how"


class LatencyChoice(StrEnum):
    """What a step times."""

    auto = "auto"
    layers = "layers"
    off = "off"


class EffortChoice(StrEnum):
    """How much time a method may take."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Device(StrEnum):
    """Where training and evaluation run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


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
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped one such as quantize/rtn-w4. One that needs no data if left out.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        help="A LoRA adapter (PEFT) that is merged into IN as it is read, times WEIGHT. Repeatable.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Edit the recipe: --set method.bits=3. Paths start here, those of a recipe at its folder. Repeatable.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="The text that the recipe reads for calibration, training and figures: one sample a line, or running; of "
        ".jsonl, .json, .csv, .tsv and .parquet the field 'text' of every row.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
Drawn = Annotated[
    int | None,
    typer.Option(
        "--drawn",
        metavar="N",
        min=1,
        help="Calibrate without data: on N samples drawn from the tokenizer's vocabulary. With --text, on both.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
EffortName = Annotated[
    EffortChoice | None,
    typer.Option(
        "--effort",
        help="How long the method may take, as `effort` in the recipe; `aicompress methods COMMAND NAME` lists them.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="The checkpoint that IN was fine-tuned from, say: only the difference to it is stored.",
        rich_help_panel=STEP,
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and the exact output bytes; write nothing.", rich_help_panel=RUN),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an earlier output at OUT, and nothing else in it.", rich_help_panel=RUN),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where a stopped run of the same step was.", rich_help_panel=RUN)
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Split a directory's weights into files of this size, e.g. 5GB.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
LatencyMode = Annotated[
    LatencyChoice, typer.Option("--latency", help="What to time for the report.", rich_help_panel=RUN)
]
DeviceName = Annotated[Device, typer.Option("--device", help="Where to run.", rich_help_panel=RUN)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no summary: only errors.", rich_help_panel=RUN)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.", rich_help_panel=RUN)
]
Stats = Annotated[
    list[Path],
    typer.Option(
        "--stats",
        metavar="FILE",
        help="Input statistics: read where FILE.safetensors exists, else collected from IN and kept there. Several are "
        "merged.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
StoredTeacher = Annotated[
    Path | None,
    typer.Option(
        "--cache-teacher",
        metavar="DIR",
        help="Keep the teacher's outputs for all samples in DIR, and learn from them: where they are there already, no "
        "teacher is loaded or needed. `signals` in the recipe says how logits are stored.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
Movement = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="FILE",
        help="Keep in FILE.safetensors how training moved every weight, for `prune` with the method movement.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
LogFolder = Annotated[
    Path | None,
    typer.Option(
        "--log-dir",
        metavar="DIR",
        help="Log loss, rate and speed of every step in DIR/metrics.jsonl, and as events that TensorBoard draws.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Run the Python function that the recipe's model.factory names.", rich_help_panel=RUN
    ),
]
