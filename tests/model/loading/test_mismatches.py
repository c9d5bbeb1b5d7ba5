from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.model.loading.mismatches import mismatches, require_fits


def shapes(path: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config is not None
    return checkpoint.config, {name: spec.shape for name, spec in checkpoint.parameters().items()}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_untied", "tiny_gpt2", "tiny_bert", "tiny_t5", "tiny_vit"])
def test_what_transformers_saves_is_what_it_expects(name: str, request: pytest.FixtureRequest) -> None:
    assert mismatches(*shapes(request.getfixturevalue(name))) == []


def test_one_of_two_tied_parameters_is_enough(tiny_llama: Path) -> None:
    config, found = shapes(tiny_llama)
    table = found.pop("model.embed_tokens.weight")
    assert mismatches(config, {**found, "lm_head.weight": table}) == []
    assert mismatches(config, found) == ["model.embed_tokens.weight is missing"]


def test_an_untied_head_must_be_there(tiny_llama_untied: Path) -> None:
    config, found = shapes(tiny_llama_untied)
    del found["lm_head.weight"]
    assert mismatches(config, found) == ["lm_head.weight is missing"]


def test_a_base_models_prefix_may_be_missing(tiny_gpt2: Path) -> None:
    config, found = shapes(tiny_gpt2)
    assert mismatches(config, {name.removeprefix("transformer."): shape for name, shape in found.items()}) == []


def test_an_unknown_architecture_is_not_judged() -> None:
    assert mismatches({"model_type": "nothing", "architectures": ["Nothing"]}, {}) is None


def test_names_that_transformers_has_no_place_for_are_told(tiny_llama_untied: Path, tmp_path: Path) -> None:
    """As those of ShieldGemma 2, which transformers saves under names that it does not load."""
    (tmp_path / "config.json").write_bytes((tiny_llama_untied / "config.json").read_bytes())
    tensors = load_file(tiny_llama_untied / "model.safetensors")
    named = {name.replace("model.layers", "text.layers"): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"is missing, .*has no place for \d+ that it holds, text.layers"
    ) as error:
        require_fits(Checkpoint.open(tmp_path))
    assert "transformers, too, loads random numbers" in error.value.hint
