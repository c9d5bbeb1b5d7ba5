"""`aicompress export`."""

from __future__ import annotations

from typing import Annotated, Literal

from aicompress.cli import options as o
from aicompress.cli.step import Flags, adapted, conclude, destination

EXAMPLES = """Examples:

aicompress export w4/ dense/ --to dense

aicompress export w4/ smaller/ --to entropy

aicompress export hf://org/model-fp8 model/ --to dense --max-shard-size 5GB

aicompress export model/ merged/ --to dense --adapter lora/ --adapter style/:0.5

aicompress export lenet.safetensors small.safetensors --to compact"""


def command(
    source: o.Source,
    out: o.Out,
    to: Annotated[
        Literal["dense", "entropy", "fixed", "compact"],
        o.to_do(
            "--to",
            help="dense: every weight decoded, a plain checkpoint that any reader loads, converters to GGUF and ONNX "
            "among them. entropy: the same weights, codes and masks entropy-coded; fixed: codes of a fixed width "
            "again. compact: every weight as it is stored, in one file whose names, shapes and description take a few "
            "hundred bytes.",
        ),
    ],
    adapter: o.Adapters = [],  # noqa: B006
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    max_shard_size: o.ShardSize = None,
    latency: o.LatencyMode = "auto",
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Decode a compressed or quantized checkpoint into a plain one, or store the same weights in another way."""
    from aicompress.cli.progress import reporter
    from aicompress.pipeline import export
    from aicompress.pipeline.step.options import Options
    from aicompress.recipe.made import ExportRecipe, Target
    from aicompress.recipe.section import validated

    flags = Flags(dry_run, overwrite, False, max_shard_size, latency, quiet, as_json)
    storage = to if to in ("entropy", "fixed") else None
    recipe = ExportRecipe(method=validated(Target, {"name": to}, "to"), storage=storage)
    planned = export.make_plan(adapted(source, adapter), destination(out, flags), recipe)
    options = Options(latency=flags.latency, progress=reporter(flags.quiet))
    conclude(planned, flags, lambda: export.run(planned, options))
