"""What classes of stock transformers would make of an output is told before it is written, from names alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from aicompress.checkpoint.layouts import ct_config, ct_tensors
from aicompress.model.hf import AicompressConfig, store
from aicompress.model.loading.definitions.definition import skeleton, stock_models
from aicompress.model.loading.stock import StockReader, Trial
from aicompress.weights import IntGrouped

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BERT = {**SHAPE, "model_type": "bert", "architectures": ["BertForMaskedLM"]}


def trials(config: Mapping[str, Any], named: bool) -> dict[str, Trial]:
    """Of 8-bit layers with targets for what the file names only, or for each reader's own names too."""
    model = skeleton(dict(config))
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    weights = {
        name: IntGrouped.outline(shape, (torch.float16, (shape[0], 1)), True, 8, 0)
        for name, shape in parameters.items()
        if len(shape) == 2 and "layer" in name
    }
    readers = [StockReader(model, parameters) for model in stock_models(dict(config))]
    names = [reader.names() for reader in readers] if named else []
    described = ct_config(weights, False, set(parameters) - set(weights), names)
    assert described is not None
    stored = {
        disk: name for name in parameters for disk in (ct_tensors(name, weights[name]) if name in weights else [name])
    }
    return {reader.name: reader.try_packed(described, weights, stored) for reader in readers}


@pytest.mark.parametrize(("config", "base", "count"), [(LLAMA, "LlamaModel", 14), (BERT, "BertModel", 12)])
def test_a_base_model_without_the_prefix_would_be_filled_at_random(
    config: dict[str, Any], base: str, count: int
) -> None:
    (head,) = config["architectures"]
    found = trials(config, named=False)
    assert found[head].loads
    assert len(found[base].random) == count  # a pooler, which the checkpoint lacks in any case, is not among them
    assert all(trial.loads for trial in trials(config, named=True).values())


def test_classes_are_what_config_names_and_the_base_model() -> None:
    assert [type(model).__name__ for model in stock_models(LLAMA)] == ["LlamaForCausalLM", "LlamaModel"]
    assert [type(model) for model in stock_models({**BERT, "architectures": ["BertModel"]})] == [hf.BertModel]
    assert stock_models({**LLAMA, "model_type": "unheard-of"}) == []


class SmallConfig(hf.PreTrainedConfig):
    model_type = "small-renamed"


class Small(hf.PreTrainedModel):
    """A model whose weights this transformers renames on load, and nothing beside them."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.inner = nn.Linear(8, 8, bias=False)
        self.post_init()


def test_stored_tensors_that_would_not_arrive_are_refused() -> None:
    """Each tensor of a layer must reach it: without its scales a layer would run on noise."""
    renaming = [WeightRenaming(r"outer\.weight$", "inner.weight")]
    register_checkpoint_conversion_mapping("small-renamed", renaming, overwrite=True)
    weight = IntGrouped.outline((8, 8), (torch.float16, (8, 1)), True, 8, 0)
    tensors = {"outer.weight": weight.tensors()[""], "outer.weight_scale": weight.tensors()["scale"]}
    entry = {"shape": [8, 8], "dtype": "F32", "meta": weight.meta(), "tensors": ["", "scale"]}
    with torch.device("meta"):
        model = Small(SmallConfig())
    with pytest.raises(ValueError, match=r"no place for outer.weight_scale.*aicompress.load"):
        store(model, AicompressConfig(entries={"outer.weight": entry}), tensors)
