"""The calibration engine sees what a model with everything in memory sees, on every kind of architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Refused
from aicompress.layer import as_matrix
from aicompress.model.architecture.shapes import block_traits
from aicompress.model.blocks.find import find_blocks
from aicompress.model.blocks.input_rows import rows_of
from aicompress.model.blocks.input_statistics import Recorder
from aicompress.model.blocks.paused_forward import gated
from aicompress.model.blocks.walk import Walk, walk
from aicompress.model.kernels import bf16_products as products
from aicompress.model.loading.load import build, load
from aicompress.model.loading.partial_model import PartialModel
from aicompress.statistics import InputStats
from tests.pipeline.families import FAMILIES, gemma3n

NEEDS = frozenset({"gram", "norms", "mean_abs"})


@pytest.fixture(autouse=True)
def every_parameter_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that lies between blocks is given back at the first one: what the model reads later must come back."""
    monkeypatch.setattr("aicompress.model.loading.partial_model.LEAST", 0)


class Halving:
    """A visitor that notes statistics and halves every weight, so that the next block's inputs change."""

    def __init__(self, checkpoint: Checkpoint, factor: float = 0.5) -> None:
        self.checkpoint = checkpoint
        self.factor = factor
        self.stats: dict[str, InputStats] = {}
        self.visits: list[list[str]] = []

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        self.stats.update(stats)
        self.visits.append(list(stats))
        return {name: self.checkpoint.dense(name) * self.factor for name in stats}


def token_batches(columns: int = 12) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 200, (2, columns), generator=draw)} for _ in range(3)]


def run_walk(folder: Path, batches: list[dict[str, Any]], factor: float = 1.0, **options: Any) -> tuple[Halving, Any]:
    checkpoint = Checkpoint.open(folder)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model)
    layers = [info for info in checkpoint.layers() if info.kind in ("linear", "conv")]
    places = {info.tensor: loader.place_of(info.tensor) for info in layers}
    wanted = {name: place for name, place in places.items() if place is not None}
    visitor = Halving(checkpoint, factor)
    walk(Walk(model, loader, batches, wanted, NEEDS, **options), visitor)
    return visitor, wanted


