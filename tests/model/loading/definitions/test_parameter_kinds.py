"""What a model definition says of its parameters, for definitions with classes and names of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import aicompress
from aicompress import recipe as recipes
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.naming import routers_of
from aicompress.model.kernels.is_linear import is_linear
from aicompress.model.loading.definitions.parameter_kinds import layer_kinds
from aicompress.model.loading.mismatches import mismatches
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.weights import TensorSpec
from tests import checkpoints

OFF = Options(latency="off")
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


class Scaled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Chosen(nn.Linear):
    """A Linear that chooses among experts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Written(nn.Linear):
    """A Linear with a forward of its own that computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_known_by_what_it_computes(bias: bool) -> None:
    assert all(is_linear(each) for each in (nn.Linear(4, 3, bias=bias), Written(4, 3, bias=bias)))
    assert not any(is_linear(each) for each in (Scaled(4, 3, bias=bias), Chosen(4, 3, bias=bias), nn.LayerNorm(3)))


def ibert() -> Any:
    """Its layers are no Linear, and give a scale beside the product where they round."""
    config = hf.IBertConfig(**(SMALL | {"pad_token_id": 1}), num_attention_heads=4, initializer_range=0.2)
    return hf.IBertForMaskedLM(config)


def falcon() -> Any:
    return hf.FalconForCausalLM(hf.FalconConfig(**FALCON, initializer_range=0.2))


@pytest.mark.parametrize(("make", "count"), [(falcon, 8), (ibert, 12)])
def test_layers_of_a_class_of_their_own_are_quantized(make: Callable[[], Any], count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "in")
    recipe = recipes.load("quantize/rtn-w8", "quantize")
    layerwise.run(planner.make_plan(tmp_path / "in", Destination(tmp_path / "out"), recipe, "quantize"), OFF)
    names = Checkpoint.open(tmp_path / "out").manifest.entries
    assert sum(re.search("mlp.dense|attention|intermediate|output", name) is not None for name in names) == count
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        original = model(ids).logits
        for kernels in ("fast", "reference"):
            loaded = aicompress.load(tmp_path / "out", kernels=kernels)(ids).logits  # type: ignore[arg-type]
            assert (loaded - original).norm() < 0.05 * original.norm()
        stock = type(model).from_pretrained(tmp_path / "out")(ids).logits
        assert (stock - original).norm() < 0.05 * original.norm()


def test_a_router_that_transformers_renames_is_no_layer(tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoints.make_mixtral(tmp_path / "mixtral"))
    names = [layer.name for layer in opened.layers(layer_kinds(opened.config or {}, opened.parameters()))]
    assert any("experts.1.w2" in name for name in names)
    assert not any(name.endswith(".gate") for name in names)


def test_a_router_of_an_unknown_architecture_is_told_by_the_experts_beside_it(tmp_path: Path) -> None:
    folder = checkpoints.make_mixtral(tmp_path / "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "architectures": ["Mine"]}))
    names = [layer.name for layer in Checkpoint.open(folder).layers()]
    assert any("experts.1.w2" in name for name in names)
    assert not any(name.endswith(".gate") for name in names)


def test_routers_of_a_bare_file_lie_beside_experts() -> None:
    """By their names, or by an output for each expert."""
    shapes = {"a.gate": (2, 8), "b.gate": (3, 8), "b.experts.0.w1": (6, 8), "b.experts.1.w1": (6, 8)}
    shapes |= {"b.choice.classifier": (2, 8), "b.up": (6, 8), "b.shared.up": (2, 8), "c.router.layer": (4, 8)}
    specs = {f"{name}.weight": TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
    specs["c.experts.up"] = TensorSpec(torch.float32, (4, 6, 8))
    assert routers_of(specs) == {"b.gate.weight", "b.choice.classifier.weight", "c.router.layer.weight"}


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
SWITCH = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 4}
ROUTED = {
    "switch": hf.SwitchTransformersConfig(**SWITCH, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "afmoe": hf.AfmoeConfig(**SMALL, **HEADS, num_experts=4, num_dense_layers=1, moe_intermediate_size=16, head_dim=8),
    "jetmoe": hf.JetMoeConfig(**SMALL, num_key_value_heads=2, kv_channels=8, num_local_experts=4),
}


@pytest.mark.parametrize(("name", "count"), [("switch", 2), ("afmoe", 1), ("jetmoe", 4)])
def test_routers_are_told_by_what_they_give(name: str, count: int, tmp_path: Path) -> None:
    """A linear layer with an output for each expert is none to be compressed, whatever its name."""
    model = hf.AutoModel.from_config(ROUTED[name])
    model.save_pretrained(tmp_path / name)
    opened = Checkpoint.open(tmp_path / name)
    layers = {layer.tensor for layer in opened.layers(layer_kinds(opened.config or {}, opened.parameters()))}
    routers = {each for each in opened.parameters() if "router" in each and each.endswith(".weight")}
    assert len(routers) == count
    assert not routers & layers
    assert len(layers) > 2


def test_positions_that_an_architecture_computes_need_not_be_saved(tmp_path: Path) -> None:
    shape = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = hf.MarianConfig(
        vocab_size=64, d_model=16, **shape, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, init_std=0.3,
        max_position_embeddings=32, decoder_start_token_id=0, bos_token_id=None, eos_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    model = hf.MarianMTModel(config).eval()
    model.save_pretrained(tmp_path / "marian")
    assert not any("embed_positions" in name for name in Checkpoint.open(tmp_path / "marian").parameters())
    opened = Checkpoint.open(tmp_path / "marian")
    assert mismatches(opened.config or {}, {n: s.shape for n, s in opened.parameters().items()}) == []
    given = {"input_ids": torch.arange(2, 10)[None], "decoder_input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        assert torch.equal(aicompress.load(tmp_path / "marian")(**given).logits, model(**given).logits)
