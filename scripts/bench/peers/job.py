"""One measurement of a peer: what it is given, and what is recorded of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Job:
    """A model, a setting, and the figures of compressing it.

    Attributes:
        model: Hugging Face folder; its weights stay in the dtype they are stored in.
        out: folder for the output that is judged.
        figures: file that the figures are written to.
        setting: parameters of the peer, as its row gives them.
        calibration: text; None for data-free peers.
        samples, length: windows of it, from the first.
        found: the figures so far; seconds by phase.
    """

    model: Path
    out: Path
    figures: Path
    setting: dict[str, Any]
    calibration: Path | None = None
    samples: int = 128
    length: int = 256
    found: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to a phase."""
        start = time.perf_counter()
        yield
        self.found[phase] = self.found.get(phase, 0.0) + time.perf_counter() - start

    def causal(self) -> Any:
        """The model in evaluation mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype="auto").eval()

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def windows(self) -> Tensor:
        """The first windows of the calibration text, (samples, length) int64, without special tokens."""
        assert self.calibration is not None, "this peer needs --calibration"
        text = self.calibration.read_text(encoding="utf-8-sig")
        ids = self.tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids[: self.samples * self.length]).view(self.samples, self.length)

    def finished(self, stored: int) -> None:
        """The peer's own work is done: what follows only makes its output readable for the judge.

        Args:
            stored: bytes of the weights as the peer stores them.
        """
        self.found |= {"bytes": stored, "peak_rss": peak_rss()}

    def write(self) -> None:
        """Write the figures."""
        self.figures.write_text(json.dumps(self.found), encoding="utf-8")


def peak_rss() -> int:
    """Highest resident set of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def linears(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    """Linear layers inside the model's blocks: every one but the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [(name, module) for name, module in found if module is not head and ".layer" in name]


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt"))


def saved_bytes(state: dict[str, Any], folder: Path) -> int:
    """Bytes of a state dict as torch writes it; the file is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "stored.pt"
    torch.save(state, file)
    size = file.stat().st_size
    file.unlink()
    return size


def dump(job: Job, model: Any) -> None:
    """Write a model with dense weights as a plain checkpoint."""
    with job.timed("dump_seconds"):
        model.save_pretrained(job.out)
        job.tokenizer().save_pretrained(job.out)
