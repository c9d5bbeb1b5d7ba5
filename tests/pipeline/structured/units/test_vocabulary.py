"""Tokens that go: the tokenizer divides as before what needs none of them, and the model computes the same for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import aicompress
from aicompress.data import Data
from aicompress.errors import RecipeError, Refused
from aicompress.methods import get
from aicompress.methods.prune import vocabulary
from aicompress.methods.structural import Structure
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.vocabulary_axes import token_tables
from aicompress.pipeline import steps
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner
from aicompress.pipeline.structured import run as structure
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.pipeline.verify import verify
from aicompress.recipe import Recipe, load
from aicompress.recipe.section import ReportFiles
from aicompress.recipe.step import Calibration
from aicompress.weights import TensorSpec
from tests import tokenizers
from tests.checkpoints import sentences
from tests.inputs import once, written
from tests.pipeline.steps import OFF

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SHAPE, **IDS, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3}


def bert(tokens: int) -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**SHAPE, vocab_size=tokens, pad_token_id=0, initializer_range=0.3))


def llama(tokens: int) -> Any:
    """With rows that no token has, as models with a rounded number of them have."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, vocab_size=tokens + 9, tie_word_embeddings=False))


def tied_llama(tokens: int) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, vocab_size=tokens, tie_word_embeddings=True))


