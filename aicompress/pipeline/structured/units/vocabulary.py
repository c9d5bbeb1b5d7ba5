"""Tokens of a vocabulary: rows of embeddings, heads and their biases, and entries of every file that numbers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aicompress import data
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.json_text import read_json
from aicompress.data import Data
from aicompress.data.text_files import lines
from aicompress.errors import CheckpointError, RecipeError, raise_all
from aicompress.methods.prune.vocabulary import Tokens
from aicompress.methods.structural import Structure
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.config_fields import with_value
from aicompress.model.architecture.vocabulary_axes import TokenTable, token_tables
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.model.vocabulary.files import WHOLE, TokenFiles, require_same_tokens
from aicompress.model.vocabulary.token_ids import Numbering, named_ids, renumbered
from aicompress.model.vocabulary.vocabulary import Vocabulary, written_in
from aicompress.pipeline.calibration.data import record_of_data
from aicompress.pipeline.calibration.request import Step
from aicompress.pipeline.step.survey import SurveyResult
from aicompress.pipeline.structured.edit import Cut, Edit, ParameterChange
from aicompress.pipeline.structured.unit import Kept, StructuralUnit, UnitLayout
from aicompress.pipeline.structured.units.token_usage import shares_needing, token_samples, usage

VOCABULARY, EVERY_LAYER = "vocabulary", "vocabulary of every layer"  # names of the structures


@dataclass(frozen=True)
class VocabularyLayout(UnitLayout):
    """The vocabulary of a model, and the first tokens of it that a table for every layer holds.

    Attributes:
        checkpoint: the input.
        config: config.json with the numbers of tokens made explicit.
        tables: of the structures.
        tokenizer: of the checkpoint.
        vocabulary: its tokens.
        stays: tokens that stay whatever is counted.
        written: tokens of the alphabet that is asked for.
        counts: (tokens,) how often the text uses each; None without a text.
        held_out: further texts, or None.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tables: tuple[TokenTable, ...]
    tokenizer: Any
    vocabulary: Vocabulary
    stays: frozenset[int]
    written: frozenset[int]
    counts: Tensor | None = None
    held_out: Data | None = None

    @property
    def size(self) -> int:
        """How many tokens the model knows."""
        return self.tables[0].size


class VocabularyUnit(StructuralUnit[Tokens, VocabularyLayout]):
    """Tokens of a vocabulary."""

    kind = Tokens
    scored = True
    silenceable = False  # what a model computes for other tokens does not depend on those that go

    def find(self, checkpoint: Checkpoint, unit: Tokens, stack: str | None) -> VocabularyLayout:
        """The axes of the model's tokens, and the tokens that stay whatever is counted.

        Raises:
            Refused: config.json sets no number of tokens, or the tokenizer is of a kind that is not known.
        """
        if stack is not None:
            raise RecipeError("method.stack: all stacks share one vocabulary", "leave method.stack out")
        architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
        tokenizer = load_tokenizer(checkpoint.source.folder)
        if tokenizer is None:
            raise CheckpointError(f"{checkpoint.path} has no tokenizer", f"put {WHOLE} beside it")
        vocabulary = Vocabulary.of(tokenizer)
        config, tables = token_tables(architecture)
        named = (VOCABULARY, EVERY_LAYER)
        structures = tuple(Structure(name, table.size, ()) for name, table in zip(named, tables, strict=False))
        stays = vocabulary.fixed | _named(unit, vocabulary, tokenizer)
        written = vocabulary.written(written_in(unit.alphabet)) if unit.alphabet else set()
        for described in (config, _generation_config(checkpoint)):
            stays |= named_ids(described, tables[0].size)
        return VocabularyLayout(
            structures,
            architecture,
            checkpoint,
            config,
            tables,
            tokenizer,
            vocabulary,
            frozenset(stays),
            frozenset(written),
        )

    def read(self, layout: VocabularyLayout, asked: Step) -> tuple[VocabularyLayout, Mapping[str, Any]]:
        """Count the tokens of the recipe's text.

        Raises:
            Refused: the text cannot be read, or nothing says which tokens stay.
        """
        recipe = asked.recipe
        texts = [section for section in (recipe.calibration, recipe.held_out) if section is not None]
        raise_all([problem for section in texts for problem in data.problems(section)])
        counts, record = None, {}
        if recipe.calibration is not None:
            what = f"how often {recipe.calibration.name or 'drawn tokens'} uses each token"
            measured = asked.request.survey.recorded(what, asked.checkpoint, recipe, lambda _: _counts(layout, asked))
            counts, record = measured.tensors["counts"], dict(measured.record)
        uses = torch.zeros(layout.size) if counts is None else counts
        scores = layout.vocabulary.scores(uses, layout.stays, layout.written)
        structures = tuple(
            dataclasses.replace(structure, importance=scores[: structure.size]) for structure in layout.structures
        )
        counted = dataclasses.replace(layout, structures=structures, counts=counts, held_out=recipe.held_out)
        return counted, record

    def interchangeable(self, checkpoint: Checkpoint, layout: VocabularyLayout) -> bool:
        """No token stands for another: the tokenizer's files name those that stay."""
        return False

    def edit(self, layout: VocabularyLayout, sizes: Sequence[int], kept: Kept) -> Edit:
        """Cut every table of tokens; config.json and the tokenizer's files number those that stay.

        Raises:
            Refused: a file of the tokenizer cannot be written, or would divide texts otherwise.
        """
        numbering, changes = Numbering(kept[0], layout.size), _changes(layout, sizes)
        if sizes[0] == layout.size:
            told = (f"no token goes: all {layout.size:,} are used",)
            return Edit(dict(layout.architecture.config), layout.structures, tuple(sizes), changes, told, kept=kept)
        config = renumbered(layout.config, numbering, layout.size)
        for table, size in zip(layout.tables, sizes, strict=True):
            for field in table.fields:
                config = with_value(config, field, size)
        files = TokenFiles(_folder(layout), numbering, layout.vocabulary.ids)
        files.write(layout.checkpoint.source.side_files)
        require_same_tokens(layout.tokenizer, layout.vocabulary, files, config, layout.checkpoint.source.side_files)
        figures = _figures(layout, numbering)
        return Edit(
            config,
            layout.structures,
            tuple(sizes),
            changes,
            _warnings(files.left_out),
            _notes(figures),
            kept=kept,
            files=files.written,
            left_out=tuple(files.left_out),
            figures=figures,
        )


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    path = (checkpoint.source.folder or Path()) / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _folder(layout: VocabularyLayout) -> Path:
    folder = layout.checkpoint.source.folder
    assert folder is not None  # the tokenizer lies in it
    return folder


