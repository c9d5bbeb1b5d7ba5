"""Widths searched on the running model: the target is met, the report says why, a stopped search goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import working_path
from aicompress.errors import Refused
from aicompress.model.loading.load import load
from aicompress.pipeline.layerwise.allocation import search as searching
from aicompress.pipeline.layerwise.allocation.width_trial import WidthTrial
from aicompress.pipeline.step.options import Options
from aicompress.report.html import to_html
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Report
from tests.pipeline.calibration.steps import OFF, planned, run, text, write_recipe

RTN = {"name": "rtn", "bits": "auto", "group_size": 16, "group_sizes": [16], "samples": 4, "evaluations": 0}


def recipe(folder: Path, data: Path, method: Mapping[str, Any], **sections: Any) -> Path:
    return write_recipe(folder, text(data), method={**RTN, **method}, **sections)


def uniform(folder: Path, bits: int) -> Path:
    return write_recipe(folder, None, method={"name": "rtn", "bits": bits, "group_size": 16})


def bits_of(report: Report) -> dict[str, int]:
    return {row.name: row.detail["bits"] for row in report.layers if row.method != "-"}


def kl(one: Path, other: Path) -> float:
    """Of the logits on tokens that no calibration has seen."""
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        p, q = (torch.log_softmax(load(path)(input_ids=ids).logits.float(), -1) for path in (one, other))
    return float(((p - q) * p.exp()).sum(-1).mean())


@pytest.fixture(scope="module")
def uneven_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose first block writes 20 times as much into the stream as the others do."""
    from safetensors.torch import load_file, save_file

    from tests import checkpoints

    folder = checkpoints.make_llama(tmp_path_factory.mktemp("uneven") / "model", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if ".layers.0." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text_file: Path) -> tuple[Path, Report]:
    """The tiny Llama at 4.5 bits a weight, and the report of the step."""
    folder = tmp_path_factory.mktemp("searched")
    return folder / "out", run(tiny_llama, folder / "out", recipe(folder, text_file, {"target_bpw": 4.5}))


def test_better_than_uniform_at_no_more_bytes(tmp_path: Path, uneven_llama: Path, text_file: Path) -> None:
    width = 3
    size = run(uneven_llama, tmp_path / "uniform", uniform(tmp_path, width)).after.weight_bytes
    auto = run(uneven_llama, tmp_path / "auto", recipe(tmp_path, text_file, {"target_bytes": size}))
    assert auto.after.weight_bytes <= size
    assert kl(uneven_llama, tmp_path / "auto") < 0.7 * kl(uneven_llama, tmp_path / "uniform")
    found = bits_of(auto)
    assert min(found[name] for name in found if ".layers.0." in name) >= width < max(found.values())
    assert all(len({found[f"model.layers.{n}.{name}"] for name in group}) == 1 for n in range(3) for group in FUSED)
    # No unit could have one width more.
    step = min(
        wide["bytes"] - narrow["bytes"]
        for unit in auto.bits["units"]
        for narrow, wide in zip(unit["options"], unit["options"][1:], strict=False)
        if narrow["bits"] >= unit["bits"]
    )
    assert size - auto.after.weight_bytes < step


FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_groups_make_the_least_width_better_at_no_more_bytes(
    method: str, tmp_path: Path, uneven_llama: Path, text_file: Path
) -> None:
    """Below 2 bits only scales can be saved: larger groups where little is lost pay for smaller ones, or for 3 bits."""
    given = {"name": method, "bits": 2, "group_size": 16}
    size = run(uneven_llama, tmp_path / "uniform", write_recipe(tmp_path, text(text_file), method=given))
    wanted = {"name": method, "target_bytes": size.after.weight_bytes, "group_sizes": None}
    auto = run(uneven_llama, tmp_path / "auto", recipe(tmp_path, text_file, wanted))
    assert auto.after.weight_bytes <= size.after.weight_bytes
    assert sum(file.stat().st_size for file in (tmp_path / "auto").glob("*.safetensors")) == auto.after.weight_bytes
    assert kl(uneven_llama, tmp_path / "auto") < 0.8 * kl(uneven_llama, tmp_path / "uniform")
    found = {row.name: row.detail["group"] for row in auto.layers if row.method != "-"}
    assert len(set(found.values())) > 1
    assert all(len({found[f"model.layers.{n}.{name}"] for name in group}) == 1 for n in range(3) for group in FUSED)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mixed_groups_are_read_by_everyone(
    symmetric: bool, tmp_path: Path, uneven_llama: Path, text_file: Path
) -> None:
    """Each layer with its own groups: compressed-tensors without `dequantize`, or the native form with zero points."""
    from transformers import AutoModelForCausalLM

    import aicompress.hf  # noqa: F401  registers the native form

    given = {"target_bpw": 3.6, "group_sizes": None, "choices": [2, 3], "symmetric": symmetric}
    run(uneven_llama, tmp_path / "out", recipe(tmp_path, text_file, given))
    written = Checkpoint.open(tmp_path / "out")
    schemes = {(entry.meta["bits"], entry.meta["group_size"]) for entry in written.manifest.entries.values()}
    assert len({size for _, size in schemes}) > 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("compressed-tensors" if symmetric else "aicompress")
    assert not config.get("dequantize")
    model = AutoModelForCausalLM.from_pretrained(uneven_llama).eval()
    for name in written.manifest.entries:
        model.get_parameter(name).data = written.dense(name).float()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(theirs.float(), model(input_ids=ids).logits, rtol=2e-3, atol=2e-2)
        ours = load(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=5e-2)


