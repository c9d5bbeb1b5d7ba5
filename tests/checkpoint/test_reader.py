"""Tensors are read one by one, exactly; descriptions that do not fit their tensors are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.files import digests, require_finite
from aicompress.errors import CheckpointError
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load

OFF = Options(latency="off")
ODD = {
    "weight": torch.randn(4, 6),
    "ü.层.weight": torch.randn(3, 5),
    "blocks[0].weight": torch.randn(3, 5),
    "a.b.c.d.e.weight": torch.randn(2, 2).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "count": torch.tensor(7, dtype=torch.int64),
    "ids": torch.arange(6, dtype=torch.int32),
    "mask": torch.tensor([True, False]),
    "empty.weight": torch.empty(0, 8),
    "empty.too": torch.empty(4, 0, 2, dtype=torch.float16),
    "complex": torch.ones(2, dtype=torch.complex64),
    "e4m3.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "e5m2.weight": torch.randn(4, 4).to(torch.float8_e5m2),
}


def same(found: Tensor, wanted: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)]
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(*raw)


def test_every_dtype_shape_and_name_is_read_exactly(tmp_path: Path) -> None:
    save_file(ODD, tmp_path / "odd.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "odd.safetensors")
    assert all(same(checkpoint.read(name), tensor) for name, tensor in ODD.items())
    kinds = {layer.name: layer.kind for layer in checkpoint.layers()}
    assert set(kinds) == {"weight", "ü.层", "blocks[0]", "a.b.c.d.e", "e4m3", "e5m2"}
    assert set(kinds.values()) == {"linear"}


def test_what_is_read_is_not_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    Checkpoint.open(tmp_path / "a.safetensors").read("w").zero_()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.ones(4))


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4)}, path)
    checkpoint = Checkpoint.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ended while 'w' was read"):
        checkpoint.read("w")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("w")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_nan_and_infinity_are_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 3)
    require_finite(tensor.to(dtype), "w", tmp_path)
    tensor[0, 0] = tensor[2, 1] = float("nan")
    with pytest.raises(CheckpointError, match="'w' holds 2 NaN"):
        require_finite(tensor.to(dtype), "w", tmp_path)
    require_finite(torch.tensor([1, 2]), "n", tmp_path)
    require_finite(torch.empty(0), "e", tmp_path)


def test_digests_are_of_whole_files(tmp_path: Path) -> None:
    import hashlib

    save_file({"w": torch.randn(100)}, tmp_path / "a.safetensors")
    source = Checkpoint.open(tmp_path / "a.safetensors").source
    assert digests(source) == {"a.safetensors": hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()}


@pytest.mark.parametrize("scale", ["fc.weight_scale_inv", "fc.weight_scale"])
def test_scaled_float8_is_not_taken_for_its_values(tmp_path: Path, scale: str) -> None:
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"fc.weight": codes, scale: torch.full((1, 1), 0.25)}, tmp_path / "a.safetensors")
    assert (Checkpoint.open(tmp_path / "a.safetensors").dense("fc.weight") == 0.25).all()


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        ({"quant_method": "aqlm"}, "already quantized by 'aqlm', which is not read"),
        ({"bits": 4}, "names no quant_method"),
        ({}, None),
        ("int8", "not a mapping"),
        ({"quant_method": "aicompress"}, "malformed"),
        ({"quant_method": "aicompress", "format_version": 99, "entries": {}}, "newer"),
        ({"quant_method": "aicompress", "format_version": 1, "entries": {"x": {}}}, "malformed"),
        ({"quant_method": "aicompress", "format_version": 1, "entries": []}, "malformed"),
    ],
)  # fmt: skip
def test_quantization_configs_of_others_are_refused(tmp_path: Path, quantization: Any, why: str | None) -> None:
    save_file({"fc.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": quantization}))
    if why is None:
        assert Checkpoint.open(tmp_path).layout == "plain"
        return
    with pytest.raises(CheckpointError, match=why):
        Checkpoint.open(tmp_path)


def test_expressions_that_take_for_ever_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aicompress.selection.SECONDS", 0.05)
    module = f"{'a' * 40}.fc"
    tensors = {"weight_packed": torch.zeros(4, 1, dtype=torch.int32), "weight_scale": torch.ones(4, 1)}
    save_file(
        {f"{module}.{name}": t for name, t in {**tensors, "weight_shape": torch.tensor([4, 8])}.items()},
        tmp_path / "model.safetensors",
    )
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    for target, why in (
        (r"re:(a|aa)+\.[a-e]", "takes more than"),
        ("re:(", "not a regular expression"),
        ("re:.*fc", None),
        (rf"re:(.*\.)?{module[1:]}$", "no config group names it"),
        ("Linear", None),
    ):
        groups = {"group_0": {"targets": [target], "weights": weights}}
        quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        if why is None:
            assert Checkpoint.open(tmp_path).manifest.entries
            continue
        with pytest.raises(CheckpointError, match=why):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize("where", ["config.json", "aicompress.json", "modules.json", "metadata"])
def test_json_that_nests_too_deeply_is_refused(where: str, tmp_path: Path) -> None:
    deep = '{"format_version": 1, "lineage": ' + "[" * 500 + "]" * 500 + "}"
    metadata = {"aicompress": deep} if where == "metadata" else None
    save_file({"fc.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors", metadata=metadata)
    if where != "metadata":
        (tmp_path / where).write_text(deep)
    with pytest.raises(CheckpointError, match=r"nested too deeply|list of modules") as caught:
        Checkpoint.open(tmp_path)
    assert len(caught.value.message) < 300


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, mlp_file: Path) -> Path:
    """The MLP in 4 bits, a manifest in its metadata."""
    out = tmp_path_factory.mktemp("quantized") / "mlp.safetensors"
    recipe = load("quantize/rtn-w4-channel", "quantize")
    layerwise.run(planner.make_plan(mlp_file, Destination(out), recipe, "quantize"), OFF)
    return out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": [300, 785]}, "not what its description says"),
        ({"shape": [2**40, 2**40]}, "malformed"),
        ({"shape": ["a"]}, "malformed"),
        ({"shape": [int("9" * 4000)] * 2000}, "malformed"),
        ({"meta": {"bits": 3}}, "not what its description says"),
        ({"meta": {"bits": 10**12}}, "not what its description says"),
        ({"meta": {"group_size": -1}}, "not what its description says"),
        ({"meta": {"activation_bits": 10**12}}, "not what its description says"),
        ({"meta": {"shape": [10**9, 784]}}, "not what its description says"),
        ({"meta": {"form": "imagined"}}, "does not know"),
        ({"meta": None}, "not what its description says"),
        ({"tensors": ["", "scale", "more"]}, "lacks tensors"),
        ({"dtype": "F31"}, "malformed"),
    ],
)
def test_descriptions_must_fit_their_tensors(tmp_path: Path, quantized: Path, change: Any, why: str) -> None:
    manifest = json.loads(Checkpoint.open(quantized).metadata["aicompress"])
    entry = manifest["entries"]["fc1.weight"]
    merged = {**entry["meta"], **change["meta"]} if isinstance(change.get("meta"), dict) else None
    manifest["entries"]["fc1.weight"] = {**entry, **change, **({"meta": merged} if merged else {})}
    save_file(load_file(quantized), tmp_path / "a.safetensors", metadata={"aicompress": json.dumps(manifest)})
    with pytest.raises(CheckpointError, match=why):
        Checkpoint.open(tmp_path / "a.safetensors")


def test_names_where_one_begins_with_another_stay_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(8, 8, bidirectional=True)
    save_file({name: t.contiguous() for name, t in lstm.state_dict().items()}, tmp_path / "lstm.safetensors")
    out = tmp_path / "out.safetensors"
    recipe = load("quantize/rtn-w8", "quantize", ["select.include=[weight_ih_l0]"])
    layerwise.run(planner.make_plan(tmp_path / "lstm.safetensors", Destination(out), recipe, "quantize"), OFF)
    written = Checkpoint.open(out)
    assert set(written.manifest.entries) == {"weight_ih_l0"}
    assert torch.allclose(written.dense("weight_ih_l0"), lstm.weight_ih_l0, atol=0.01)
    assert torch.equal(written.dense("weight_ih_l0_reverse"), lstm.weight_ih_l0_reverse)
    assert written.parameters().keys() == lstm.state_dict().keys()


SMALL_MEMORY = """
    import resource, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from aicompress.pipeline.layerwise import run as layerwise
    from aicompress.pipeline.layerwise import planner
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.output import Destination
    from aicompress.recipe import load
    recipe, off = load("quantize/rtn-w8", "quantize"), Options(latency="off")
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    small, big, out = (Path(a) for a in sys.argv[1:])
    for source in (small, big):
        layerwise.run(planner.make_plan(source, Destination(out / source.name), recipe, "quantize"), off)
        print(peak())
"""


def test_memory_holds_a_layer_and_not_the_file(tmp_path: Path, bare_python: list[str]) -> None:
    """The same step on one layer and on 24 of them, 4 MB and 100 MB: the file's size does not show."""
    layer = torch.randn(1024, 1024)
    save_file({"l0.weight": layer}, tmp_path / "small.safetensors")
    save_file({f"l{i}.weight": layer + i for i in range(24)}, tmp_path / "big.safetensors")
    (tmp_path / "out").mkdir()
    arguments = [tmp_path / "small.safetensors", tmp_path / "big.safetensors", tmp_path / "out"]
    command = [*bare_python, "-c", textwrap.dedent(SMALL_MEMORY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, big = (int(line) for line in done.stdout.split())
    assert big - small < 40  # MB
    shutil.rmtree(tmp_path / "out")


def test_an_empty_matrix_is_no_layer(tmp_path: Path) -> None:
    """Also where the model's definition says that it is one."""
    save_file({"a.weight": torch.ones(2, 4), "b.weight": torch.ones(0, 4)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    assert [info.tensor for info in checkpoint.layers({"a.weight": "linear", "b.weight": "linear"})] == ["a.weight"]