def reference_grams(model: Any, wanted: Mapping[str, str], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gram matrices by hooks on a whole model."""
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Tensor, ...]) -> None:
            rows = rows_of(module, args[0], None)
            assert rows is not None
            found[name] = found.get(name, torch.zeros(())) + rows.double().t() @ rows.double()
            counts[name] = counts.get(name, 0) + len(rows)

        return see

    for name, path in wanted.items():
        model.get_submodule(path).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: total / counts[name] for name, total in found.items()}


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_vit", "tiny_t5"])
def test_statistics_are_those_of_the_whole_model(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    whole = load(folder, kernels="reference")
    if fixture == "tiny_vit":
        size, channels = whole.config.image_size, whole.config.num_channels
        batches: list[dict[str, Any]] = [{"pixel_values": torch.rand(2, channels, size, size)} for _ in range(2)]
    else:
        batches = token_batches()
        for batch in batches if fixture == "tiny_t5" else []:
            batch["decoder_input_ids"] = batch["input_ids"]
    visitor, wanted = run_walk(folder, batches)
    expected = reference_grams(whole, wanted, batches)
    assert set(expected) == {name for name, stats in visitor.stats.items() if stats.count}
    for name, gram in expected.items():
        found = visitor.stats[name]
        assert found.gram is not None
        assert found.norms is not None
        torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.norms, found.gram.diagonal())


def test_next_block_sees_the_compressed_prefix(tiny_llama: Path) -> None:
    batches = token_batches()
    visitor, wanted = run_walk(tiny_llama, batches, factor=0.5)
    halved = load(tiny_llama, kernels="reference")
    first = [name for name in wanted if ".layers.0." in name]
    for name in first:
        halved.get_submodule(wanted[name]).weight.data *= 0.5
    second = {name: path for name, path in wanted.items() if ".layers.1." in name}
    expected = reference_grams(halved, second, batches)
    for name, gram in expected.items():
        found = visitor.stats[name].gram
        assert found is not None
        torch.testing.assert_close(found.double(), gram, rtol=1e-4, atol=1e-5)


def test_cross_is_gram_until_something_is_compressed_and_differs_after(tiny_llama: Path) -> None:
    visitor, _ = run_walk(tiny_llama, token_batches(), factor=0.5, cross=True)
    first = visitor.stats["model.layers.0.self_attn.q_proj.weight"]
    later = visitor.stats["model.layers.1.self_attn.q_proj.weight"]
    assert first.cross is None
    assert later.cross is not None
    assert later.gram is not None
    assert not torch.allclose(later.cross, later.gram, rtol=0.05)


def test_cross_compares_the_two_models(tiny_llama: Path) -> None:
    """E[x x̂ᵀ] in the second block, x from the original and x̂ from a model whose first block is halved."""
    visitor, wanted = run_walk(tiny_llama, token_batches(), factor=0.5, cross=True)
    original, halved = (load(tiny_llama, kernels="reference") for _ in range(2))
    for name, path in wanted.items():
        if ".layers.0." in name:
            halved.get_submodule(path).weight.data *= 0.5
    seen: list[Tensor] = []
    for model in (original, halved):
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            for batch in token_batches():
                model(**batch)
    rows, changed = torch.cat(seen[:3]).flatten(0, 1), torch.cat(seen[3:]).flatten(0, 1)
    found = visitor.stats["model.layers.1.self_attn.q_proj.weight"].cross
    assert found is not None
    torch.testing.assert_close(found, rows.t() @ changed / len(rows), rtol=1e-4, atol=1e-5)


def test_layers_that_share_an_input_share_its_statistics(tiny_llama: Path) -> None:
    visitor, _ = run_walk(tiny_llama, token_batches())
    block = "model.layers.1"
    q, k = (visitor.stats[f"{block}.self_attn.{n}_proj.weight"] for n in "qk")
    gate, up = (visitor.stats[f"{block}.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    assert q is k
    assert gate is up
    assert q is not gate


def test_convolutions_of_one_input_share_only_the_same_patches() -> None:
    torch.manual_seed(0)
    wide, strided, same = (
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.Conv2d(2, 3, 3, padding=1),
    )
    modules = {"wide": wide, "point": nn.Conv2d(2, 3, 1), "strided": strided, "same": same}
    image = torch.randn(1, 2, 6, 6)
    with Recorder(modules, frozenset({"gram"})) as recorder, torch.no_grad():
        for module in modules.values():
            module(image)
    stats = recorder.stats()
    assert stats["same"] is stats["wide"]
    assert {name: (len(found.gram), found.count) for name, found in stats.items() if found.gram is not None} == {
        "wide": (18, 36), "point": (2, 36), "strided": (18, 9), "same": (18, 36),
    }  # fmt: skip


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(3, 4, 5, stride=2, padding=2, padding_mode="reflect"),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(3, 4, 4, padding="same", dilation=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(3, 4, (2, 3, 1), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1)),
    ],
    ids=str,
)
def test_patches_times_the_matrix_are_what_a_convolution_gives(convolution: Any) -> None:
    """Whatever its padding: the Gram matrix is of what the kernel sees."""
    images = torch.randn(2, 3, *(9,) * (convolution.weight.ndim - 2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = convolution(images).movedim(1, -1)
        for given, outputs in ((images, expected), (images[0], expected[0])):
            rows = rows_of(convolution, given, None)
            assert rows is not None
            products = rows @ convolution.weight.flatten(1).t() + convolution.bias
            torch.testing.assert_close(products, outputs.flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_lookups_of_real_tokens_are_counted(tiny_llama: Path) -> None:
    """Padding aside; of an embedding that moves the numbers it is given, the rows that it looks up."""
    checkpoint = Checkpoint.open(tiny_llama)
    model, name = build(checkpoint), "model.embed_tokens.weight"
    (batch, *_), mask = token_batches(), torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    visitor = Halving(checkpoint)
    wanted, needs = {name: "model.embed_tokens"}, NEEDS | {"frequency"}
    walk(
        Walk(model, PartialModel(checkpoint, model), [{**batch, "attention_mask": mask}], wanted, needs, changes=False),
        visitor,
    )
    found, real = visitor.stats[name], batch["input_ids"][mask.bool()]
    assert found.count == 17
    assert found.frequency is not None
    torch.testing.assert_close(found.frequency, torch.bincount(real, minlength=256) / 17)

    class Moved(nn.Embedding):
        def forward(self, mask: Tensor) -> Tensor:
            return super().forward(mask.cumsum(1).long() + 2)

    positions = Moved(16, 3)
    with Recorder({"positions": positions}, frozenset({"frequency"})) as recorder, torch.no_grad():
        positions(torch.ones(2, 3))
    positions(torch.ones(2, 3))  # is watched no more
    frequency = recorder.stats()["positions"].frequency
    assert frequency is not None
    torch.testing.assert_close(frequency, torch.eye(16)[[3, 4, 5]].mean(0))


def test_blocks_are_dropped(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model)
    loaded: list[int] = []

    class Watch(Halving):
        def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
            layers = model.model.layers
            loaded.append(sum(layer.mlp.up_proj.weight.device.type != "meta" for layer in layers))
            return {}

    wanted = {info.tensor: info.name for info in checkpoint.layers() if info.kind == "linear"}
    walk(Walk(model, loader, token_batches(), wanted, NEEDS), Watch(checkpoint))
    assert loaded == [1] * len(model.model.layers)


def test_what_follows_the_last_wanted_layer_is_not_run(tiny_llama: Path) -> None:
    """Every block runs twice, once to record and once compressed; the last one once, and the head never."""
    checkpoint = Checkpoint.open(tiny_llama)
    model = build(checkpoint)
    calls: list[str] = []
    for name in ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "lm_head"):
        hook: Any = lambda module, args, name=name: calls.append(name)  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    wanted: dict[str, Any] = {f"model.layers.{i}.mlp.up_proj.weight": f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}
    walk(Walk(model, PartialModel(checkpoint, model), token_batches()[:1], wanted, NEEDS), Halving(checkpoint))
    assert calls == ["model.layers.0.mlp", "model.layers.0.mlp", "model.layers.1.mlp"]


def test_collecting_runs_every_block_once(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    model = build(checkpoint)
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: calls.append(1))
    loader = PartialModel(checkpoint, model)
    places = {info.tensor: loader.place_of(info.tensor) for info in checkpoint.layers() if info.kind == "linear"}
    wanted = {name: place for name, place in places.items() if place is not None}
    found = Halving(checkpoint, 1.0)
    walk(Walk(model, loader, token_batches(), wanted, NEEDS, changes=False), found)
    assert len(calls) == len(model.model.layers) * len(token_batches())
    expected, _ = run_walk(tiny_llama, token_batches())
    for name in wanted:
        torch.testing.assert_close(found.stats[name].gram, expected.stats[name].gram)


class Known(Halving):
    """A visitor whose first block is done."""

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        done = all(".layers.0." in name for name in layers)
        return {name: self.checkpoint.dense(name) * self.factor for name in layers} if done else None


@pytest.mark.parametrize("kind", [Halving, Known])
def test_one_pass_sees_the_original_model(tiny_llama: Path, kind: type[Halving]) -> None:
    """Whatever the visitor makes of the layers, and where an earlier run has done the first block."""
    expected, _ = run_walk(tiny_llama, token_batches())
    checkpoint = Checkpoint.open(tiny_llama)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model)
    places = {info.tensor: loader.place_of(info.tensor) for info in checkpoint.layers() if info.kind == "linear"}
    wanted = {name: place for name, place in places.items() if place is not None}
    found = kind(checkpoint, 0.5)
    walk(Walk(model, loader, token_batches(), wanted, NEEDS, changes=False), found)
    assert set(found.stats) == {name for name in wanted if kind is Halving or ".layers.0." not in name}
    for name, stats in found.stats.items():
        torch.testing.assert_close(stats.gram, expected.stats[name].gram)


def test_rounded_products_change_statistics_little(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, wanted = run_walk(tiny_llama, token_batches())
    monkeypatch.setattr(products, "LEAST", 1)
    rounded, _ = run_walk(tiny_llama, token_batches(), rounded=True)
    for name in wanted:
        gram, found = exact.stats[name].gram, rounded.stats[name].gram
        assert gram is not None
        assert found is not None
        assert (found - gram).norm() < 2e-2 * gram.norm()


def test_padding_is_left_out(tiny_bert: Path) -> None:
    batch = token_batches()[0]
    short = {"input_ids": batch["input_ids"][:, :7], "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    padded_ids = torch.nn.functional.pad(short["input_ids"], (0, 5))
    padded = {"input_ids": padded_ids, "attention_mask": torch.nn.functional.pad(short["attention_mask"], (0, 5))}
    plain, _ = run_walk(tiny_bert, [short])
    masked, _ = run_walk(tiny_bert, [padded])
    for name, stats in plain.stats.items():
        if stats.count:
            assert masked.stats[name].count == stats.count
            assert stats.gram is not None
            torch.testing.assert_close(masked.stats[name].gram, stats.gram, rtol=1e-3, atol=1e-5)


def test_inputs_that_the_model_does_not_take_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(Refused, match="does not run on the calibration inputs: index out of range"):
        run_walk(tiny_llama, [{"input_ids": torch.full((1, 4), 10**6)}])


def test_a_model_that_fails_behind_a_block_is_refused() -> None:
    """Wherever it is on its way, and whatever its own code raises."""
    block = nn.Identity()
    with gated([block], [lambda: 1 // len(block([]))]) as (stream,):
        stream.start()
        with pytest.raises(Refused, match="does not run on the calibration inputs: integer division"):
            stream.advance([])


def test_an_empty_place_in_a_list_is_no_block() -> None:
    """As behind the last block of Informer; what would stand there after others went would compute otherwise."""
    step = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"steps": nn.ModuleList([step, None])})  # type: ignore[list-item]
    assert [block.name for block in find_blocks(model)] == ["steps.0"]
    (first, last) = block_traits(model)["steps"]
    assert first[".class"] != last[".class"] is None


def test_keys_that_later_blocks_read_are_those_of_the_same_model(tmp_path: Path) -> None:
    """Where two models are walked at once, a block that ran for one of them leaves keys for both."""
    torch.manual_seed(0)
    gemma3n(4, 2).save_pretrained(tmp_path)
    batches = [{"input_ids": batch["input_ids"] % 60} for batch in token_batches()]
    visitor, wanted = run_walk(tmp_path, batches, factor=1.0, cross=True)
    name = "model.layers.3.self_attn.o_proj.weight"
    whole = reference_grams(load(tmp_path, kernels="reference"), {name: wanted[name]}, batches)[name]
    for found in (visitor.stats[name].gram, visitor.stats[name].cross):
        assert found is not None
        torch.testing.assert_close(found.double(), whole, rtol=1e-3, atol=1e-5)


def test_merged_statistics_are_weighted_by_count() -> None:
    one = InputStats(1, torch.eye(2), columns={"norms": torch.ones(2), "mean_abs": torch.ones(2)})
    three = InputStats(3, torch.eye(2) * 5, columns={"norms": torch.ones(2) * 5, "mean_abs": torch.ones(2) * 5})
    merged = one.merged(three)
    assert merged.count == 4
    torch.testing.assert_close(merged.gram, torch.eye(2) * 4)
    assert as_matrix(torch.ones(2, 3, 2)).shape == (2, 6)


def test_running_statistics_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = hf.ResNetForImageClassification(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    partial = PartialModel(checkpoint, build(checkpoint))
    partial.load(lambda name: True)
    found = partial.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt-neox", "gemma", "whisper"])
def test_statistics_of_more_families(name: str, tmp_path: Path) -> None:
    """Fused query, key and value; scaled embeddings; an encoder of audio that every block of a decoder attends to."""
    family = FAMILIES[name]
    family.saved(tmp_path)
    batches = [{key: value for key, value in family.inputs().items() if key != "use_cache"}]
    visitor, wanted = run_walk(tmp_path, batches)
    expected = reference_grams(load(tmp_path, kernels="reference"), wanted, batches)
    assert set(expected) == {layer for layer, stats in visitor.stats.items() if stats.count}
    for layer, gram in expected.items():
        found = visitor.stats[layer].gram
        assert found is not None
        torch.testing.assert_close(found.double(), gram, rtol=1e-4, atol=1e-4)


def xlm() -> Any:
    """Makes a cache of keys and values even where none is wanted, which every attention adds to."""
    config = hf.XLMConfig(vocab_size=200, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=32)
    return hf.XLMModel(config)


def funnel() -> Any:
    """Has its layers in lists of a list."""
    sizes = {"block_sizes": [1, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "num_decoder_layers": 1}
    return hf.FunnelModel(hf.FunnelConfig(vocab_size=200, **sizes))


@pytest.mark.parametrize("make", [xlm, funnel])
def test_a_block_that_runs_again_sees_what_it_saw_at_first(make: Callable[[], Any], tmp_path: Path) -> None:
    """Whatever its first run has written into what it was given."""
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    visitor, wanted = run_walk(tmp_path, token_batches())
    expected = reference_grams(load(tmp_path, kernels="reference"), wanted, token_batches())
    assert len(wanted) >= 12
    for layer, gram in expected.items():
        found = visitor.stats[layer].gram
        assert found is not None
        torch.testing.assert_close(found.double(), gram, rtol=1e-4, atol=1e-5)