def test_a_plan_shows_open_groups_as_far_as_they_divide(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    given = {"target_bpw": 4, "group_sizes": [24, 32, 128]}
    rows = {
        row.name: row for row in planned(tiny_llama, tmp_path / "o", recipe(tmp_path, text_file, given)).summary().rows
    }
    assert rows["model.layers.0.mlp.up_proj"].detail["group"] == "32"  # of 64 columns
    assert rows["model.layers.0.mlp.down_proj"].detail["group"] == "32 or 128"
    unfit = {"target_bpw": 4, "group_sizes": [24, 48]}
    one = recipe(tmp_path, text_file, unfit, select={"include": ["*.0.mlp.up_proj"]})
    with pytest.raises(Refused, match="none of group_sizes 24, 48 divides its 64 input columns"):
        planned(tiny_llama, tmp_path / "out", one)


@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_per_weight(tmp_path: Path, tiny_llama: Path, text_file: Path, symmetric: bool) -> None:
    """Counted as they are stored: zero points take more in the layout for several widths than in that for one."""
    given = {"target_bpw": 5.0, "symmetric": symmetric, "choices": [2, 4]}
    report = run(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, given))
    rows = [row for row in report.layers if row.method != "-"]
    written = Checkpoint.open(tmp_path / "out")
    found = 8 * sum(written.nbytes(f"{row.name}.weight") for row in rows) / sum(row.bytes_before // 4 for row in rows)
    assert 4.7 < found <= 5.0
    assert len({row.detail["bits"] for row in rows}) > 1


def test_a_bounded_divergence(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    """Least bytes whose divergence, of all layers together, is within the bound; with a looser one fewer bytes."""
    tight, loose = (
        run(tiny_llama, tmp_path / str(limit), recipe(tmp_path, text_file, {"max_kl": limit}))
        for limit in (0.002, 0.02)
    )
    assert tight.bits["after"] <= 0.002
    assert loose.bits["after"] <= 0.02
    assert loose.after.weight_bytes < tight.after.weight_bytes
    with pytest.raises(Refused, match=r"max_kl 1e-12 is out of reach: the largest widths give"):
        run(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, {"max_kl": 1e-12}))
    assert not (tmp_path / "out").exists()
    assert not working_path(tmp_path / "out").exists()


def test_refinement_keeps_the_bytes_and_loses_no_more(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    size = planned(tiny_llama, tmp_path / "uniform", uniform(tmp_path, 3)).output.weight_bytes
    given = {"target_bytes": size, "evaluations": 12}
    one = run(tiny_llama, tmp_path / "one", recipe(tmp_path, text_file, given))
    assert 1 < one.bits["evaluations"] <= 12
    assert one.bits["after"] <= one.bits["before"]
    assert one.after.weight_bytes <= size
    two = run(tiny_llama, tmp_path / "two", recipe(tmp_path, text_file, given))
    assert bits_of(one) == bits_of(two)
    assert one.after.sha256 == two.after.sha256


def test_a_target_out_of_reach_is_refused_with_the_smallest_that_is(
    tmp_path: Path, tiny_llama: Path, text_file: Path
) -> None:
    least = planned(tiny_llama, tmp_path / "out", uniform(tmp_path, 2)).output.weight_bytes
    with pytest.raises(Refused, match=rf"the least widths take {least:,}"):
        planned(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, {"target_bytes": least - 1}))
    met = run(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, {"target_bytes": least}))
    assert met.after.weight_bytes == least
    with pytest.raises(Refused, match=r"target_bpw 2 is out of reach: the least widths take 3\.\d+"):
        planned(tiny_llama, tmp_path / "no", recipe(tmp_path, text_file, {"target_bpw": 2}))


