"""Recipes of `eval`: what to measure, on which data, and which conditions must hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from aicompress.data.section import Data
from aicompress.recipe import Model, ReportFiles, Section, absolute, find, read_yaml, validated, with_overrides

TEXTS = ("text", "jsonl", "csv", "parquet", "hub")
ROWS = ("jsonl", "csv", "parquet", "hub")


class Perplexity(Data):
    """Text of which a language model predicts every token of a window but the first."""

    kl_samples: int | None = Field(
        None, ge=1, description="windows on which to compare with a baseline, from the first; none means all"
    )


class Quality(Section):
    """What to measure of the outputs."""

    perplexity: Perplexity | None = Field(
        None, description="language models; with a baseline also KL and top-1 agreement"
    )
    accuracy: Data | None = Field(None, description="classifiers: labelled arrays, or rows of texts with `labels`")
    similarity: Data | None = Field(None, description="sentence encoders: pairs that people scored")
    embedding: Data | None = Field(None, description="sentence encoders: plain sentences, compared with a baseline")

    @model_validator(mode="after")
    def _sources(self) -> Quality:
        for name, kinds in (("perplexity", TEXTS), ("accuracy", ("arrays", *ROWS)), ("embedding", TEXTS)):
            data: Data | None = getattr(self, name)
            if data is not None and data.kind not in kinds:
                raise ValueError(f"{name} is measured on {', '.join(kinds)}, not on {data.kind}")
        if self.similarity is not None and self.similarity.kind != "pairs":
            raise ValueError(f"similarity is measured on pairs, not on {self.similarity.kind}")
        if self.accuracy is not None and self.accuracy.labels is None:
            raise ValueError("accuracy needs `labels`, the name of the array or column that holds them")
        return self


class Timing(Section):
    """How forward passes are timed."""

    batch: int = Field(8, ge=1, description="samples in a batch")
    length: int = Field(64, ge=1, description="tokens in a sample")
    rounds: int = Field(30, ge=3, description="counted forward passes of each model")
    warmup: int = Field(3, ge=0, description="passes before that are not counted")


class EvalRecipe(Section):
    """A recipe of eval."""

    version: Literal[1]
    model: Model | None = None
    quality: Quality = Quality()
    latency: Timing | None = Field(None, description="none means that nothing is timed")
    kernels: Literal["fast", "reference"] = Field(
        "fast",
        description="fast: as aicompress.load runs it here, in part in bfloat16; reference: exactly as stored, "
        "which is what other readers see",
    )
    seed: int = Field(0, ge=0)
    gates: tuple[str, ...] = ()
    report: ReportFiles = Field(ReportFiles(), exclude=True, description="how the report is written; not hashed")

    def sha256(self) -> str:
        """Digest of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, JSON-ready."""
        return self.model_dump(mode="json")

    def figures(self, compared: bool) -> tuple[str, ...]:
        """Names under `quality` that will be measured.

        Args:
            compared: there is a baseline.
        """
        alone = {"perplexity": ("perplexity",), "accuracy": ("accuracy",), "similarity": ("similarity",)}
        beside = {
            "perplexity": ("kl", "top1_agreement"),
            "accuracy": ("prediction_agreement",),
            "similarity": ("similarity_agreement",),
            "embedding": ("embedding_agreement", "embedding_cosine"),
        }
        asked = [name for name, data in self.quality if data is not None]
        return tuple(figure for name in asked for figure in (*alone.get(name, ()), *(beside[name] if compared else ())))


def load(name: str, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Read and validate a recipe of eval.

    Raises:
        RecipeError, Problems: what is wrong, with hints.
    """
    path = find(name)
    plain = with_overrides(read_yaml(path.read_text(encoding="utf-8"), path.name), overrides)
    recipe: EvalRecipe = absolute(validated(EvalRecipe, plain, ""), path.parent)
    return recipe
