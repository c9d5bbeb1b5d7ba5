"""The data section of a recipe: where samples come from and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from aicompress.disk import expanded
from aicompress.errors import RecipeError

SourceKind = Literal["text", "jsonl", "csv", "parquet", "arrays", "pairs", "hub", "drawn"]
SOURCES: tuple[SourceKind, ...] = tuple(kind for kind in get_args(SourceKind) if kind != "drawn")

FILES = tuple(kind for kind in SOURCES if kind != "hub")
ROWS: dict[str, SourceKind] = {  # by the suffix of a file
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
ARRAYS: dict[str, SourceKind] = {".npz": "arrays", ".safetensors": "arrays"}


def kind_of(file: str) -> SourceKind:
    """What a file of samples holds, by its suffix: rows of a known kind, arrays, or plain text."""
    return (ROWS | ARRAYS).get(Path(file).suffix.lower(), "text")


class Data(BaseModel):
    """Where samples come from. Exactly one source is given; paths are relative to the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = Field(
        None, description="plain text file; windows of `length` tokens, or its lines for an encoder"
    )
    jsonl: str | None = Field(None, description="JSON lines, or one JSON array of objects, with `field`")
    csv: str | None = Field(None, description="csv (or tsv, by its suffix) with the column `field`")
    parquet: str | None = Field(None, description="parquet with the column `field`")
    arrays: str | None = Field(None, description=".npz or .safetensors file")
    pairs: str | None = Field(None, description="tsv, csv, jsonl or parquet with sentence pairs and scores")
    hub: str | None = Field(None, description="hf://datasets/org/name, one split of it")
    field: str = Field(
        "text",
        description="field or column that holds the text, or the messages of a chat; chat.text is the text inside chat",
    )
    split: str = Field("train", description="hub: split of the dataset")
    inputs: str | tuple[str, ...] | None = Field(
        None, description="arrays: name of the inputs; for calibration also several, each an argument of the model"
    )
    labels: str | None = Field(None, description="arrays or rows: name of the labels, or of what a decoder is to write")
    columns: tuple[int, int] | tuple[str, str] | None = Field(
        None, description="pairs: columns of the two sentences; numbers from 0 where the file has no header, else names"
    )
    score: int | str | None = Field(None, description="pairs: column of the score, given like `columns`")
    scale: float = Field(1.0, gt=0, description="arrays: inputs are divided by this")
    samples: int | None = Field(None, ge=1, description="how many samples, or all there are; none means all")
    length: int = Field(256, ge=2, description="tokens in a sample")
    bos: bool = Field(
        True,
        exclude_if=bool,  # recipes from before it was there keep their digests
        description="windows start with the token that the tokenizer puts before a text, where it puts one",
    )

    @field_validator(*FILES)
    @classmethod
    def _path(cls, path: str | None) -> str | None:
        if path is not None and "\0" in path:
            raise ValueError("a path holds no NUL character")
        return path

    @field_serializer(*FILES, when_used="json")
    def _recorded(self, path: str | None) -> str | None:
        """A file's name: where it lies on this machine is nobody's who reads the recipe in a checkpoint."""
        return None if path is None else Path(path).name

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the arrays of inputs."""
        return (self.inputs,) if isinstance(self.inputs, str) else self.inputs or ()

    @property
    def takes_several(self) -> bool:
        """Whether a sample may be made of several arrays."""
        return False

    @property
    def draws(self) -> bool:
        """Whether samples are drawn, so that there may be no source of others."""
        return False

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        given = [kind for kind in SOURCES if getattr(self, kind) is not None]
        if len(given) > 1 or not (given or self.draws):
            raise ValueError(f"give exactly one of {', '.join(SOURCES)}" + (f", not {len(given)}" if given else ""))
        if not given and self.samples is not None:
            raise ValueError("`samples` counts those of a source, and none is given: `drawn` says how many are drawn")
        if self.arrays is not None and not self.input_names:
            raise ValueError("arrays need `inputs`, the name of the array that holds them")
        if len(self.input_names) > 1 and not self.takes_several:
            raise ValueError("`inputs` is the name of one array here; several calibrate")
        if self.pairs is None:
            if self.columns is not None or self.score is not None:
                raise ValueError("`columns` and `score` belong to `pairs`")
        else:
            if self.columns is None or self.score is None:
                raise ValueError("pairs need `columns` (two of them) and `score`")
            if type(self.score) is not type(self.columns[0]):
                raise ValueError("`columns` and `score` are either all numbers (no header) or all names")
        return self

    @property
    def kind(self) -> SourceKind:
        """Which source is given; `drawn` where there is none."""
        return next((kind for kind in SOURCES if getattr(self, kind) is not None), "drawn")

    @property
    def is_file(self) -> bool:
        """Whether the source is a file."""
        return self.kind in FILES

    @property
    def path(self) -> str:
        """The source itself: a path, or the name of a dataset."""
        return "" if self.kind == "drawn" else str(getattr(self, self.kind))

    @property
    def name(self) -> str:
        """The source as records name it: a file without its folders, or the name of a dataset."""
        return Path(self.path).name if self.is_file else self.path

    def relative_to(self, folder: Path) -> Data:
        """The same with its path made absolute from a recipe's folder; a hub name stays as it is.

        Raises:
            RecipeError: it is a pipe.
        """
        if not self.is_file:
            return self
        path = folder / expanded(self.path)
        if path.is_fifo():
            raise RecipeError(
                f"{self.kind} {path} is a pipe, and data is read more than once", "write it to a file first"
            )
        return self.model_copy(update={self.kind: str(path.resolve())})