def test_a_dry_run_says_what_is_open(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    rules = [{"match": "*.o_proj", "bits": 8}, {"match": "*.down_proj", "choices": [3, 4]}]
    given = recipe(tmp_path, text_file, {"target_bytes": 150_000}, rules=rules)
    summary = planned(tiny_llama, tmp_path / "out", given).summary()
    assert summary.undecided is not None
    found = summary.undecided
    assert (found.target, found.value, found.layers) == ("target_bytes", 150_000, 18)
    assert found.least < 150_000 == found.most
    rows = {row.name: row for row in summary.rows}
    assert rows["model.layers.0.mlp.down_proj"].detail["bits"] == "3 or 4"
    assert rows["model.layers.0.mlp.up_proj"].detail["bits"] == "2, 3, 4 or 8"
    assert rows["model.layers.0.mlp.up_proj"].bytes_after is None
    assert rows["model.layers.0.self_attn.o_proj"].detail["bits"] == 8
    plain = json.loads(summary.to_json())
    assert plain["weight_bytes"] is None
    assert not (tmp_path / "out").exists()


def test_rules_pin_and_narrow(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    rules = [{"match": "*.o_proj", "bits": 8}, {"match": "*.down_proj", "choices": [3, 4]}]
    report = run(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, {"target_bpw": 3.6}, rules=rules))
    found = bits_of(report)
    assert all(found[f"model.layers.{n}.self_attn.o_proj"] == 8 for n in range(3))
    assert {found[f"model.layers.{n}.mlp.down_proj"] for n in range(3)} <= {3, 4}
    assert not any("o_proj" in name for unit in report.bits["units"] for name in unit["layers"])


def test_rules_with_other_targets_are_refused(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    rules = [{"match": "*.o_proj", "target_bpw": 5}]
    with pytest.raises(Refused, match=r"target_bpw 5\.0 and 4\.0|target_bpw 4\.0 and 5\.0"):
        planned(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, {"target_bpw": 4.0}, rules=rules))


def test_calibration_is_needed_even_without_statistics(tmp_path: Path, tiny_llama: Path) -> None:
    given = write_recipe(tmp_path, None, method={**RTN, "target_bpw": 4})
    with pytest.raises(Refused, match="bits: auto needs calibration data"):
        planned(tiny_llama, tmp_path / "out", given)


def test_embeddings_take_part_and_tied_ones_once(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    given = recipe(tmp_path, text_file, {"target_bpw": 4.5}, select={"kinds": ["linear", "embedding", "head"]})
    report = run(tiny_llama, tmp_path / "out", given)
    (unit,) = (unit for unit in report.bits["units"] if unit["layers"] == ["model.embed_tokens"])
    assert unit["options"][0]["loss"] > unit["options"][-1]["loss"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not config.get("dequantize")  # never with several schemes
    assert load(tmp_path / "out")(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_mixed_widths_load_in_transformers(searched: tuple[Path, Report]) -> None:
    from transformers import AutoModelForCausalLM

    out, _ = searched
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert len(config["config_groups"]) > 1
    ids = torch.arange(16)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
        ours = load(out)(input_ids=ids).logits
    assert torch.allclose(theirs.float(), ours.float(), atol=0.05)


def test_encoders_and_blocks(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    """Without logits the states are compared, and max_kl is refused; by blocks the choice is much the same."""
    given: dict[str, Any] = {"target_bpw": 4.5, "group_size": 8, "group_sizes": [8]}
    outputs = run(tiny_bert, tmp_path / "outputs", recipe(tmp_path, text_file, given))
    blocks = run(tiny_bert, tmp_path / "blocks", recipe(tmp_path, text_file, {**given, "sensitivity": "block"}))
    assert outputs.bits["loss"].startswith("relative squared error")
    assert (outputs.bits["measured"], blocks.bits["measured"]) == ("outputs", "blocks")
    pairs = [
        (a["loss"], b["loss"])
        for one, other in zip(outputs.bits["units"], blocks.bits["units"], strict=True)
        for a, b in zip(one["options"][:3], other["options"][:3], strict=True)
    ]
    logs = torch.tensor(pairs).log().t()
    assert torch.corrcoef(logs)[0, 1] > 0.95
    with pytest.raises(Refused, match="max_kl needs a model that gives logits"):
        run(
            tiny_bert,
            tmp_path / "no",
            recipe(tmp_path, text_file, {"max_kl": 0.1, "group_size": 8, "group_sizes": [8]}),
        )
    assert not working_path(tmp_path / "no").exists()


def test_what_cannot_be_measured_is_not_free(tmp_path: Path, tiny_bert: Path, text_file: Path) -> None:
    """The states do not depend on the pooler: it is taken for a layer like the others, not for a free one."""
    report = run(
        tiny_bert, tmp_path / "out", recipe(tmp_path, text_file, {"target_bpw": 6, "group_size": 8, "group_sizes": [8]})
    )
    (pooler,) = (unit for unit in report.bits["units"] if unit["layers"] == ["pooler.dense"])
    assert pooler["options"][0]["loss"] > pooler["options"][-1]["loss"] > 0
    assert pooler["bits"] > 2


def test_calibrated_methods_are_stood_in_for(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", recipe(tmp_path, text_file, {"name": "gptq", "target_bpw": 4.5}))
    assert report.bits["stand_in"]
    assert {row.method for row in report.layers} == {"gptq", "-"}
    assert len(set(bits_of(report).values())) > 1


def test_quantizing_factors(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    from aicompress.pipeline.layerwise import planner
    from aicompress.pipeline.layerwise import run as layerwise
    from aicompress.pipeline.step.output import Destination
    from aicompress.recipe import load as load_recipe

    path = tmp_path / "svd.yaml"
    path.write_text(json.dumps({"version": 1, "method": {"name": "svd", "rank": 16}}))
    factors = tmp_path / "factors"
    layerwise.run(
        planner.make_plan(tiny_llama, Destination(factors), load_recipe(str(path), "factorize"), "factorize"), OFF
    )
    report = run(factors, tmp_path / "out", recipe(tmp_path, text_file, {"target_bpw": 5.5}))
    assert len(set(bits_of(report).values())) > 1
    assert load(tmp_path / "out")(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_a_stopped_search_goes_on(
    tmp_path: Path, tiny_llama: Path, text_file: Path, searched: tuple[Path, Report]
) -> None:
    given = recipe(tmp_path, text_file, {"target_bpw": 4.5})
    _, whole = searched

    def stop(what: str, done: int, total: int) -> None:
        if what == "sensitivities" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "out", given, options=Options(latency="off", progress=stop))
    assert not (tmp_path / "out").exists()
    other = recipe(tmp_path, text_file, {"target_bpw": 5})
    with pytest.raises(Refused, match="another input, recipe or version"):
        run(tiny_llama, tmp_path / "out", other, options=Options(resume=True, latency="off"))
    given = recipe(tmp_path, text_file, {"target_bpw": 4.5})
    told: list[tuple[str, int]] = []
    resumed = Options(True, "off", lambda what, done, total: told.append((what, done)))
    report = run(tiny_llama, tmp_path / "out", given, options=resumed)
    assert min(done for what, done in told if what == "sensitivities") == 5
    assert report.after.sha256 == whole.after.sha256
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_run_stopped_while_it_writes_does_not_measure_again(
    tmp_path: Path, tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tmp_path, text_file, {"target_bpw": 4.5, "evaluations": 4})
    whole = run(tiny_llama, tmp_path / "whole", given)

    def stop(what: str, done: int, total: int) -> None:
        if what == "model.layers.1.mlp.up_proj.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "out", given, options=Options(latency="off", progress=stop))
    monkeypatch.setattr(WidthTrial, "loss", lambda *_: pytest.fail("it was measured already"))
    monkeypatch.setattr(searching, "refined", lambda *_: pytest.fail("it was refined already"))
    report = run(tiny_llama, tmp_path / "out", given, options=Options(resume=True, latency="off"))
    assert report.after.sha256 == whole.after.sha256
    assert report.bits == whole.bits


def test_the_report_says_why(searched: tuple[Path, Report]) -> None:
    _, report = searched
    assert Report.from_json(report.to_json()).bits == report.bits
    shown = to_markdown(report)
    assert "KL divergence of the outputs on 4 calibration samples" in shown
    assert "a width more saves, per KB" in shown
    assert "`model.layers.0.self_attn.k_proj and 2 that share its input`" in shown
    assert "a width more saves, per KB" in to_html(report)


def test_range_in_a_plan(tmp_path: Path, tiny_llama: Path) -> None:
    """A dry run has every byte: the widths are read from the weights, and layers of one input agree."""
    given = write_recipe(tmp_path, None, method={"name": "rtn", "bits": "range", "group_size": 16, "max_error": 0.09})
    plan = planned(tiny_llama, tmp_path / "out", given)
    assert plan.summary().undecided is None
    report = run(tiny_llama, tmp_path / "out", given)
    assert report.after.weight_bytes == plan.output.weight_bytes
    found = bits_of(report)
    assert all(row.rel_error is not None and row.rel_error <= 0.091 for row in report.layers)
    assert all(len({found[f"model.layers.{n}.{name}"] for name in group}) == 1 for n in range(3) for group in FUSED)
    assert Checkpoint.open(tmp_path / "out").manifest.lineage[-1]["recipe"]["method"]["bits"] == "range"