def bart(tokens: int) -> Any:
    """Encoder, decoder, one table for both and a bias of the head along its second axis."""
    fields = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
    ids = {**IDS, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return hf.BartForConditionalGeneration(hf.BartConfig(**fields, **heads, **ids, vocab_size=tokens, init_std=0.3))


MODELS: dict[str, Callable[[int], Any]] = {
    "word_piece": bert, "byte_level": llama, "unigram": bart, "merged_pieces": tied_llama
}  # fmt: skip


def made(kind: str, built: Path) -> Path:
    def make(folder: Path) -> Path:
        tokens = tokenizers.save(kind, folder)
        torch.manual_seed(0)
        model = MODELS[kind](tokens).eval()
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(bias)
        model.save_pretrained(folder)
        return folder

    return once(built / f"vocabulary-{kind}", make)


def plan(source: Path, out: Path, text: Path | None = None, held_out: Path | None = None, **method: Any) -> Any:
    sections: dict[str, Any] = {"report": ReportFiles(html=False)}
    if text is not None:
        sections["calibration"] = Calibration(text=str(text), length=32)
    if held_out is not None:
        sections |= {"held_out": Data(text=str(held_out), length=32), "gates": ("vocabulary.held_out.tokens < 1",)}
    recipe = Recipe(version=1, method=get("prune", "vocabulary").config(**method), **sections)
    return planner.make_plan(source, Destination(out), recipe, "prune")


def run(planned: StructurePlan) -> Any:
    """The report; the plan's bytes must be those of the run, and what is written sound."""
    out = planned.output.destination.path
    report = structure.run(planned, OFF)
    assert verify(out).problems == ()
    assert planned.output.weight_bytes == (out / "model.safetensors").stat().st_size
    assert planned.output.other_bytes == sum(
        f.stat().st_size for f in out.rglob("*") if f.suffix != ".safetensors" and f.stem != "report"
    )
    return report


def both(source: Path, out: Path) -> tuple[Any, Any]:
    return hf.AutoTokenizer.from_pretrained(source), hf.AutoTokenizer.from_pretrained(out)


def numbers(before: Any, after: Any) -> dict[int, int]:
    """What the id of every token that stays has become, by its name."""
    names = after.get_vocab()
    return {old: names[token] for token, old in before.get_vocab().items() if token in names}


def texts(tokenizer: Any, ids: dict[int, int]) -> Iterator[str]:
    """Real sentences, and every kept token's own text."""
    yield from (*sentences(400, skip=300), *tokenizers.OTHERS, "a <tool> qzx", "𝄞 ☃ ﷽", "two  blanks\n\nand lines")
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        yield tokenizer.convert_tokens_to_string([token])


@pytest.mark.parametrize("kind", MODELS)
def test_what_needs_no_dropped_token_is_as_before(kind: str, built: Path, tmp_path: Path) -> None:
    whole, out = made(kind, built), tmp_path / "out"
    text = written(tmp_path / "text.txt", sentences(60))
    held_out = written(tmp_path / "held-out.txt", sentences(60, skip=100))
    report = run(plan(whole, out, text, held_out))
    before, after = both(whole, out)
    ids = numbers(before, after)
    assert len(ids) == len(after) < len(before)
    assert sorted(ids.values()) == list(range(len(ids)))
    assert tokenizers.ALWAYS[kind] <= after.get_vocab().keys()
    lossless = 0
    for line in texts(before, ids):
        old, new = before(line)["input_ids"], after(line)["input_ids"]
        if all(token in ids for token in old):
            lossless += 1
            assert new == [ids[token] for token in old], line
    assert lossless > len(ids)
    figures = report.vocabulary
    assert (figures["tokens"], figures["of"]) == (len(ids), hf.AutoConfig.from_pretrained(whole).vocab_size)
    assert figures["text"]["tokens"] == 0
    assert [gate.value for gate in report.gates] == [figures["held_out"]["tokens"]]
    assert 0 < figures["held_out"]["tokens"] < figures["held_out"]["samples"] <= 1
    check_the_model(MODELS[kind](64), (whole, out), before, ids)


def check_the_model(kind: Any, folders: tuple[Path, Path], before: Any, ids: dict[int, int]) -> None:
    """Its logits of the tokens that stay are bit for bit those of before; config.json names the same tokens."""
    wide, narrow = (type(kind).from_pretrained(folder).eval() for folder in folders)
    old = torch.tensor([before(line)["input_ids"][:24] for line in sentences(60) if len(line) > 120])
    new = torch.tensor([[ids[token] for token in row] for row in old.tolist()])
    columns = torch.tensor(sorted(ids, key=ids.__getitem__))
    with torch.inference_mode():
        assert torch.equal(narrow(new).logits, wide(old).logits[..., columns])
    for name in ("pad", "bos", "eos", "decoder_start", "forced_eos"):
        old_id = getattr(wide.config, f"{name}_token_id", None)
        assert getattr(narrow.config, f"{name}_token_id", None) == (None if old_id is None else ids[old_id])
    tied = wide.get_output_embeddings().weight is wide.get_input_embeddings().weight
    assert (narrow.get_output_embeddings().weight is narrow.get_input_embeddings().weight) == tied


def kept(planned: StructurePlan) -> set[str]:
    """Names of the tokens that would stay."""
    tokenizer = hf.AutoTokenizer.from_pretrained(planned.checkpoint.path)
    return set(tokenizer.convert_ids_to_tokens(list(planned.edit.kept[0])))


@pytest.fixture(scope="module")
def encoder(built: Path) -> Path:
    return made("word_piece", built)


def test_an_alphabet_keeps_what_is_written_in_it(encoder: Path, tmp_path: Path) -> None:
    every = set(hf.AutoTokenizer.from_pretrained(encoder).get_vocab())
    latin = kept(plan(encoder, tmp_path / "out", alphabet=["latin"]))
    assert {token for token in every - latin if token.isascii()} == {"[unused0]", "[unused1]"}
    assert not any("а" <= letter <= "я" or "α" <= letter <= "ω" for token in latin for letter in token)
    wider = kept(plan(encoder, tmp_path / "out", alphabet=["latin", "а-я", "U+03B1-U+03C9"]))
    assert {token for token in every - wider if len(token) > 1} == {"[unused0]", "[unused1]"}


def test_options_add_tokens_that_stay(encoder: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "text.txt", ["function value", "function of a value", "function"])
    tokens = {
        minimum: kept(plan(encoder, tmp_path / "out", text, minimum=minimum, keep=["##ing", "names"]))
        for minimum in (1, 2, 3)
    }
    assert {"##ing", "names", *tokenizers.SPECIAL.values(), "<tool>", "qzx", "##n", "n"} <= tokens[3]
    assert tokens[1] > tokens[2] > tokens[3]
    assert "of" in tokens[1] - tokens[2]
    listed = written(tmp_path / "keep.txt", ["##ing", "names"])
    assert kept(plan(encoder, tmp_path / "out", text, minimum=2, keep={"text": str(listed)})) == tokens[2]
    wanted = -(-len(tokens[1]) // 64) * 64
    filled = plan(encoder, tmp_path / "out", text, keep=["##ing", "names"], multiple=64)
    assert filled.edit.sizes == (wanted,)
    assert filled.edit.config["vocab_size"] == wanted
    assert kept(filled) > tokens[1]
    assert plan(encoder, tmp_path / "out", text, tokens=100).edit.sizes == (100,)


def test_every_file_follows(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made("byte_level", built), tmp_path / "in")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0, "pad_type_id": 0,
                            "pad_to_multiple_of": None, "pad_token": "<pad>"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(described))
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": tokenizer.get_vocab()["<tool>"]}))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    used, unused = tokenizer("function")["input_ids"][1], vocabulary["Ģ"]
    gone = next(
        number
        for token, number in vocabulary.items()
        if len(token) > 4 and token.isalpha() and token not in "Ġfunction"
    )
    ids = {
        "bos_token_id": 1, "eos_token_id": [2, used], "forced_decoder_ids": [[1, used]],
        "suppress_tokens": [used, gone], "bad_words_ids": [[used], [gone, used]], "lang_to_id": {"<|en|>": unused},
        "max_length": 20,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(ids))
    planned = plan(folder, tmp_path / "out", written(tmp_path / "text.txt", ["function value"]))
    assert any("tokenizer.model" in warning for warning in planned.warnings)
    run(planned)
    out = tmp_path / "out"
    after = hf.AutoTokenizer.from_pretrained(out)
    new = numbers(tokenizer, after)
    read = {
        name: json.loads((out / name).read_text()) for name in ("vocab.json", "added_tokens.json", "tokenizer.json")
    }
    assert read["vocab.json"] == {token: new[number] for token, number in vocabulary.items() if number in new}
    assert read["added_tokens.json"] == {"<tool>": after.get_vocab()["<tool>"]}
    assert [line.split() for line in (out / "merges.txt").read_text().splitlines()[1:]] == read["tokenizer.json"][
        "model"
    ]["merges"]
    assert not (out / "tokenizer.model").exists()
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": new[1], "eos_token_id": [new[2], new[used]], "forced_decoder_ids": [[1, new[used]]],
        "suppress_tokens": [new[used]], "bad_words_ids": [[new[used]]], "lang_to_id": {"<|en|>": new[unused]},
        "max_length": 20,
    }  # fmt: skip


