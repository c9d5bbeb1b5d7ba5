"""Gradients taken block by block are those of the whole model, on every kind of architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, Swin2SRConfig, Swin2SRModel

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.layer import as_matrix
from aicompress.model.blocks.all_reduce import ALONE
from aicompress.model.loading.definitions.chain import module_for
from aicompress.model.loading.load import build, load
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import Slot
from aicompress.model.sensitivity import gradients
from aicompress.model.sensitivity import moments as sums
from aicompress.model.sensitivity.gradients import Descent, collect
from aicompress.model.sensitivity.loss import Objective, Sample
from aicompress.model.sensitivity.moments import WIDEST, Watched, harvest, watch
from aicompress.recipe.section import Model
from aicompress.statistics import GradientStats
from tests import checkpoints
from tests.checkpoints import Cnn, Mlp
from tests.pipeline.families import gemma3n

EVERY = ("linear", "conv")


def samples_of(fixture: str, count: int = 3) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        if fixture == "tiny_vit":
            inputs: dict[str, Any] = {"pixel_values": torch.rand(1, 1, 28, 28, generator=draw)}
            found.append(Sample(number, inputs, labels=torch.tensor([number])))
            continue
        ids = torch.randint(5, 200, (1, 9 + number), generator=draw)
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if fixture == "tiny_t5" else {})}
        found.append(Sample(number, inputs, tokens=None if fixture == "tiny_bert" else ids))
    return found


def descent_of(folder: Path, samples: list[Sample], objective: Objective, kinds: tuple[str, ...] = EVERY) -> Descent:
    checkpoint = Checkpoint.open(folder)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model, dtype=torch.float32)
    wanted = {
        info.name: Watched(place, info.tensor_shape, info.transposed)
        for info in checkpoint.layers()
        if info.kind in kinds and (place := loader.place_of(info.tensor)) is not None
    }
    return Descent(model, loader, samples, wanted, objective)


def collected(job: Descent) -> dict[str, GradientStats]:
    found: dict[str, GradientStats] = {}
    collect(job, found.update)
    return found


def expected(
    model: Any, samples: list[Sample], wanted: Mapping[str, Watched], objective: Objective
) -> dict[str, GradientStats]:
    """Moments by autograd on a whole model in float64."""
    model = model.double().eval().requires_grad_(True)
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"  # the others have no float64
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for sample in samples:
        model.zero_grad(set_to_none=True)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in sample.inputs.items()}
        objective(model(**inputs), sample).backward()
        for name, watched in wanted.items():
            grad = _grad(model, watched)
            mean, square = sums.get(name, (torch.zeros(()), torch.zeros(())))
            sums[name] = mean + grad, square + grad.square()
    count = len(samples)
    return {name: GradientStats(count, mean / count, square / count) for name, (mean, square) in sums.items()}


def _grad(model: Any, watched: Watched) -> Tensor:
    if isinstance(watched.place, Slot):
        grad = model.get_submodule(watched.place.module)._parameters[watched.place.leaf].grad
        return watched.place.read(grad, watched.shape).clone()
    grad = model.get_submodule(watched.place).weight.grad
    return as_matrix(torch.zeros(watched.shape) if grad is None else grad, watched.transposed).clone()


def assert_same(found: Mapping[str, GradientStats], wanted: Mapping[str, GradientStats]) -> None:
    assert set(found) == set(wanted)
    for name, moments in wanted.items():
        assert found[name].count == moments.count
        for mine, whole in ((found[name].mean, moments.mean), (found[name].square, moments.square)):
            largest = float(whole.abs().max())
            torch.testing.assert_close(mine.double(), whole.double(), rtol=1e-3, atol=1e-4 * largest + 1e-12, msg=name)


FAMILIES = ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_vit", "tiny_t5", "tiny_qwen_moe", "tiny_mixtral"]


OWN = ["tiny_llama", "tiny_vit", "tiny_t5"]


@pytest.mark.parametrize(
    ("fixture", "kind"), [*((family, "task") for family in FAMILIES), *((family, "own") for family in OWN)]
)
def test_they_are_those_of_the_whole_model(
    fixture: str, kind: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "_whole", None)  # none of these needs the whole model
    folder: Path = request.getfixturevalue(fixture)
    job = descent_of(folder, samples_of(fixture), Objective(kind, seed=1))
    moments = collected(job)
    wanted = expected(load(folder, kernels="reference"), samples_of(fixture), job.wanted, Objective(kind, seed=1))
    assert_same(moments, wanted)
    assert any(float(each.mean.abs().max()) > 0 for each in moments.values())


def test_tied_weights_need_the_whole_model(tiny_llama: Path) -> None:
    """A head and an embedding in one: the square of the sum is not the sum of the squares."""
    job = descent_of(tiny_llama, samples_of("tiny_llama"), Objective(), ("linear", "embedding"))
    whole = load(tiny_llama, kernels="reference")
    assert_same(collected(job), expected(whole, samples_of("tiny_llama"), job.wanted, Objective()))


def test_an_untied_head_and_embedding_do_not(tiny_llama_untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_whole", None)
    job = descent_of(tiny_llama_untied, samples_of("tiny_llama"), Objective(), ("linear", "embedding", "head"))
    whole = load(tiny_llama_untied, kernels="reference")
    assert {"lm_head", "model.embed_tokens"} <= set(job.wanted)
    assert_same(collected(job), expected(whole, samples_of("tiny_llama"), job.wanted, Objective()))


def test_a_block_that_runs_again(tmp_path: Path) -> None:
    """ALBERT runs one block several times: a sample's gradient is the sum over them."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=256, hidden_size=32, embedding_size=16, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    folder = checkpoints.save(AlbertModel(config), tmp_path / "albert", torch.float32, 1)
    job = descent_of(folder, samples_of("tiny_bert"), Objective())
    whole = load(folder, kernels="reference")
    assert_same(collected(job), expected(whole, samples_of("tiny_bert"), job.wanted, Objective()))


