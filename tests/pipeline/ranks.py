"""Two processes of one torchrun that run commands as they are given: to start them takes longer than most commands.

As a program it is one of the two: `-m tests.pipeline.ranks FOLDER PID`. It takes command-0.json, command-1.json, ...
out of the folder and leaves what each printed and its exit code beside it, until the process that gives them has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import lives, one_at_a_time, run_of_tests

ROOT = Path(__file__).parents[2]
PAUSE = 0.05  # seconds between two looks into the folder
LONGEST = 300  # seconds that a command may take


class Ranks:
    """Both processes, from outside: all workers of a run of the tests have the same two.

    Args:
        folder: where commands and their results are exchanged.
        python: what stands for the interpreter, of torchrun and of both.
    """

    def __init__(self, folder: Path, python: list[str]) -> None:
        self.folder = folder
        launcher = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
        started = folder / "started"
        with one_at_a_time(folder / "lock"), (folder / "log").open("ab") as log:
            if not started.exists():
                subprocess.Popen(
                    [*launcher, *python, "-m", "tests.pipeline.ranks", str(folder), str(run_of_tests())],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                )
                started.touch()

    def together(self, source: Path, out: Path, recipe: Path, *options: str, verb: str = "quantize") -> str:
        """Run a command in both processes as one; what it prints."""
        command = [verb, str(source), str(out), "-r", str(recipe), "--latency", "off", *options]
        with one_at_a_time(self.folder / "lock"):
            number = len(list(self.folder.glob("command-*.json")))
            _write(self.folder / f"command-{number}.json", command)
            results = [self.folder / f"result-{number}-{rank}.json" for rank in (0, 1)]
            end = time.monotonic() + LONGEST
            while not all(path.exists() for path in results):
                assert time.monotonic() < end, (self.folder / "log").read_text(errors="replace")[-3000:]
                time.sleep(PAUSE)
        codes, printed, errors = zip(*(json.loads(path.read_text()) for path in results), strict=True)
        assert codes == (0, 0), errors
        return "".join(printed)


def _write(path: Path, content: object) -> None:
    """All of a file at once: who waits for it never reads a part."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def _ran(arguments: list[str], folder: Path) -> tuple[object, str, str]:
    """Exit code, standard output and standard error of one command."""
    from aicompress.cli import main

    sys.argv = ["aicompress", *arguments]
    rank, code = os.environ["RANK"], None
    printed, errors = (folder / f"{kind}-{rank}" for kind in ("printed", "errors"))
    with printed.open("w") as out, errors.open("w") as err:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = stop.code
    return code, printed.read_text(), errors.read_text()


def _serve(folder: Path, giver: int) -> None:
    """Run the commands of a folder in their order while the process that gives them lives."""
    number = 0
    while lives(giver):
        command = folder / f"command-{number}.json"
        if command.exists():
            result = _ran(json.loads(command.read_text()), folder)
            _write(folder / f"result-{number}-{os.environ['RANK']}.json", result)
            number += 1
        else:
            time.sleep(PAUSE)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