def test_quantized_shards_of_an_encoder_with_modules(tiny_bert: Path, tmp_path: Path) -> None:
    """Stored codes are cut, not decoded; what sentence-transformers reads comes along; a later step goes on."""
    kinds = ["select.kinds=[linear,embedding]", "method.group_size=16", "report.html=false"]
    quantize = steps.make_plan(
        tiny_bert, Destination(tmp_path / "w4"), load("quantize/rtn-w4", "quantize", kinds), "quantize"
    )
    steps.run(quantize, OFF)
    recipe = load("prune/vocabulary-english", "prune", ["method.alphabet=[]", "method.tokens=160", "report.html=false"])
    planned = planner.make_plan(tmp_path / "w4", Destination(tmp_path / "out", max_shard_size=20_000), recipe, "prune")
    report = structure.run(planned, OFF)
    assert not any("decoded" in warning for warning in report.warnings)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify(tmp_path / "out").problems == ()
    before, after = both(tiny_bert, tmp_path / "out")
    ids = numbers(before, after)
    wide, narrow = (aicompress.load(tmp_path / folder) for folder in ("w4", "out"))
    kept = [token for token in before.convert_ids_to_tokens(sorted(ids)) if token.isalpha()]
    line = " ".join(kept[:16])  # whole words: a piece of one may need a token that was dropped
    with torch.inference_mode():
        old, new = (
            model(**tokenizer(line, return_tensors="pt"))[0] for model, tokenizer in ((wide, before), (narrow, after))
        )
    assert torch.equal(old, new)
    assert (tmp_path / "out" / "modules.json").read_bytes() == (tiny_bert / "modules.json").read_bytes()