def test_keys_that_later_blocks_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that make keys and values have gradients from all that read them."""
    monkeypatch.setattr(gradients, "_whole", None)
    torch.manual_seed(0)
    gemma3n(4, 2).save_pretrained(tmp_path)
    samples = [
        replace(each, inputs={"input_ids": each.tokens % 60}, tokens=each.tokens % 60) for each in samples_of("")
    ]
    job = descent_of(tmp_path, samples, Objective())
    whole = load(tmp_path, kernels="reference")
    assert_same(collected(job), expected(whole, samples, job.wanted, Objective()))


@pytest.fixture(scope="module")
def around_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a first convolution goes into the blocks and is added to what comes out of them."""
    torch.manual_seed(0)
    config = Swin2SRConfig(
        image_size=8, patch_size=1, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, initializer_range=0.2,
    )  # fmt: skip
    return checkpoints.save(Swin2SRModel(config), tmp_path_factory.mktemp("around") / "in", torch.float32, 1)


def images(count: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    return [Sample(number, {"pixel_values": torch.rand(1, 3, 8, 8, generator=draw)}) for number in range(count)]


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_a_weight_around_the_blocks(around_blocks: Path, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient comes in pieces, which are held; where they are too large, nothing is differentiated twice."""
    monkeypatch.setattr(sums, "HELD", held)
    job = descent_of(around_blocks, images(3), Objective())
    backward: list[int] = []
    monkeypatch.setattr(gradients._Reverse, "_backward", spied(gradients._Reverse._backward, backward))
    whole: list[int] = []
    monkeypatch.setattr(gradients, "_whole", spied(gradients._whole, whole))
    found = collected(job)
    assert (len(backward), len(whole)) == ((1, 0) if held else (0, 1))
    assert_same(found, expected(load(around_blocks, kernels="reference"), images(3), job.wanted, Objective()))
    assert float(found["first_convolution"].square.abs().max()) > 0  # type: ignore[union-attr]


def spied(call: Any, seen: list[int]) -> Any:
    def spy(*args: Any) -> Any:
        seen.append(1)
        return call(*args)

    return spy


def test_output_gradients_around_the_blocks(around_blocks: Path) -> None:
    """The pieces of a row's gradient are added before the row is multiplied with itself, though no weight has one."""
    plain = descent_of(around_blocks, images(2), Objective())
    watched = replace(plain.wanted["first_convolution"], outputs=True, moments=False)
    found = collected(replace(plain, wanted={"first_convolution": watched}))["first_convolution"].output_gram
    whole, rows = load(around_blocks, kernels="reference"), list[Tensor]()
    convolution = whole.get_submodule("first_convolution")
    convolution.register_forward_hook(lambda module, given, output: output.register_hook(rows.append) and None)
    convolution.requires_grad_(True)
    for sample in images(2):
        Objective()(whole(**sample.inputs), sample).backward()
    matrices = [each.movedim(1, -1).reshape(-1, 8) for each in rows]
    wanted = sum(each.t() @ each for each in matrices) / 2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("fixture", "steps", "module"),
    [
        ("mlp_file", ("flatten", "fc1", "relu", "fc2", "relu", "fc3"), Mlp),
        ("cnn_file", ("conv1", "bn1", "relu", "maxpool:2", "conv2", "bn2", "relu", "maxpool:2", "flatten", "fc"), Cnn),
    ],
)
def test_chains_of_layers(
    fixture: str, steps: tuple[str, ...], module: type[torch.nn.Module], request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(fixture)
    checkpoint = Checkpoint.open(path)
    chain = module_for(path, Model(sequential=steps))
    loader = PartialModel(checkpoint, chain, dtype=torch.float32)
    images, labels = checkpoints.digits(4, seed=3)
    samples = [
        Sample(number, {"x": torch.from_numpy(images[number : number + 1]).float() / 255}, torch.tensor([int(label)]))
        for number, label in enumerate(labels)
    ]
    wanted = {info.name: Watched(info.name, info.tensor_shape) for info in checkpoint.layers()}
    moments = collected(Descent(chain, loader, samples, wanted, Objective()))
    whole = load(path, model=module(), kernels="reference")
    forward = [replace(sample, inputs={"images": sample.inputs["x"].unsqueeze(1)}) for sample in samples]
    assert_same(moments, expected(whole, forward, wanted, Objective()))


def test_bf16_is_differentiated_in_float32(tiny_llama_bf16: Path) -> None:
    job = descent_of(tiny_llama_bf16, samples_of("tiny_llama"), Objective())
    whole = load(tiny_llama_bf16, kernels="reference", dtype=torch.float32)
    assert_same(collected(job), expected(whole, samples_of("tiny_llama"), job.wanted, Objective()))


def test_only_one_block_is_in_memory(tiny_llama: Path) -> None:
    job = descent_of(tiny_llama, samples_of("tiny_llama"), Objective())
    loaded: list[int] = []
    found: list[list[str]] = []

    def keep(stats: Mapping[str, GradientStats]) -> None:
        loaded.append(sum(layer.mlp.up_proj.weight.device.type != "meta" for layer in job.model.model.layers))
        found.append(list(stats))

    collect(job, keep)
    assert loaded == [1, 1, 1]
    assert [names[0].split(".")[2] for names in found] == ["2", "1", "0"]


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_gradients_in_the_rows_of_outputs(fixture: str, request: pytest.FixtureRequest) -> None:
    """Their Gram matrix is that of a whole model whose outputs keep their gradients, also of transposed layers."""
    folder: Path = request.getfixturevalue(fixture)
    plain = descent_of(folder, samples_of(fixture), Objective())
    job = replace(plain, wanted={name: replace(each, outputs=True) for name, each in plain.wanted.items()})
    found = collected(job)
    whole, sums = load(folder, kernels="reference").requires_grad_(True), dict.fromkeys(job.wanted, 0.0)
    outputs: dict[str, Tensor] = {}
    for name, watched in job.wanted.items():

        def keep(module: Any, given: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            outputs[name] = output

        whole.get_submodule(watched.module).register_forward_hook(keep)
    for sample in samples_of(fixture):
        Objective()(whole(**sample.inputs), sample).backward()
        for name, output in outputs.items():
            rows = output.grad[0]  # type: ignore[index]
            sums[name] = sums[name] + rows.t() @ rows
    for name, gram in sums.items():
        wanted = gram / len(samples_of(fixture))  # type: ignore[operator]
        assert found[name].output_gram is not None
        torch.testing.assert_close(found[name].output_gram, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert all(each.output_gram is None for each in collected(plain).values())
    alone = {name: replace(each, moments=False) for name, each in job.wanted.items()}
    for name, each in collected(replace(job, wanted=alone)).items():
        assert each.mean is None
        assert torch.equal(each.output_gram, found[name].output_gram)


def test_what_changes_in_place_has_output_gradients() -> None:
    """The first layer's output has no graph before it, and what reads it may overwrite it."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    model.requires_grad_(False)
    watched = {"first": Watched("0", (5, 6), outputs=True, moments=False)}
    sums = watch(model, watched)
    given = torch.randn(7, 6)
    model(given).square().sum().backward()
    harvest(sums, Sample(0, {}))
    before = (given @ model[0].weight.t() + model[0].bias).requires_grad_()
    nn.functional.linear(before.relu(), model[2].weight, model[2].bias).square().sum().backward()
    moments = sums["first"].moments(1, ALONE)
    assert moments.mean is None
    torch.testing.assert_close(moments.output_gram, before.grad.t() @ before.grad)  # type: ignore[union-attr]


def test_where_outputs_are_not_seen_the_weight_s_own_moments_are() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(1, WIDEST + 1), "tokens": nn.Embedding(5, 2), "head": nn.Linear(2, 5)})
    model.requires_grad_(False)
    shapes = {name: tuple(module.weight.shape) for name, module in model.items()}
    sums = watch(model, {name: Watched(name, shapes[name], outputs=True, moments=False) for name in model})
    assert {name for name, module in model.items() if module.weight.requires_grad} == {"wide", "tokens"}
    sample = Sample(0, {})
    (model["head"](model["tokens"](torch.arange(3))).sum() + model["wide"](torch.ones(1)).sum()).backward()
    harvest(sums, sample)
    moments = {name: each.moments(1, ALONE) for name, each in sums.items()}
    assert [moments[name].square is None for name in model] == [False, False, True]
    assert [moments[name].output_gram is None for name in model] == [True, True, False]


def test_own_labels_are_drawn_by_seed_and_sample(tiny_llama: Path) -> None:
    sample = samples_of("tiny_llama", 1)[0]
    model = load(tiny_llama, kernels="reference")
    losses = [
        float(Objective("own", seed)(model(**sample.inputs), replace(sample, number=number)))
        for seed, number in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_a_factor_s_gradient_follows_from_the_weight_s(tiny_llama: Path) -> None:
    """W = A B: dL/dA = g Bᵀ of every sample, squared before it is averaged."""
    name = "model.layers.1.mlp.up_proj"
    inner = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    job = descent_of(tiny_llama, samples_of("tiny_llama"), Objective())
    whole = job.wanted[name]
    parts = {name: whole, "out": replace(whole, part=lambda: lambda g: g @ inner.t())}
    found = collected(replace(job, wanted=parts))
    torch.testing.assert_close(found["out"].mean, found[name].mean @ inner.t(), rtol=1e-4, atol=1e-7)
    one = collected(replace(job, wanted=parts, samples=job.samples[:1]))
    torch.testing.assert_close(one["out"].square, one["out"].mean.square())


def test_a_loss_that_is_not_finite_is_refused(tiny_llama: Path) -> None:
    job = descent_of(tiny_llama, samples_of("tiny_llama"), Objective())

    def broken(output: Any, sample: Sample) -> Tensor:
        return output.logits.sum() * float("nan")

    with pytest.raises(CompressError, match="loss of calibration sample 0"):
        collected(replace(job, objective=broken))  # type: ignore[arg-type]
