"""What a metric reads: the outputs of all compared models for the same samples, the tested model's first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aicompress.data.section import SourceKind

TEXTS: tuple[SourceKind, ...] = ("text", "jsonl", "csv", "parquet", "hub")
ROWS: tuple[SourceKind, ...] = ("jsonl", "csv", "parquet", "hub")
NO_TOKEN = -100  # as transformers and torch have it


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs for some samples; which, a subclass says.

    Attributes:
        what: the outputs in words.
        sources: kinds of data that the samples may come from.
        labelled: the data must name its labels.
    """

    what: ClassVar[str]
    sources: ClassVar[tuple[SourceKind, ...]]
    labelled: ClassVar[bool] = False


@dataclass(frozen=True)
class TokenLogits(ModelOutputs):
    """Logits of causal language models, and of decoders behind an encoder, for windows of tokens, in batches.

    Attributes:
        targets: (windows, tokens) int64, the tokens that are predicted; NO_TOKEN where a window is over.
        logits: of each model, (windows, tokens, vocabulary).
    """

    what = "predicted tokens"
    sources = (*TEXTS, "arrays")

    targets: Tensor
    logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class ClassLogits(ModelOutputs):
    """Logits of classifiers for samples of known class, in batches.

    Attributes:
        labels: (samples,) int64.
        logits: of each model, (samples, classes) float32.
        unit: what a sample is, for the report: "samples", "texts".
    """

    what = "predicted classes"
    sources = ("arrays", *ROWS)
    labelled = True

    labels: Tensor
    logits: tuple[Tensor, ...]
    unit: str


@dataclass(frozen=True)
class PairEmbeddings(ModelOutputs):
    """Embeddings of sentences that people compared, of all pairs at once.

    Attributes:
        scores: (pairs,) how similar people found the two sentences.
        first, second: (pairs,) rows of the embeddings, int64; a sentence that stands in several pairs is one row.
        embeddings: of each model, (sentences, width).
    """

    what = "embeddings"
    sources = ("pairs",)

    scores: Tensor
    first: Tensor
    second: Tensor
    embeddings: tuple[Tensor, ...]


@dataclass(frozen=True)
class SentenceEmbeddings(ModelOutputs):
    """Embeddings of plain sentences, of all at once.

    Attributes:
        embeddings: of each model, (sentences, width).
    """

    what = "embeddings"
    sources = TEXTS

    embeddings: tuple[Tensor, ...]


KINDS: tuple[type[ModelOutputs], ...] = (TokenLogits, ClassLogits, PairEmbeddings, SentenceEmbeddings)
