"""The hidden width of whole models: the input is a narrow model with dead coordinates put between its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner as structure_planner
from aicompress.pipeline.structured import run as structure
from aicompress.recipe import load
from tests.pipeline.calibration.steps import text
from tests.pipeline.steps import OFF, loaded, prune, refused
from tests.pipeline.structured.test_calibrated import divergence, recipe, windows
from tests.pipeline.structured.test_calibrated import prune as prune_with
from tests.pipeline.structured.test_gradient_scores import sensitivities

WIDE, NARROW, HEADS = 48, 32, 4
SHAPE = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
VIT_SHAPE = {
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
T5_SHAPE = {"d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}
T5_SHAPE |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def plain(kind: str, **fields: Any) -> Callable[[int], Any]:
    """Builds a causal language model of a hidden width."""

    def build(width: int) -> Any:
        config = getattr(hf, f"{kind}Config")(**{**SHAPE, **SPECIAL, **GQA, **fields}, hidden_size=width)
        return getattr(hf, f"{kind}ForCausalLM")(config)

    return build


MODELS: dict[str, Callable[[int], Any]] = {
    "llama": plain("Llama"),
    "llama-tied": plain("Llama", tie_word_embeddings=True),
    "qwen2": plain("Qwen2"),
    "qwen3": plain("Qwen3"),
    "gemma2": plain("Gemma2"),
    "phi3": plain("Phi3"),
    "mixtral": plain("Mixtral", num_local_experts=3),
    "vit": lambda width: hf.ViTForImageClassification(hf.ViTConfig(**VIT_SHAPE, hidden_size=width, head_dim=8)),
    "bert": lambda width: hf.BertModel(hf.BertConfig(**SHAPE, hidden_size=width)),
    "bert-masked": lambda width: hf.BertForMaskedLM(hf.BertConfig(**SHAPE, hidden_size=width)),
    "bert-classifier": lambda width: hf.BertForSequenceClassification(hf.BertConfig(**SHAPE, hidden_size=width)),
    "distilbert": lambda width: hf.DistilBertModel(
        hf.DistilBertConfig(dim=width, hidden_dim=40, n_layers=2, n_heads=4, vocab_size=64)
    ),
    "gpt2": lambda width: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=width, n_inner=40, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    ),
    "t5": lambda width: hf.T5ForConditionalGeneration(hf.T5Config(d_model=width, **T5_SHAPE)),
}


def widened(narrow: Any, wide: Any) -> torch.Tensor:
    """Make a wide model of a narrow one and dead coordinates; returns the live ones."""
    generator, head = torch.Generator().manual_seed(0), WIDE // HEADS
    live = torch.cat([n * head + torch.randperm(head, generator=generator)[: NARROW // HEADS] for n in range(HEADS)])
    live = live.sort().values
    small = dict(narrow.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            value = small[name]
            for axis, size in enumerate(parameter.shape):
                if value.shape[axis] != size:
                    shape = [*value.shape]
                    shape[axis] = size
                    places = torch.cat([live + WIDE * copy for copy in range(size // WIDE)])
                    value = torch.zeros(shape).index_copy(axis, places, value)
            parameter.copy_(value)
    return live


@pytest.mark.parametrize("name", MODELS)
def test_dead_coordinates_go_and_the_narrow_model_is_left(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    narrow, wide = (MODELS[name](width).eval() for width in (NARROW, WIDE))
    for parameter in narrow.parameters():
        torch.nn.init.normal_(parameter)
    widened(narrow, wide)
    wide.save_pretrained(tmp_path / "in")
    narrow.save_pretrained(tmp_path / "wanted")
    report = prune(tmp_path / "in", tmp_path / "out", name="hidden", hidden_size=NARROW)
    wanted, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("wanted", "out"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    loaded(wide, tmp_path / "out")
    assert report.after.parameters == sum(tensor.numel() for tensor in found.values())


def test_a_head_size_that_follows_from_the_width_is_written_down(tmp_path: Path) -> None:
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SHAPE, **SPECIAL, num_key_value_heads=2, hidden_size=WIDE))
    model.save_pretrained(tmp_path / "in")
    assert "head_dim" not in json.loads((tmp_path / "in" / "config.json").read_text())
    prune(tmp_path / "in", tmp_path / "out", name="hidden", keep=0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"]) == (24, 12)
    found = loaded(model, tmp_path / "out")
    assert found.model.layers[0].self_attn.q_proj.weight.shape == (48, 24)


def test_nothing_changes_at_sparsity_zero(tiny_llama: Path, tmp_path: Path) -> None:
    prune(tiny_llama, tmp_path / "out", name="hidden", sparsity=0.0)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "out"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_share_is_rounded_to_a_width_that_transformers_takes(tiny_llama: Path, tmp_path: Path) -> None:
    prune(tiny_llama, tmp_path / "out", name="hidden", keep=0.51, multiple=1)  # 33 of 64, four heads
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 36


def test_a_target_gives_the_widest_stream_that_fits(tiny_llama: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, tmp_path / "out", name="hidden", target_parameters=90_000, multiple=4)
    width = json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"]
    each = report.before.parameters / 64  # all tensors of this model have one axis of the stream
    assert each * width == report.after.parameters <= 90_000 < each * (width + 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": 33}, "the nearest that fit are 32 and 36"),
        ({"hidden_size": 80}, "the stream has 64 coordinates"),
        ({"keep": 0.5, "stack": "model.layers"}, "all stacks share one hidden width"),
    ],
)
def test_refuses_widths(fields: dict[str, Any], expected: str, tiny_llama: Path, tmp_path: Path) -> None:
    assert expected in refused(tiny_llama, tmp_path / "out", name="hidden", **fields)


def test_heads_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHAPE, hidden_size=WIDE))
    model.save_pretrained(tmp_path / "in")
    assert "whichever of its 2 kinds of square matrices hold heads" in refused(
        tmp_path / "in", tmp_path / "out", name="hidden", keep=0.5
    )


def test_what_would_follow_from_the_width_is_written_down(tmp_path: Path) -> None:
    shape = {"n_embd": WIDE, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape))
    model.save_pretrained(tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "out", name="hidden", hidden_size=32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_embd"], config["n_inner"]) == (32, 4 * WIDE)
    loaded(model, tmp_path / "out")


def test_side_files_say_the_new_width(tiny_bert: Path, tmp_path: Path) -> None:
    prune(tiny_bert, tmp_path / "out", name="hidden", hidden_size=32)
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert pooling["pooling_mode_mean_tokens"]


def test_refuses_a_checkpoint_that_its_config_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text((tiny_llama / "config.json").read_text())
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    found = refused(tmp_path / "in", tmp_path / "out", name="hidden", keep=0.5)
    assert "model.norm.weight is [63], config.json says [64]" in found


def test_activation_and_fitted_readers_keep_more_than_norms(
    trained_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    found: dict[str, float] = {}
    ids = windows(trained_llama, text_file)
    for name, fields in {"norm": {"score": "norm"}, "cut": {"refit": False}, "fit": {}}.items():
        data = None if name == "norm" else text(text_file, 24)
        method = {"name": "hidden", "sparsity": 0.25, "score": "activation", **fields}
        path = recipe(tmp_path, data, method)
        planned = structure_planner.make_plan(
            str(trained_llama), Destination(tmp_path / name), load(str(path), "prune"), "prune", Request()
        )
        report = structure.run(planned, OFF)
        found[name] = divergence(trained_llama, tmp_path / name, ids)
        assert bool(report.calibration) == (name != "norm")
    assert found["fit"] < 0.8 * found["cut"]
    assert found["fit"] < 0.8 * found["norm"]


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_bert", "tiny_mixtral"])
def test_readers_of_every_kind_are_fitted(
    name: str, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(name)
    before, found = load_file(source / "model.safetensors"), {}
    for fit in (False, True):
        method = {"name": "hidden", "keep": 0.5, "score": "activation", "refit": fit}
        path = recipe(tmp_path, text(text_file, 8), method)
        out = tmp_path / f"{fit}"
        planned = structure_planner.make_plan(
            str(source), Destination(out), load(str(path), "prune"), "prune", Request()
        )
        structure.run(planned, OFF)
        found[fit] = load_file(out / "model.safetensors")
    readers = planned.edit.consumers
    fitted = [key for key in readers if not torch.equal(found[True][key], found[False][key])]
    assert len(fitted) > 0.7 * len(readers)  # an expert that few tokens reach is cut as it is
    others = [key for key in before if key not in readers and not key.endswith("bias")]
    assert all(torch.equal(found[True][key], found[False][key]) for key in others)
    hf.AutoModel.from_pretrained(tmp_path / "True")


def test_statistics_are_read_from_a_file(trained_llama: Path, text_file: Path, tmp_path: Path) -> None:
    method = {"name": "hidden", "sparsity": 0.25, "score": "activation"}
    path = recipe(tmp_path, text(text_file, 8), method)
    outs = []
    for stats in ((), (tmp_path / "stats.safetensors",), (tmp_path / "stats.safetensors",)):
        outs.append(tmp_path / f"out{len(outs)}")
        made = structure_planner.make_plan(
            str(trained_llama), Destination(outs[-1]), load(str(path), "prune"), "prune", Request(stats=stats)
        )
        structure.run(made, OFF)
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[1] == weights[2]
    tensors = [load_file(out / "model.safetensors") for out in outs[:2]]
    assert all(torch.allclose(tensors[0][key], tensors[1][key], rtol=1e-3, atol=1e-4) for key in tensors[0])


def test_coordinates_by_gradients(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    """By hand with autograd; a file of statistics gives the same bytes; and the loss is what it goes by."""
    model = hf.AutoModelForCausalLM.from_pretrained(trained_llama)
    found = sensitivities(model, windows(trained_llama, text_file, 4))
    total = torch.zeros(64, dtype=torch.float64)
    for name, squares in found.items():
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        total += squares.sum(1) if adds else squares.sum(0)  # an embedding has coordinates as columns, as readers have
    best = total.topk(48).indices.sort().values
    method = {"name": "hidden", "hidden_size": 48, "score": "taylor", "loss": "task", "refit": False}
    report = prune_with(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file, 4), method))
    narrow = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(narrow.model.embed_tokens.weight, model.model.embed_tokens.weight[:, best])
    assert report.calibration["data"][0]["samples"] == 4
    stats = Request(stats=(tmp_path / "stats.safetensors",))
    fitted = {**method, "refit": True}
    prune_with(trained_llama, tmp_path / "one", recipe(tmp_path, text(text_file, 4), fitted), stats)
    prune_with(trained_llama, tmp_path / "two", recipe(tmp_path, None, fitted), stats)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert (
        load_file(tmp_path / "one" / "model.safetensors").keys()
        == load_file(tmp_path / "two" / "model.safetensors").keys()
    )
    assert len(files[0]) == len(files[1])
    ids = windows(trained_llama, text_file, 8)
    assert divergence(trained_llama, tmp_path / "one", ids) < divergence(trained_llama, tmp_path / "out", ids)
