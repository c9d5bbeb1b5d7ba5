"""Record the digests of what every command writes, and compare them with those of another version of the code.

    python -m scripts.output_digests --out before.json
    python -m scripts.output_digests --out after.json --against before.json

Small checkpoints are made from fixed seeds, and every shipped recipe that compresses or trains is run on one of them
through the command line, in this process; further runs combine steps. For each run the file has the sha256 of every
output file, for each evaluation its figures. Reports are left out; the file lists what is, with the reasons.

Digests hold for one machine and one set of libraries: the file names them, and has the digests of the inputs, which
differ where the libraries do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import aicompress
from aicompress.cli import main as command_line
from scripts.output_digests import checkpoints, digests
from scripts.output_digests.runs import INPUTS, LEFT_OUT, Run, all_runs, selected

CONFIGS = Path(aicompress.__file__).parent.parent / "configs"
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "tokenizers")
PATH_LENGTH = 120  # of the working folder: outputs record paths, and their headers' length must not depend on them


def arguments(run: Run) -> list[str]:
    """The command line of a run, for the working folder."""
    command = [run.command, _path(run.source), "-r", run.recipe, "-q", *run.options]
    command += [part for setting in run.settings for part in ("--set", setting)]
    if run.command == "eval":
        return [*command, "--against", _path(str(run.reference)), "--device", "cpu", "--out", run.name]
    if run.reference is not None:
        command += ["--teacher", _path(run.reference), "--device", "cpu"]
    return [*command, "--latency", "off", _out(run)]


def _out(run: Run) -> str:
    """Where a run writes: one file where it reads one."""
    return f"{run.name}/out.safetensors" if _path(run.source).endswith(".safetensors") else f"{run.name}/out"


def _path(source: str) -> str:
    """The output of a run that has been made, or an input."""
    outputs = (f"{source}/out.safetensors", f"{source}/out")
    return next((path for path in outputs if Path(path).exists()), f"{INPUTS}/{source}")


def call(command: Sequence[str]) -> str:
    """Run the command line in this process.

    Returns:
        What it printed as its error, nothing where it succeeded.
    """
    printed = io.StringIO()
    given, sys.argv = sys.argv, ["aicompress", *command]
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            command_line()
    except SystemExit as stop:
        return f"exit code {stop.code}: {printed.getvalue().strip()}" if stop.code else ""
    finally:
        sys.argv = given
    return ""


def outcome(run: Run, work: Path) -> dict[str, Any]:
    """What a run leaves: its command, and its digests, its figures or its error."""
    torch.manual_seed(0)
    Path(run.name).mkdir(parents=True)
    command = arguments(run)
    error = call(command)
    record: dict[str, Any] = {"command": " ".join(command)}
    if error:
        return {**record, "error": error}
    if run.command == "eval":
        return {**record, "quality": digests.quality(Path(run.name))}
    return {**record, "files": digests.digests(Path(run.name), work)}


def record(runs: Mapping[str, Run], work: Path) -> dict[str, Any]:
    """Make the inputs in a folder and run everything there."""
    outcomes: dict[str, dict[str, Any]] = {}
    with contextlib.chdir(work):
        checkpoints.write_all(work / INPUTS)
        inputs = digests.digests(work / INPUTS, work)
        for run in runs.values():
            start = time.perf_counter()
            outcomes[run.name] = outcome(run, work)
            error = outcomes[run.name].get("error", "")
            print(f"{run.name}: {time.perf_counter() - start:.1f} s {error}".rstrip(), flush=True)
    return {
        "environment": environment(),
        "inputs": inputs,
        "runs": outcomes,
        "left_out": {"recipes": LEFT_OUT, "files": digests.LEFT_OUT},
        "replaced": digests.REPLACED,
    }


def environment() -> dict[str, Any]:
    """What digests depend on beside the code."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    machine = {"python": platform.python_version(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return {**versions, **machine, "threads": torch.get_num_threads()}


def working_folder(temporary: str) -> Path:
    """A folder whose path has `PATH_LENGTH` characters wherever temporary folders are."""
    parent = Path(temporary).resolve()
    padding = PATH_LENGTH - len(str(parent)) - 1
    if padding < 1:
        sys.exit(f"error: the path {parent} is too long\nhint: set TMPDIR to a folder with a shorter one")
    folder = parent / ("_" * padding)
    folder.mkdir()
    return folder


def compare(path: Path, after: dict[str, Any]) -> list[str]:
    """Print what differs from an earlier record, in the runs that were made."""
    before = json.loads(path.read_text(encoding="utf-8"))
    before["runs"] = {name: run for name, run in before["runs"].items() if name in after["runs"]}
    lines = digests.differences(before, after)
    print("\n".join(lines) if lines else f"{len(after['runs'])} runs as in {path}")
    return lines


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write, JSON")
    parser.add_argument("--against", type=Path, help="an earlier file: print what differs from it, and exit with 1")
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs to make, with those that they read")
    # One thread: on models of this size two only wait for each other.
    parser.add_argument("--threads", type=int, default=1, help="of torch; the digests of another number may differ")
    options = parser.parse_args(given)
    if options.against is not None and not options.against.is_file():
        sys.exit(f"error: {options.against} does not exist\nhint: a run without --against writes it")
    runs = selected(all_runs(CONFIGS), options.only)
    if not runs:
        sys.exit(f"error: no run is named {options.only!r}\nhint: names are those of recipes, such as quantize/rtn-w4")
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    print(f"the code at {CONFIGS.parent}")
    with tempfile.TemporaryDirectory(prefix="output-digests-") as temporary:
        after = record(runs, working_folder(temporary))
    options.out.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [name for name, run in after["runs"].items() if "error" in run]
    if (options.against is not None and compare(options.against, after)) or failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