def _named(unit: Tokens, vocabulary: Vocabulary, tokenizer: Any) -> set[int]:
    """Tokens that are named, and those that named words consist of."""
    named = [*unit.keep, *(line.strip() for line in (lines(Path(unit.file)) if unit.file else ()))]
    words = [word for word in named if word and word not in vocabulary.ids]
    tokens = {vocabulary.ids[token] for token in named if token in vocabulary.ids}
    divided = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    return tokens.union(*map(set, divided))


def _counts(layout: VocabularyLayout, asked: Step) -> SurveyResult:
    assert asked.recipe.calibration is not None
    counts, source = usage(asked.checkpoint, asked.recipe.calibration, layout.tokenizer, layout.size)
    return SurveyResult({"counts": counts}, record_of_data([source], 1))


def _changes(layout: VocabularyLayout, sizes: Sequence[int]) -> dict[str, ParameterChange]:
    changes = {name: ParameterChange(name) for name in layout.architecture.specs}
    for number, (table, size) in enumerate(zip(layout.tables, sizes, strict=True)):
        for name, axis in table.axes if size < table.size else ():
            detail = {Tokens.plural: f"{size} of {table.size}"}
            changes[name] = ParameterChange(name, (*changes[name].cuts, Cut(number, axis)), detail)
    return changes


def _figures(layout: VocabularyLayout, numbering: Numbering) -> dict[str, Any]:
    """How many tokens stay, and what of the texts needs one that goes."""
    figures: dict[str, Any] = {"tokens": len(numbering.kept), "of": layout.size}
    gone = torch.ones(layout.size, dtype=torch.bool)
    gone[list(numbering.kept)] = False
    if layout.counts is not None:
        total = float(layout.counts.sum())
        lost = float(layout.counts[gone].sum())
        figures["text"] = {"tokens": lost / max(total, 1), "of_tokens": int(total)}
    if layout.held_out is not None:
        samples, _ = token_samples(layout.checkpoint, layout.held_out, layout.tokenizer)
        figures["held_out"] = shares_needing(samples, gone)
    return figures


def _notes(figures: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"{figures['tokens']:,} of {figures['of']:,} tokens stay"]
    if "text" in figures:
        share, count = figures["text"]["tokens"], figures["text"]["of_tokens"]
        notes.append(f"{share:.3%} of the text's {count:,} tokens go")
    if "held_out" in figures:
        held_out = figures["held_out"]
        told = f"held-out text: {held_out['samples']:.2%} of {held_out['of_samples']:,} samples need a token that goes"
        notes.append(f"{told}, {held_out['tokens']:.3%} of {held_out['of_tokens']:,} tokens")
    return tuple(notes)


def _warnings(left_out: Sequence[Path]) -> tuple[str, ...]:
    if not left_out:
        return ()
    names = ", ".join(map(str, left_out))
    return (f"left out, since it numbers all tokens and {WHOLE} says all that is needed: {names}",)


UNIT = VocabularyUnit()
