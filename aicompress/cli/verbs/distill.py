"""`aicompress distill`."""

from __future__ import annotations

from typing import Annotated

from aicompress.cli import options as o
from aicompress.cli.boundary import STARTED
from aicompress.cli.progress import reporter
from aicompress.cli.step import Flags, adapted, chosen, conclude, destination, with_data

EXAMPLES = """Examples:

aicompress distill pruned/ healed/ --teacher model/ -r distill/embedding
aicompress distill model/ smaller/ -r distill/student-layers

`aicompress methods distill` lists the losses and their parameters."""


def command(
    source: o.Source,
    out: o.Out,
    teacher: Annotated[
        list[str],
        o.to_do(
            "--teacher",
            "-t",
            metavar="TEACHER",
            help="The checkpoint to learn from. Repeatable: several are averaged. IN, if left out, where the recipe "
            "makes the student out of IN.",
        ),
    ] = [],  # noqa: B006
    recipe: o.RecipeName = None,
    overrides: o.Overrides = [],  # noqa: B006
    text: o.Text = None,
    adapter: o.Adapters = [],  # noqa: B006
    cache_teacher: o.StoredTeacher = None,
    dry_run: o.DryRun = False,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    max_shard_size: o.ShardSize = None,
    latency: o.LatencyMode = "auto",
    device: o.DeviceName = "auto",
    stats: o.Movement = None,
    log_dir: o.LogFolder = None,
    allow_code: o.AllowCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Train a student, IN or what the recipe makes of IN, to do what a teacher does; IN may be any step's output."""
    from aicompress.pipeline.distillation import run as distillation
    from aicompress.pipeline.distillation.made_student import made_student
    from aicompress.pipeline.distillation.plan import make_plan
    from aicompress.pipeline.distillation.pruned_student import Teaching, pruned_student
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.workers import is_first
    from aicompress.recipe.distillation import load

    flags = Flags(dry_run, overwrite, resume, max_shard_size, latency, quiet, as_json)
    loaded = load(chosen(recipe, "distill/kl"), with_data(overrides, text))
    given, place = adapted(source, adapter), destination(out, flags)
    of_itself = (loaded.student is not None and loaded.mean_teacher is None) or loaded.iterate is not None
    teachers = teacher or ([given] if of_itself else [])
    options = Options(resume, latency, reporter(quiet or not is_first()), device, STARTED)
    teaching = Teaching(teachers, allow_code, cache_teacher, log_dir)
    with (
        made_student(given, place, loaded, options.progress, plan_only=dry_run) as made,
        pruned_student(given, place, loaded, teaching, options, plan_only=dry_run) as pruned,
    ):
        planned = make_plan(pruned or made or given, teachers, place, loaded, allow_code, cache_teacher)
        own = distillation.TrainingOptions(movement_file=stats, log_folder=log_dir)
        conclude(planned, flags, lambda: distillation.run(planned, options, own))