def gemma() -> Any:
    """A table for every layer of the first tokens, in a part of config.json."""
    fields = {"vocab_size": 70, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 4, "laurel_rank": 2}
    more = {"activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
    return hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(**{**SHAPE, "num_hidden_layers": 2}, **fields, **more, head_dim=8)
    )


def test_tables_of_nested_and_further_vocabularies(tmp_path: Path) -> None:
    nested = hf.CLIPModel(hf.CLIPConfig(
        text_config={**SHAPE, "vocab_size": 70, "projection_dim": 8},
        vision_config={**SHAPE, "image_size": 8, "patch_size": 4, "projection_dim": 8}, projection_dim=8,
    ))  # fmt: skip
    for model, number in ((nested, 1), (gemma(), 2)):
        specs = {name: TensorSpec.of(value) for name, value in model.state_dict().items()}
        _, tables = token_tables(Architecture.of(model.config.to_dict(), specs))
        assert [table.size for table in tables] == [70, 60][:number]
        for table in tables:
            assert all(specs[name].shape[axis] >= table.size for name, axis in table.axes)
    assert [name for name, _ in tables[1].axes] == ["model.embed_tokens_per_layer.weight"]
    scores = torch.arange(70.0).flip(0)
    structures = [Structure("", table.size, (), importance=scores[: table.size]) for table in tables]
    assert vocabulary.sizes(structures, vocabulary.VocabularyConfig(minimum=5)) == [65, 60]
    assert vocabulary.sizes(structures, vocabulary.VocabularyConfig(tokens=40)) == [40, 40]


def test_a_text_is_counted_that_the_recipe_does_not_name() -> None:
    counted = load("prune/vocabulary-english", "prune", ["text=a.txt", "seed=1"]).calibration
    assert counted is not None
    assert counted.text == str(Path("a.txt").absolute())


def test_refusals_are_clear(encoder: Path, tiny_vit: Path, tmp_path: Path) -> None:
    def refused(folder: Path, **method: Any) -> str:
        with pytest.raises(Refused) as error:
            plan(folder, tmp_path / "out", **method)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "Unicode has no 'latinn'" in refused(encoder, alphabet=["latinn"])
    assert "runs backwards" in refused(encoder, alphabet=["z-a"])
    assert "tokens must stay" in refused(encoder, tokens=3)
    assert "nothing says which tokens stay" in refused(encoder)
    assert "has no tokenizer" in refused(tiny_vit, alphabet=["latin"])
    with pytest.raises(RecipeError, match="drops no tokens"):
        load("prune/width-20", "prune", ["held_out.text=x.txt"])
    unknown = load("prune/vocabulary-latin", "prune", ["gates=[vocabulary.token < 1]"])
    with pytest.raises(RecipeError, match=r"vocabulary.token will not be measured"):
        planner.make_plan(encoder, Destination(tmp_path / "out"), unknown, "prune")
    alone = shutil.copytree(encoder, tmp_path / "alone")
    settings = alone / "tokenizer_config.json"
    plain = settings.read_text()
    settings.write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert "a tokenizer in Python" in refused(alone, alphabet=["latin"])
    settings.write_text(plain)
    described = json.loads((alone / "tokenizer.json").read_text())
    described["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    described["added_tokens"], described["post_processor"] = [], None
    (alone / "tokenizer.json").write_text(json.dumps(described))
    assert "tokens" in refused(alone, tokens=1)
