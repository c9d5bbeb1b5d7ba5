"""Samples for training, read and tokenized as the student's task needs them, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.data import Data, SampleSource, Tokenizer, arrays, batches, labelled, sentences, token_windows
from aicompress.errors import RecipeError, raise_all
from aicompress.model.distillation.outputs import Task
from aicompress.model.loading.definitions.config import class_names, most_positions
from aicompress.model.loading.definitions.definition import skeleton
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline.step.models.accepted_inputs import IMAGES, input_problems, shaped, text_problems
from aicompress.recipe import Model


@dataclass(frozen=True)
class Batch:
    """Some samples, ready for a model.

    Attributes:
        index: (batch,) which samples they are.
        inputs: the model's arguments by name; a model that takes one unnamed tensor has it under "".
        labels: (batch,) int64, or None.
    """

    index: Tensor
    inputs: dict[str, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, first: int, step: int) -> Batch:
        """Every so many samples, counted from one of them; padding stays as it is."""
        inputs = {name: tensor[first::step] for name, tensor in self.inputs.items()}
        return Batch(self.index[first::step], inputs, None if self.labels is None else self.labels[first::step])

    def to(self, device: torch.device) -> Batch:
        """The same on a device; `index` stays where it is."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(self.index, inputs, None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class TrainingSamples:
    """All samples of a training run, tokenized.

    Attributes:
        columns: (samples, ...) by argument name, token ids as int32; padded texts have `attention_mask` among them.
        labels: (samples,) int64, -1 where one is not known, or None.
        source: where they came from.
    """

    columns: dict[str, Tensor]
    labels: Tensor | None
    source: SampleSource

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def lengths(self) -> Tensor | None:
        """(samples,) real tokens of padded texts; None where all samples are alike."""
        mask = self.columns.get("attention_mask")
        return None if mask is None else mask.sum(dim=1)

    @property
    def tokens(self) -> int:
        """Real tokens in all samples; 0 where they are no texts."""
        if self.lengths is not None:
            return int(self.lengths.sum())
        ids = self.columns.get("input_ids")
        return 0 if ids is None else ids.numel()

    @cached_property
    def sha256(self) -> str:
        """Digest of what the models are given, in its order."""
        whole = hashlib.sha256()
        labels = {} if self.labels is None else {"labels": self.labels}
        for name, column in sorted({**self.columns, **labels}.items()):
            whole.update(f"{name} {column.dtype} {tuple(column.shape)}".encode())
            whole.update(column.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def batch(self, index: Tensor) -> Batch:
        """A batch of these samples; padding that none of them needs is cut off."""
        picked = {name: _wide(column[index]) for name, column in self.columns.items()}
        mask = picked.get("attention_mask")
        if mask is not None:
            used = mask.any(dim=0)
            picked = {name: column[:, used] for name, column in picked.items()}
        return Batch(index, picked, None if self.labels is None else self.labels[index])


def _wide(column: Tensor) -> Tensor:
    """The column as a model takes it: token ids are kept as int32 and given as int64."""
    return column.long() if column.dtype is torch.int32 else column


Outlined = tuple[str, Checkpoint, nn.Module | None]  # who it is, its checkpoint, and its model without weights


def read_samples(data: Data, task: Task, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> TrainingSamples:
    """Everything that the data section names: windows of tokens, texts, labelled texts or arrays.

    Equal texts are taken once, so that no held-out text is trained on.

    Raises:
        RecipeError: the data does not fit the task, or cannot be read.
        CheckpointError: texts, and no tokenizer that can pad them.
    """
    if data.kind == "arrays":
        return _arrays(data, task)
    if task == "module":
        require_arrays(data)
    if task == "causal":
        windows, source = token_windows(data, tokenizer, least=2)  # one of them is held out
        return TrainingSamples({"input_ids": windows.int()}, None, source)
    if data.labels is not None:
        texts, labels, source = labelled(data, None, class_names(skeleton(checkpoint.config or {})))
        first = _first_of_equals(texts)
        return _texts([texts[i] for i in first], labels[torch.tensor(first)], source, data, tokenizer)
    texts, source = sentences(data)
    return _texts([texts[i] for i in _first_of_equals(texts)], None, source, data, tokenizer)


def require_arrays(data: Data) -> None:
    """Refuse other data than arrays for a bare model.

    Raises:
        RecipeError: it is other data.
    """
    if data.kind != "arrays":
        message = f"{data.path}: a bare model learns from arrays, not from {data.kind}"
        raise RecipeError(message, "data.arrays: file.npz")


def fitting_samples(data: Data, task: Task, models: Sequence[Outlined]) -> tuple[TrainingSamples, list[str]]:
    """The samples that a data section names, as long as student and teachers take them, and held against these.

    A warning says where they are shorter than the section asks.

    Args:
        data: the section.
        task: the student's.
        models: the student first.

    Raises:
        RecipeError: they cannot be read, or one of the models does not take them.
    """
    student = models[0][1]
    asked, data = data, data.model_copy(update={"length": _taken_length(data, models)})
    for who, _, model in models:
        require_taken(None, data, model, who)
    samples = read_samples(data, task, student, load_tokenizer(student.source.folder))
    for who, _, model in models:
        require_taken(samples, data, model, who)
    if data.length == asked.length:
        return samples, []
    return samples, [f"training samples are {data.length} tokens long, not {asked.length}: the models take no more"]


def models(
    student: Checkpoint, teachers: Sequence[Checkpoint], model: Model | None, allow_code: bool
) -> list[Outlined]:
    """Student and teachers, each once."""
    sides = [("the student", student), *(("the teacher", each) for each in teachers if each is not student)]
    return [(who, each, _outline(each, model, allow_code)) for who, each in sides]


def _outline(checkpoint: Checkpoint, model: Model | None, allow_code: bool) -> nn.Module | None:
    """The model of a student or a teacher without its weights; None where nothing says what it is."""
    if checkpoint.config is None:
        return bare_module(checkpoint, model, allow_code)
    outline: nn.Module | None = skeleton(checkpoint.config)
    return outline


def bare_module(checkpoint: Checkpoint, model: Model | None, allow_code: bool) -> nn.Module | None:
    """The module of a bare file, as a recipe's `model` section has it; None of a checkpoint that names its own."""
    if checkpoint.config is not None or model is None:
        return None
    from aicompress.model.loading.definitions.chain import module_for

    return module_for(checkpoint.path, model, allow_code)


def _taken_length(data: Data, models: Sequence[Outlined]) -> int:
    """How long samples are, in tokens: as long as the data section says, or as models have positions."""
    if data.kind == "arrays":
        return data.length
    known = [(checkpoint.config, skeleton(checkpoint.config)) for _, checkpoint, _ in models if checkpoint.config]
    limits = [c.get("max_position_embeddings") if model is None else most_positions(model) for c, model in known]
    return min([data.length, *(limit for limit in limits if limit is not None)])


def require_taken(samples: TrainingSamples | None, data: Data, model: nn.Module | None, whose: str) -> None:
    """Refuse samples that the forward of a model does not take.

    Args:
        samples: as they were read; None where they are texts that are not read yet.
        data: the section.
        model: without weights; None where nothing says what it is.
        whose: it is the student, or the teacher.

    Raises:
        RecipeError: it does not take them.
    """
    if model is None:
        return
    raise_all(
        text_problems(model, data, whose) if samples is None else input_problems(model, samples.columns, data, whose)
    )


def _first_of_equals(texts: list[str]) -> list[int]:
    """Where each different text stands first, in their order."""
    return sorted({text: place for place, text in reversed(list(enumerate(texts)))}.values())


def _texts(
    texts: list[str], labels: Tensor | None, source: SampleSource, data: Data, tokenizer: Tokenizer | None
) -> TrainingSamples:
    (padded,) = batches(texts, tokenizer, len(texts), data.length)
    real = padded["attention_mask"].any(dim=1)  # a tokenizer may make nothing of a text
    if not bool(real.any()):
        raise RecipeError(f"{data.path}: no text has a token of this tokenizer", "give texts in its language")
    if not bool(real.all()):
        source = replace(source, samples=int(real.sum()), skipped=source.skipped + int((~real).sum()))
    columns = {name: column[real].int() for name, column in padded.items()}
    return TrainingSamples(columns, None if labels is None else labels[real], source)


def _arrays(data: Data, task: Task) -> TrainingSamples:
    inputs, labels, source = arrays(data)
    if task == "module":
        return TrainingSamples({"": inputs}, labels, source)
    if inputs.dtype.is_floating_point:
        return TrainingSamples({IMAGES: shaped(IMAGES, inputs)}, labels, source)
    return TrainingSamples({"input_ids": inputs}, labels, source)
