"""What a benchmark compresses and judges on: given, or made by the project's own scripts."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLES, LENGTH = 128, 256  # calibration windows
TESTED, COMPARED = 400, 100  # windows for the perplexity, and for KL and top-1 agreement
OWN = "model and text are the small ones that the project makes: the figures show that all works, and say little more"


@dataclass(frozen=True)
class Inputs:
    """A language model and its texts.

    Attributes:
        model: Hugging Face folder.
        calibration: a text of exactly `samples` windows of `length` tokens, so that every tool takes the same ones.
        text: held-out text.
        tested, compared: windows of it.
        note: what a reader has to know.
    """

    model: Path
    calibration: Path
    text: Path
    samples: int
    length: int
    tested: int
    compared: int
    note: str = ""

    def described(self) -> dict[str, Any]:
        """What figures depend on, for the store."""
        return {
            "model": digest(self.model / "model.safetensors") if (self.model / "model.safetensors").is_file() else "",
            "calibration": digest(self.calibration),
            "text": digest(self.text),
            "windows": [self.samples, self.length, self.tested, self.compared],
        }

    def in_words(self) -> str:
        """The inputs in a line."""
        return (
            f"{self.model.name}; {self.samples} × {self.length} calibration tokens; perplexity on {self.tested} "
            f"held-out windows of {self.length}, KL and top-1 agreement on the first {self.compared}"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that name the inputs."""
    group = parser.add_argument_group("inputs", "without them: what the project's own scripts make")
    group.add_argument("--model", type=Path, help="folder of a causal language model")
    group.add_argument("--calibration", type=Path, help="text to calibrate on")
    group.add_argument("--text", type=Path, help="held-out text")
    group.add_argument("--tested", type=int, default=TESTED, help="windows of it for the perplexity")
    group.add_argument("--compared", type=int, default=COMPARED, help="of these, windows for KL and top-1 agreement")


def language_inputs(given: argparse.Namespace, folder: Path) -> Inputs:
    """The inputs as given; what is not given is made below `folder`.

    Raises:
        SystemExit: a file is missing, or the calibration text is too short.
    """
    for path in (given.model, given.calibration, given.text):
        if path is not None and not path.exists():
            sys.exit(f"error: {path} does not exist")
    texts = folder.parent / "text"
    calibration, text = calibration_text(given, folder), given.text or own_texts(folder) / "heldout.txt"
    model = given.model
    if model is None:
        model = folder.parent / "tiny-lm"
        train = ("--text", str(texts / "train.txt"), "--heldout", str(texts / "heldout.txt"))
        own_texts(folder)
        made(model / "config.json", "scripts.make_tiny_lm", "--out", str(model), *train)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    cut = folder / "calibration.txt"
    cut.parent.mkdir(parents=True, exist_ok=True)
    cut.write_text(first_windows(calibration.read_text(encoding="utf-8-sig"), tokenizer), encoding="utf-8")
    tokens = len(tokenizer(text.read_text(encoding="utf-8-sig"), add_special_tokens=False, verbose=False)["input_ids"])
    tested = min(given.tested, tokens // LENGTH)
    own = "" if given.model and given.text and given.calibration else OWN
    return Inputs(model, cut, text, SAMPLES, LENGTH, tested, min(given.compared, tested), own)


def calibration_text(given: argparse.Namespace, folder: Path) -> Path:
    """The text to calibrate on, as given or made below `folder`."""
    return given.calibration or own_texts(folder) / "train.txt"


def own_texts(folder: Path) -> Path:
    """The folder of the texts that the project makes, made once."""
    texts = folder.parent / "text"
    made(texts / "heldout.txt", "scripts.make_demo_text", "--out", str(texts))
    return texts


def first_windows(text: str, tokenizer: Any, samples: int = SAMPLES, length: int = LENGTH) -> str:
    """The beginning of a text that holds exactly `samples` windows, and a few tokens more.

    Raises:
        SystemExit: it is too short.
    """
    spans = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    wanted = samples * length + length // 2  # half a window more: tokens at the cut may differ
    if len(spans) < samples * length:
        sys.exit(f"error: the calibration text holds {len(spans)} tokens, {samples * length} are needed")
    return text if len(spans) <= wanted else text[: spans[wanted - 1][1]]


def made(target: Path, module: str, *arguments: str) -> Path:
    """Run one of the project's scripts where its output is not there yet."""
    if not target.is_file():
        subprocess.run([sys.executable, "-m", module, *arguments], check=True)
    return target


def digest(path: Path) -> str:
    """The first 16 digits of a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
