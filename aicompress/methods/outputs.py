"""What a loss of distillation is given: the outputs of two models for the same batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Output = Literal["logits", "embedding", "hidden", "attention"]


@dataclass(frozen=True)
class KnownClasses:
    """What is known of a teacher's probabilities where only the most likely classes were stored, or some were drawn.

    Attributes:
        classes: (positions, k) int64; one that was drawn several times is there as often.
        log_probabilities: (positions, k) of these classes.
        times: (positions, k) how often a class is there; 1 where only the most likely ones are.
        rest: (positions,) log of what all others have together.
        temperature: T, of p = softmax(logits / T).
        of: how many classes there are.
    """

    classes: Tensor
    log_probabilities: Tensor
    times: Tensor
    rest: Tensor
    temperature: float
    of: int


@dataclass(frozen=True)
class Outputs:
    """What one model gave for a batch. Only what some loss reads is there.

    Attributes:
        logits: (positions, classes) float; the positions of padding and of no next token are left out already.
        embedding: (batch, width) sentence embeddings, pooled as the checkpoint says.
        hidden: (batch, tokens, width) for the input of the first layer and the output of each.
        mask: (batch, tokens) bool, True where `hidden` and `attention` hold a real token; None where all are.
        labels: (positions,) int64 true classes or next tokens; -1 where one is not known.
        attention: (batch, heads, tokens, tokens) for each layer: rows are the shares that a token gives, and sum to 1.
        known_classes: in the place of logits, where not all of them are known.
    """

    logits: Tensor | None = None
    embedding: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    labels: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    known_classes: KnownClasses | None = None


@dataclass(frozen=True)
class OutputShapes:
    """What is known of a model's outputs before it runs.

    Attributes:
        classes: width of the logits; None where the model has none.
        width: width of the hidden states; None where it has none.
        depth: number of layers; None where it has none.
        labels: the data gives true classes.
        tokenizer: digest of the files that say which token each class is; None where classes are no tokens.
        embedding: width of the sentence embeddings; None where it gives none.
        heads: number of attention heads of a layer; None where it has no attention maps.
    """

    classes: int | None = None
    width: int | None = None
    depth: int | None = None
    labels: bool = False
    tokenizer: str | None = None
    embedding: int | None = None
    heads: int | None = None


def wanted(tensor: Tensor | None, what: str) -> Tensor:
    """An output that a loss needs.

    Raises:
        ValueError: the model was not asked for it.
    """
    if tensor is None:
        raise ValueError(f"the loss needs {what}")
    return tensor
