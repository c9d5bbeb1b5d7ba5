"""Run a student or a teacher on a batch and collect the outputs that losses read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, Refused
from aicompress.methods.outputs import Output, Outputs, OutputShapes
from aicompress.model.loading.definitions.definition import skeleton
from aicompress.model.loading.load import build
from aicompress.model.loading.pooling import Pooling, pooling
from aicompress.model.loading.tokenizer import vocabulary_digest

Task = Literal["causal", "masked", "classes", "encoder", "module"]
_TASKS: dict[str, Task] = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "classes",
    "ForImageClassification": "classes",
    "Model": "encoder",
}


@dataclass(frozen=True)
class Runner:
    """How a checkpoint's model is run.

    Attributes:
        task: what it gives: next tokens (causal), tokens in place (masked), one class a sample (classes), states only
            (encoder), or whatever a bare module returns, taken for the logits of one class a sample (module).
        pooling: how states become sentence embeddings.
    """

    task: Task
    pooling: Pooling

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], reads: frozenset[Output], labels: Tensor | None = None
    ) -> Outputs:
        """Run the model and keep what is read.

        Args:
            inputs: its arguments by name; one unnamed tensor under "".
            reads: logits, embedding, hidden, attention.
            labels: (batch,) true classes; a causal model's labels are the next tokens.
        """
        if self.task == "module":
            return Outputs(logits=model(inputs[""]), labels=labels)
        want_hidden = bool(reads & {"embedding", "hidden"})
        body = body_of(model, reads)
        more = {"output_attentions": True} if "attention" in reads else {}
        given = body(**inputs, output_hidden_states=want_hidden, return_dict=True, **more, **_no_cache(self.task))
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        hidden: tuple[Tensor, ...] = tuple(given.hidden_states) if want_hidden else ()
        embedding = None
        if "embedding" in reads:
            states = hidden[-1]
            everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            embedding = self.pooling(states, everything if mask is None else mask)
        logits = None
        if "logits" in reads:
            logits, labels = self._positions(given.logits, inputs, mask, labels)
        attention = _maps(given.attentions) if "attention" in reads else ()
        return Outputs(logits, embedding, hidden if "hidden" in reads else (), mask, labels, attention)

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(samples,) how many positions each sample has logits of: tokens, or one of a sample as a whole."""
        tokens = inputs.get("input_ids", next(iter(inputs.values())))
        if self.task not in ("causal", "masked"):
            return torch.ones(len(tokens), dtype=torch.int64)
        mask = inputs.get("attention_mask", torch.ones_like(tokens))
        return (mask[:, 1:] if self.task == "causal" else mask).sum(dim=1)

    def output_bytes(self, reads: frozenset[Output], shapes: OutputShapes, length: int) -> int | None:
        """Count the bytes of one sample's outputs in float32; None where sizes differ or are too large to keep.

        Args:
            reads: logits, embedding, hidden.
            length: tokens in a window.
        """
        if reads & {"hidden", "attention"} or ("logits" in reads and self.task == "masked"):
            return None
        positions = length - 1 if self.task == "causal" else 1
        logits = (shapes.classes or 0) * positions if "logits" in reads else 0
        return 4 * (logits + ((shapes.embedding or 0) if "embedding" in reads else 0))

    def _positions(
        self, logits: Tensor, inputs: Mapping[str, Tensor], mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (positions, classes) and labels (positions,) of the positions that count."""
        if self.task == "causal":
            predicting, next_tokens = logits[:, :-1], inputs["input_ids"][:, 1:]
            if mask is None or bool(mask.all()):  # a copy, where picking takes several passes there and back
                return predicting.flatten(0, 1), next_tokens.flatten()
            return predicting[mask[:, 1:]], next_tokens[mask[:, 1:]]
        if self.task == "masked":
            return (logits.flatten(0, 1) if mask is None else logits[mask]), None
        return logits, labels


def body_of(model: nn.Module, reads: frozenset[Output]) -> nn.Module:
    """What is run of a model: the backbone alone, where nobody reads the head's logits."""
    return model if "logits" in reads else getattr(model, "base_model", model)


def _maps(attentions: Any) -> tuple[Tensor, ...]:
    """Attention maps as a model gives them.

    Raises:
        CompressError: it gives none.
    """
    if not attentions or any(each is None for each in attentions):
        raise CompressError("the model gives no attention maps", "distil hidden states by hidden or relation")
    return tuple(attentions)


def prepare(model: nn.Module, reads: frozenset[Output]) -> None:
    """Let a transformers model whose attention maps are read compute attention in the way that has them to give."""
    if "attention" in reads:
        model.set_attn_implementation("eager")  # type: ignore[operator]


def _no_cache(task: Task) -> dict[str, Any]:
    return {"use_cache": False} if task == "causal" else {}


def runner(checkpoint: Checkpoint) -> Runner:
    """How a checkpoint is run, from its config.

    Raises:
        Refused: a kind of model that cannot be distilled.
    """
    config = checkpoint.config
    if config is None:
        return Runner("module", Pooling())
    architecture = str((config.get("architectures") or ["no architecture"])[0])
    task = next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)
    if task is None or config.get("is_encoder_decoder"):
        known = "causal and masked language models, sequence and image classifiers, encoders"
        raise Refused(f"{checkpoint.path} is a {architecture}, which distill does not train", f"it trains {known}")
    return Runner(task, pooling(checkpoint.source.folder))


def shapes_of_outputs(checkpoint: Checkpoint, run: Runner, last_layer: str | None, labels: bool) -> OutputShapes:
    """What a model's outputs will look like, from headers and config.

    Args:
        checkpoint: the model's checkpoint.
        run: its runner.
        last_layer: a bare file: the layer that gives the logits.
        labels: the data has labels.
    """
    if run.task == "module":
        spec = checkpoint.parameters().get(f"{last_layer}.weight")
        return OutputShapes(classes=spec.shape[0] if spec is not None else None, labels=labels)
    config = (skeleton(checkpoint.config or {}) or build(checkpoint)).config  # the latter says what is unknown
    text = config.get_text_config()
    classes = {"causal": "vocab_size", "masked": "vocab_size", "classes": "num_labels"}.get(run.task)
    width = getattr(text, "hidden_size", None)
    return OutputShapes(
        classes=None if classes is None else int(getattr(text if classes == "vocab_size" else config, classes)),
        width=width,
        embedding=run.pooling.width or width,
        depth=getattr(text, "num_hidden_layers", None),
        heads=getattr(text, "num_attention_heads", None),
        labels=labels or run.task == "causal",
        tokenizer=vocabulary_digest(checkpoint.source.folder) if classes == "vocab_size" else None,
    )
