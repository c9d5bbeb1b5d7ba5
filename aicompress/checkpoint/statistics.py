"""Input statistics of layers in a safetensors file: means over calibration rows, and how many rows there were.

Layout: the tensors of a layer are `<parameter>/gram` (in, in) float32, the mean of x xᵀ, and `<parameter>/<name>` (in,)
for each statistic of columns (`statistics/columns/`) that no Gram matrix beside it holds. An embedding has
`<parameter>/frequency` (out,) alone, the share of lookups that each row has.
Where a parameter holds several experts, `<parameter>.<number>` stands for each of them.
Layers with the same input share their tensors. Where gradients were asked for, `<layer>/gradient_mean` and
`<layer>/gradient_square`, (out, in) float32, are the moments of per-sample gradients in the layer's weight, and
`<layer>/output_gram`, (out, out), is that of d dᵀ for gradients d in rows of its output, where it was asked for; a
factor of a low-rank layer is a layer of its own here. A training run leaves `<layer>/movement`, (out, in), the sum of
-w g over its steps. The header's metadata holds, as JSON:
    layers      {parameter: parameter whose tensors it shares}
    rows        {parameter with tensors: number of rows}
    gradients   {layer with gradients: number of samples}; absent where there are none
    movement    {layer with movement: number of steps}; absent where there is none
    inputs      {weight file: sha256} of the checkpoint that was run
    calibration where the rows came from
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.checkpoint.header import TensorRef, read_header
from aicompress.checkpoint.json_text import parsed
from aicompress.checkpoint.shards import ShardPlan
from aicompress.checkpoint.writer import CheckpointWriter
from aicompress.disk import disk_errors, require_file
from aicompress.errors import CheckpointError, Refused
from aicompress.statistics import GradientStats, InputStats, column_statistics
from aicompress.weights import TensorSpec

MARK, VERSION = "aicompress_statistics", "1"
GRADIENTS = {"gradient_mean": "mean", "gradient_square": "square", "output_gram": "output_gram"}  # tensor: field


@dataclass(frozen=True)
class StatisticsFile:
    """A file of statistics, its header read.

    Attributes:
        path: the file.
        tensors: what it holds.
        layers: by parameter, the one whose tensors it shares.
        rows: number of rows by parameter with tensors.
        samples: number of samples by layer with gradients.
        steps: number of training steps by layer with movement.
        inputs: sha256 of the weight files that were run.
        calibration: where the rows came from.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    layers: Mapping[str, str]
    rows: Mapping[str, int]
    samples: Mapping[str, int]
    steps: Mapping[str, int]
    inputs: Mapping[str, str]
    calibration: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> StatisticsFile:
        """Read the header.

        Raises:
            CheckpointError: damaged, or no file of statistics.
        """
        header = read_header(path)
        version = header.metadata.get(MARK)
        if version is None:
            raise CheckpointError(f"{path} holds no input statistics", "give a file that --stats has written")
        if version != VERSION:
            raise CheckpointError(f"{path}: statistics of version {version} are not known", "update aicompress")
        try:
            texts = {name: text.encode() for name, text in header.metadata.items()}
            fields = {name: parsed(texts[name]) for name in ("layers", "rows", "inputs", "calibration")}
            samples = parsed(texts.get("gradients", b"{}"))
            steps = parsed(texts.get("movement", b"{}"))
            opened = cls(path, header.tensors, samples=samples, steps=steps, **fields)
            complete = all(int(opened.rows[leader]) >= 0 for leader in opened.layers.values())
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: its metadata is incomplete", "collect it again") from error
        assert complete or not opened.layers
        return opened

    def experts(self, parameter: str) -> list[str]:
        """What the experts are called of a parameter that holds several; none of any other."""
        numbered = (f"{parameter}.{number}" for number in count())
        return [] if parameter in self.layers else list(takewhile(self.layers.__contains__, numbered))

    def specs(self, parameter: str) -> dict[str, TensorSpec]:
        """Which statistics there are of a layer; none for one that no row reached."""
        leader = self.layers[parameter]
        known = ("gram", *column_statistics(), "frequency")
        return {s: self.tensors[f"{leader}/{s}"].spec for s in known if f"{leader}/{s}" in self.tensors}

    def stats(self, parameter: str) -> InputStats:
        """Statistics of a layer; count 0 where no row reached it."""
        experts = self.experts(parameter)
        if experts:
            return InputStats.of_experts([self.stats(name) for name in experts])
        leader = self.layers[parameter]
        if not self.rows[leader]:
            return InputStats(0)
        with safe_open(self.path, "pt") as file:
            tensors: dict[str, Tensor] = {s: file.get_tensor(f"{leader}/{s}") for s in self.specs(parameter)}
        gram, frequency = tensors.pop("gram", None), tensors.pop("frequency", None)
        return InputStats.of(int(self.rows[leader]), gram, tensors, frequency=frequency)

    def gradient_spec(self, layer: str) -> TensorSpec | None:
        """Dtype and shape of a layer's gradients; None where the file holds none of it."""
        return self.tensors[f"{layer}/{next(iter(GRADIENTS))}"].spec if layer in self.samples else None

    def movement(self, layer: str) -> Tensor | None:
        """A layer's movement; None where the file holds none of it."""
        if layer not in self.steps:
            return None
        with safe_open(self.path, "pt") as file:
            movement: Tensor = file.get_tensor(f"{layer}/movement")
        return movement

    def movement_spec(self, layer: str) -> TensorSpec | None:
        """Dtype and shape of a layer's movement; None where the file holds none of it."""
        return self.tensors[f"{layer}/movement"].spec if layer in self.steps else None

    def gradients(self, layer: str) -> GradientStats | None:
        """Moments of a layer's gradients; None where the file holds none of it."""
        if layer not in self.samples:
            return None
        there = {field: f"{layer}/{s}" for s, field in GRADIENTS.items() if f"{layer}/{s}" in self.tensors}
        with safe_open(self.path, "pt") as file:
            fields = {field: file.get_tensor(name) for field, name in there.items()}
        return GradientStats(int(self.samples[layer]), **fields)

    @property
    def has_output_grams(self) -> bool:
        """Whether it was collected with gradients in the layers' outputs."""
        return any(name.endswith("/output_gram") for name in self.tensors)

    def _known(self, parameter: str) -> bool:
        """Whether there are gradients of a parameter, or of a factor of it."""
        layer = parameter.removesuffix(".weight")
        return any(name in self.samples for name in (layer, f"{layer}.low_rank.out", f"{layer}.low_rank.in"))

    def summary(self) -> dict[str, Any]:
        """What people ask of the file, JSON-ready: a row per layer, inputs and calibration data."""
        layers = []
        for name, leader in self.layers.items():
            norms, specs = self.stats(name).norms, self.specs(name)
            spread = None if norms is None else float(norms.max() / norms.mean().clamp_min(1e-38))
            layers.append(
                {
                    "layer": name,
                    "rows": self.rows[leader],
                    "width": next((spec.shape[-1] for spec in specs.values()), None),
                    "statistics": ", ".join([*specs, *(["gradients"] if self._known(name) else [])]) or "none",
                    "spread": spread,
                    "dead": None if norms is None else int((norms == 0).sum()),
                    "shares": leader if leader != name else "",
                }
            )
        return {"layers": layers, "inputs": dict(self.inputs), "calibration": dict(self.calibration)}


