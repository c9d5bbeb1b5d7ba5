"""What a change of weights costs the outputs, against running the changed model from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.model.loading.load import build, load
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import Slot
from aicompress.model.sensitivity.output_divergence import BROKEN, OutputSensitivity
from tests.pipeline.families import gemma3n

IDS = torch.arange(3, 51).reshape(2, 24)


def probe(source: Path, batches: list[dict[str, Any]], resident: bool = True) -> OutputSensitivity:
    checkpoint = Checkpoint.open(source)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model)

    def place(name: str) -> str | None:
        found = loader.place_of(name)
        return found.module if isinstance(found, Slot) else found

    return OutputSensitivity(model, loader, (checkpoint.dense, place), batches, resident)


def changed(source: Path, *names: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(source)
    return {name: checkpoint.dense(name) * 1.3 for name in names}


def noisy(source: Path, name: str) -> dict[str, Tensor]:
    """A change that no norm behind the layer takes back."""
    tensor = Checkpoint.open(source).dense(name)
    return {name: tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * tensor.std() / 4}


def by_hand(source: Path, changes: dict[str, Tensor], batches: list[dict[str, Any]]) -> float:
    """KL of the logits, the whole changed model run; names are those of the model."""
    model, other = load(source), load(source)
    for name, tensor in changes.items():
        other.get_parameter(name).data.copy_(tensor)
    total = rows = 0.0
    with torch.no_grad():
        for batch in batches:
            p, q = (torch.log_softmax(m(**batch).logits.double(), -1) for m in (model, other))
            total += float(((p - q) * p.exp()).sum())
            rows += p.shape[0] * p.shape[1]
    return total / rows


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.1.mlp.up_proj.weight",),
        ("model.layers.2.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("model.embed_tokens.weight",),  # tied: the head changes too
    ],
)
def test_as_the_changed_model(tiny_llama: Path, names: tuple[str, ...], resident: bool) -> None:
    batches = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]
    changes = changed(tiny_llama, *names)
    with probe(tiny_llama, batches, resident) as running:
        assert running.loss({}) == 0
        found = running.loss(changes)
        assert found == pytest.approx(by_hand(tiny_llama, changes, batches), rel=1e-3)
        assert running.loss({}) == 0, "the change was not taken back"
        assert running.divergence


@pytest.fixture(scope="module")
def lending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last two blocks read the keys and values of the first two."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lending")
    gemma3n(4, 2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("resident", [True, False])
def test_blocks_that_do_not_run_leave_their_keys(lending: Path, resident: bool) -> None:
    batches = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]
    with probe(lending, batches, resident) as running:
        for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.3.mlp.up_proj.weight"):
            changes = noisy(lending, name)
            assert running.loss(changes) == pytest.approx(by_hand(lending, changes, batches), rel=1e-3)
        assert [running.shares(block) for block in range(4)] == [True, True, False, False]


def test_a_change_of_keys_is_taken_back(lending: Path) -> None:
    """What a block is compared on does not depend on what was tried before."""
    with probe(lending, [{"input_ids": IDS}]) as running:
        later = noisy(lending, "model.layers.3.self_attn.q_proj.weight")
        before = running.block_loss(later)
        running.block_loss(noisy(lending, "model.layers.1.self_attn.k_proj.weight"))
        assert running.block_loss(later) == before > 0


def test_blocks_before_the_change_do_not_run(tiny_llama: Path) -> None:
    with probe(tiny_llama, [{"input_ids": IDS}]) as running:
        ran: list[int] = []
        for index, block in enumerate(running._model.model.layers):
            block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
        running.loss(changed(tiny_llama, "model.layers.1.mlp.up_proj.weight"))
        assert ran == [1, 2]
        ran.clear()
        running.block_loss(changed(tiny_llama, "model.layers.1.mlp.up_proj.weight"))
        assert ran == [1]


@pytest.mark.parametrize("resident", [True, False])
def test_a_block_alone(tiny_llama: Path, resident: bool) -> None:
    """Σ ‖y − ŷ‖² of the block's output, by hooks on the whole model; the last one's is the widest."""
    name = "model.layers.1.mlp.down_proj.weight"
    changes = changed(tiny_llama, name)
    outputs = []
    for tensors in ({}, changes):
        model = load(tiny_llama)
        for key, tensor in tensors.items():
            model.get_parameter(key).data.copy_(tensor)
        model.model.layers[1].register_forward_hook(lambda *given: outputs.append(given[-1]))
        with torch.no_grad():
            model(input_ids=IDS)
    expected = float((outputs[0] - outputs[1]).square().sum())
    with probe(tiny_llama, [{"input_ids": IDS}], resident) as running:
        assert running.block_loss(changes) == pytest.approx(expected, rel=1e-4)
        with pytest.raises(ValueError, match="one block"):
            running.block_loss(changed(tiny_llama, name, "model.layers.0.mlp.down_proj.weight"))


def test_an_encoder_is_judged_by_its_states_and_padding_does_not_count(tiny_bert: Path) -> None:
    mask = torch.ones_like(IDS)
    mask[1, 10:] = 0
    name = "encoder.layer.1.output.dense.weight"
    with probe(tiny_bert, [{"input_ids": IDS, "attention_mask": mask}]) as running:
        found = running.loss(changed(tiny_bert, name))
        assert not running.divergence
    model, other = load(tiny_bert), load(tiny_bert)
    other.get_parameter(name).data.mul_(1.3)
    with torch.no_grad():
        states, changed_states = (
            m(input_ids=IDS, attention_mask=mask).last_hidden_state[mask.bool()] for m in (model, other)
        )
    expected = float((states - changed_states).square().sum() / states.square().sum())
    assert found == pytest.approx(expected, rel=1e-3)


def test_an_expert_inside_a_merged_tensor(tiny_mixtral: Path) -> None:
    checkpoint = Checkpoint.open(tiny_mixtral)
    name = next(name for name in checkpoint.parameters() if ".experts." in name and name.endswith("w1.weight"))
    with probe(tiny_mixtral, [{"input_ids": IDS}]) as running:
        assert running.loss({name: checkpoint.dense(name) * 3}) > 0
        assert running.loss({}) == 0


def test_outputs_that_are_no_numbers_are_not_free(tiny_llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = {name: torch.full_like(Checkpoint.open(tiny_llama).dense(name), float("inf"))}
    with probe(tiny_llama, [{"input_ids": IDS}]) as running:
        assert running.loss(broken) == running.block_loss(broken) == BROKEN
        assert running.loss({}) == 0


def test_a_model_that_gives_no_numbers_is_not_measured(tiny_llama: Path) -> None:
    running = probe(tiny_llama, [{"input_ids": IDS}])
    running._model.lm_head.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(CompressError, match="uncompressed model's outputs hold NaN"), running:
        pass


def test_logits_of_minus_infinity(tiny_llama: Path) -> None:
    """Tokens that a model never gives count nothing."""
    running = probe(tiny_llama, [{"input_ids": IDS}])
    running._model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([5]), float("-inf"))
    )
    with running:
        found = running.loss(changed(tiny_llama, "model.layers.1.mlp.up_proj.weight"))
    assert 0 < found < 1


def test_a_block_that_adds_to_a_cache_is_judged_alike_each_time(tmp_path: Path) -> None:
    """XLM makes one of keys and values even where none is wanted."""
    torch.manual_seed(0)
    config = hf.XLMConfig(vocab_size=64, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=32)
    hf.XLMModel(config).save_pretrained(tmp_path)
    changes = changed(tmp_path, "attentions.1.q_lin.weight", "attentions.1.v_lin.weight")
    with probe(tmp_path, [{"input_ids": IDS}]) as running:
        assert running.block_loss({name: tensor / 1.3 for name, tensor in changes.items()}) == pytest.approx(
            0, abs=1e-6
        )
        assert running.block_loss(changes) == running.block_loss(changes) > 0
