"""Size and speed of `pack` and `unpack` beside a copy and Zstandard on the file as it is.

    python -m scripts.bench.pack --folder build/bench --model M [--model N]

Prints a Markdown table. Every row is two processes on one thread each, of several the quickest; speed is bytes of
the unpacked file by seconds of the processor, with and without those that the same command takes on a file of a few
bytes. Without --model the input is 256 MB of normally distributed bfloat16 numbers, and as many float32 ones.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1_000_000
ROWS = 4096
# Torch is imported in processes of their own: the peak of one that is started from here counts what this one holds.
NORMAL = """
import sys, torch
from safetensors.torch import save_file
path, dtype, rows, columns = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 50
save_file({"weight": numbers.to(dtype)}, path)
"""
COPY = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"
ZSTANDARD = """
import sys, zstandard
way, source, target = sys.argv[1:]
with open(source, "rb") as read, open(target, "wb") as written:
    coder = zstandard.ZstdCompressor(level=1) if way == "pack" else zstandard.ZstdDecompressor()
    coder.copy_stream(read, written)
"""


@dataclass(frozen=True)
class Run:
    """Seconds of the processor, and the highest resident memory in bytes."""

    seconds: float
    peak: int


def quickest(command: list[str], rounds: int) -> Run:
    """Run a command several times."""
    return min((timed(command) for _ in range(rounds)), key=lambda run: run.seconds)


def timed(command: list[str]) -> Run:
    """Run a command on one thread.

    Raises:
        SystemExit: it failed.
    """
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def commands(source: Path, packed: Path, back: Path) -> dict[str, tuple[list[str], list[str]]]:
    """By name, a command that writes a smaller file, and one that writes the first one again."""
    step = ["-m", "aicompress"]
    flags = ["--quiet", "--overwrite"]
    return {
        "pack, unpack": (
            [*step, "pack", str(source), str(packed), *flags],
            [*step, "unpack", str(packed), str(back), *flags],
        ),
        "zstd -1": (
            ["-c", ZSTANDARD, "pack", str(source), str(packed)],
            ["-c", ZSTANDARD, "unpack", str(packed), str(back)],
        ),
        "copy": (["-c", COPY, str(source), str(packed)], ["-c", COPY, str(packed), str(back)]),
    }


def rows(source: Path, tiny: Path, folder: Path, rounds: int) -> list[str]:
    """The lines of the table for one file."""
    lines = []
    small = commands(tiny, folder / "tiny-packed.safetensors", folder / "tiny-back.safetensors")
    packed, back = folder / "packed.safetensors", folder / "back.safetensors"
    nbytes = source.stat().st_size
    for name, ways in commands(source, packed, back).items():
        runs = [quickest(way, rounds) for way in ways]
        starts = [quickest(way, rounds).seconds for way in small[name]]
        if not filecmp.cmp(source, back, shallow=False):
            raise SystemExit(f"{name}: {source} did not come back")
        whole = " / ".join(f"{nbytes / run.seconds / MEGABYTE:,.0f}" for run in runs)
        work = " / ".join(
            f"{nbytes / max(run.seconds - start, 1e-3) / MEGABYTE:,.0f}"
            for run, start in zip(runs, starts, strict=True)
        )
        peak = max(run.peak for run in runs) / MEGABYTE
        ratio = packed.stat().st_size / nbytes
        lines.append(f"| {source} | {nbytes:,} | {name} | {ratio:.4f} | {whole} | {work} | {peak:,.0f} MB |")
        for path in folder.glob("*packed*"):
            path.unlink()
    return lines


def write_normal(path: Path, dtype: str, columns: int) -> Path:
    """Write a file of normally distributed numbers."""
    timed(["-c", NORMAL, str(path), dtype, str(ROWS), str(columns)])
    return path


def main() -> None:
    """Write inputs where none are given, time every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--model", type=Path, action="append", default=[], help="a safetensors file, or its folder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder / "pack"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path / "model.safetensors" if path.is_dir() else path for path in options.model] or [
        write_normal(folder / f"{dtype}.safetensors", dtype, 256 * MEGABYTE // ROWS // width)
        for dtype, width in (("bfloat16", 2), ("float32", 4))
    ]
    tiny = write_normal(folder / "tiny.safetensors", "float32", 1)
    print("| file | bytes | way | ratio | MB/s of a core, both ways | without the start | peak memory |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for source in sources:
        print("\n".join(rows(source, tiny, folder, options.rounds)), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
