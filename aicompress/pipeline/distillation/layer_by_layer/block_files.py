"""Tuned blocks on disk until all are written: one is in memory at a time, and a stopped run goes on behind them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.disk import put_in_place
from aicompress.errors import CompressError
from aicompress.pipeline.distillation.loop.state import UNSHARED
from aicompress.pipeline.step.workers import Processes
from aicompress.weights import Weight, restore

_APART = "/"  # between a parameter's name and a suffix of its stored form


class BlockFiles:
    """The files of one run: one for each block, complete or absent.

    Args:
        folder: in the working directory of the output.
        checkpoint: the student, whose forms the blocks keep.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def seen_by(self, team: Processes) -> frozenset[int]:
        """Blocks that are tuned.

        Raises:
            CompressError: not every process sees those of the first one.
        """
        kept = team.gather(self._places())[0]  # the first one knows what it continues
        if not all(team.gather(all(self._path(place).is_file() for place in kept))):
            raise CompressError(*UNSHARED)
        return frozenset(kept)

    def write(self, place: int, values: dict[str, Weight | Tensor]) -> None:
        """Keep a block: its parameters by name."""
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            stored = {"": value} if isinstance(value, Tensor) else value.tensors()
            tensors |= {
                f"{name}{_APART}{suffix}": tensor.detach().cpu().contiguous() for suffix, tensor in stored.items()
            }
        self.folder.mkdir(exist_ok=True)
        partial = self._path(place).with_suffix(".partial")
        save_file(tensors, partial)
        put_in_place(partial, self._path(place))

    def read(self, place: int) -> dict[str, Weight | Tensor]:
        """A block that is kept."""
        return self._values(load_file(self._path(place)))

    def names(self) -> dict[str, int]:
        """Every parameter that is kept, with its block."""
        named: dict[str, int] = {}
        for place in self._places():
            with safe_open(self._path(place), "pt") as file:
                named |= {key.rpartition(_APART)[0]: place for key in file.keys()}  # noqa: SIM118
        return named

    def value(self, name: str, place: int) -> Weight | Tensor:
        """One parameter of a block."""
        with safe_open(self._path(place), "pt") as file:
            own = [key for key in file.keys() if key.rpartition(_APART)[0] == name]  # noqa: SIM118
            return self._values({key: file.get_tensor(key) for key in own})[name]

    def _values(self, tensors: dict[str, Tensor]) -> dict[str, Weight | Tensor]:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, suffix = key.rpartition(_APART)
            by_name.setdefault(name, {})[suffix] = tensor
        outlines = {name: self.checkpoint.outline(name) for name in by_name}
        return {
            name: stored[""] if (outline := outlines[name]) is None else restore(stored, outline.meta())
            for name, stored in by_name.items()
        }

    def _places(self) -> list[int]:
        return sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("block-*.safetensors"))

    def _path(self, place: int) -> Path:
        return self.folder / f"block-{place}.safetensors"