def is_statistics(path: Path) -> bool:
    """Whether a path is a file of statistics."""
    return path.is_file() and path.suffix == ".safetensors" and MARK in read_header(path).metadata


def merged(files: Sequence[StatisticsFile], parameter: str) -> InputStats:
    """Statistics of a layer over the rows of several files."""
    return reduce(InputStats.merged, (file.stats(parameter) for file in files))


def merged_gradients(files: Sequence[StatisticsFile], layer: str) -> GradientStats | None:
    """Moments of a layer's gradients over the samples of several files; None where one of them holds none."""
    parts = [moments for file in files if (moments := file.gradients(layer)) is not None]
    return reduce(GradientStats.merged, parts) if parts and len(parts) == len(files) else None


def merged_movement(files: Sequence[StatisticsFile], layer: str) -> Tensor | None:
    """A layer's movement over the steps of several files; None where one of them holds none."""
    parts = [movement for file in files if (movement := file.movement(layer)) is not None]
    return torch.stack(parts).sum(dim=0) if parts and len(parts) == len(files) else None


def _each(stats: Mapping[str, InputStats]) -> Iterator[tuple[str, InputStats]]:
    """Statistics by parameter, or by expert of one that holds several."""
    for name, inputs in stats.items():
        yield from ((f"{name}.{number}", own) for number, own in enumerate(inputs.experts))
        if not inputs.experts:
            yield name, inputs


class StatisticsWriter:
    """Writes a file of statistics as they come in; only those of one call of `add` are in memory.

    Args:
        path: ends in .safetensors.

    Raises:
        Refused: it does not, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise Refused(f"{path}: statistics are kept in a .safetensors file", "choose a name that ends so")
        require_file(path)
        self.path = path
        self._layers: dict[str, str] = {}
        self._rows: dict[str, int] = {}
        self._samples: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._specs: dict[str, TensorSpec] = {}

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            folder = self.path.resolve().parent
            folder.mkdir(parents=True, exist_ok=True)
            self._pieces = tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.cleanup()

    def add(self, stats: Mapping[str, InputStats]) -> None:
        """Keep statistics by parameter; layers that are given the same object share tensors."""
        leaders: dict[int, str] = {}
        for name, inputs in _each(stats):
            leader = leaders.setdefault(id(inputs), name)
            self._layers[name] = leader
            if leader != name:
                continue
            self._rows[name] = inputs.count
            stored: dict[str, Tensor | None] = {"gram": inputs.gram}
            for own, statistic in column_statistics().items():
                held = inputs.gram is not None and statistic.of_gram is not None
                stored[own] = None if held else inputs.columns.get(own)
            stored["frequency"] = inputs.frequency
            tensors = {f"{name}/{s}": each.float().contiguous() for s, each in stored.items() if each is not None}
            self._put(name, tensors)

    def add_gradients(self, moments: Mapping[str, GradientStats]) -> None:
        """Keep moments of gradients by layer."""
        for name, layer_moments in moments.items():
            self._samples[name] = layer_moments.count
            fields = {s: getattr(layer_moments, field) for s, field in GRADIENTS.items()}
            self._put(f"{name}/", {f"{name}/{s}": tensor for s, tensor in fields.items() if tensor is not None})

    def add_movement(self, layer: str, movement: Tensor, steps: int) -> None:
        """Keep a layer's movement."""
        self._steps[layer] = steps
        self._put(f"{layer}//", {f"{layer}/movement": movement})

    def _put(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        self._specs.update({key: TensorSpec.of(tensor) for key, tensor in tensors.items()})
        if tensors:
            with disk_errors(self.path):
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self._piece(piece))

    def _piece(self, name: str) -> Path:
        return Path(self._pieces.name) / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"

    def seal(self, inputs: Mapping[str, str], calibration: Mapping[str, Any]) -> None:
        """Put the pieces together, in one step for whoever looks."""
        facts = {"layers": self._layers, "rows": self._rows, "inputs": inputs, "calibration": calibration}
        facts |= {"gradients": self._samples} if self._samples else {}
        facts |= {"movement": self._steps} if self._steps else {}
        metadata = {MARK: VERSION, **{name: json.dumps(value) for name, value in facts.items()}}
        with CheckpointWriter(self.path, (ShardPlan(self.path.name, self._specs, metadata),)) as writer:
            pieces = (*self._rows, *(f"{name}/" for name in self._samples), *(f"{name}//" for name in self._steps))
            for name in pieces:
                if self._piece(name).exists():
                    for key, tensor in load_file(self._piece(name)).items():
                        writer.put(key, tensor)
            writer.seal()
