"""Layers of unlike widths: as many parameters as equal widths, where least is lost; loaded with and without config."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf

import aicompress.hf  # noqa: F401
from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, Refused
from aicompress.methods.prune.units import obs
from aicompress.model.loading.load import load
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load as load_recipe
from tests.methods.prune.units.test_obs import TINY, correlated, error, seen, structure
from tests.pipeline.calibration.steps import OFF, text
from tests.pipeline.families import FAMILIES
from tests.pipeline.structured.test_calibrated import divergence, logits, prune, recipe, windows
from tests.pipeline.structured.test_gradient_scores import sensitivities

UNEVEN = {"name": "width", "sparsity": 0.5, "score": "obs", "widths": "per_layer", "multiple": 4}


def test_curves_are_the_errors_of_what_stays() -> None:
    found = structure(torch.randn(5, 12, generator=torch.Generator().manual_seed(1)), seen(correlated(300, 12)))
    (consumer,) = obs.consumers(found, TINY)
    sizes = [12, 9, 6, 3]
    curve = obs.curve(found, [consumer], sizes)
    exact = [error(consumer, obs.chosen(found, [consumer], size)) for size in sizes]
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(exact), atol=1e-4, rtol=1e-3)


def test_unlike_widths_lose_less_and_load_everywhere_it_says(
    tmp_path: Path, trained_llama: Path, text_file: Path, python: list[str]
) -> None:
    ids = windows(trained_llama, text_file, 16)
    uniform = recipe(tmp_path, text(text_file, 32), {**UNEVEN, "widths": "uniform"})
    even = prune(trained_llama, tmp_path / "even", uniform)
    report = prune(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file, 32), UNEVEN))
    stored = Checkpoint.open(tmp_path / "out").parameters()
    widths = [stored[f"model.layers.{n}.mlp.down_proj.weight"].shape[1] for n in range(3)]
    assert len(set(widths)) > 1
    assert sum(widths) <= 3 * 64
    assert report.after.parameters <= even.after.parameters
    model = load(tmp_path / "out")
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == widths
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == widths
    with pytest.raises(Refused, match="cannot write the widths of single layers"):
        model.save_pretrained(tmp_path / "saved")
    same = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(same, ids), logits(model, ids))
    assert divergence(trained_llama, tmp_path / "out", ids) < 1.02 * divergence(trained_llama, tmp_path / "even", ids)
    script = (
        "import sys, transformers as hf\n"
        "try:\n"
        "    hf.LlamaForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception:\n"
        "    print('closed')\n"
        "model = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print([layer.mlp.up_proj.out_features for layer in model.model.layers])\n"
        "assert 'aicompress' not in sys.modules\n"
    )
    done = subprocess.run(
        [*python, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.splitlines() == ["closed", str(widths)], done.stderr[-2000:]


@pytest.mark.parametrize("fixture", ["tiny_gpt2", "tiny_bert"])
def test_other_families(tmp_path: Path, text_file: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(fixture)
    auto = hf.AutoModel if fixture == "tiny_bert" else hf.AutoModelForCausalLM
    prune(source, tmp_path / "out", recipe(tmp_path, text(text_file), UNEVEN))
    ids = windows(source, text_file, 2)
    found = logits(auto.from_pretrained(tmp_path / "out"), ids)
    torch.testing.assert_close(found, logits(load(tmp_path / "out"), ids), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


def test_the_budget_goes_where_the_score_says(tmp_path: Path) -> None:
    """The gate, the up and the down projection of the first layer are ten times as large: it keeps all that it can."""
    family = FAMILIES["llama"]
    model = family.build()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(model.model.layers[0].mlp, name).weight[8:] *= 0.001  # 40 of its 48 neurons do next to nothing
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"version": 1, "method": {"name": "width", "sparsity": 0.25, "widths": "per_layer", "multiple": 4}})
    )
    prune(tmp_path / "in", tmp_path / "out", tmp_path / "recipe.yaml")
    stored = Checkpoint.open(tmp_path / "out").parameters()
    widths = [stored[f"model.layers.{n}.mlp.down_proj.weight"].shape[1] for n in range(4)]
    assert widths[0] == 8
    assert sum(widths) <= 4 * 36
    assert min(widths[1:]) >= 40
    before, after = (family.output(each) for each in (model.eval(), load(tmp_path / "out")))
    assert float((after - before).norm() / before.norm()) < 0.5


@pytest.mark.parametrize("score", ["activation", "taylor"])
def test_scores_of_data_share_out_widths(tmp_path: Path, trained_llama: Path, text_file: Path, score: str) -> None:
    """No more parameters than equal widths; taylor is measured once, while the step is planned."""
    method = {"name": "width", "sparsity": 0.5, "score": score, "multiple": 4}
    even = prune(trained_llama, tmp_path / "even", recipe(tmp_path, text(text_file, 8), method))
    path = recipe(tmp_path, text(text_file, 8), {**method, "widths": "per_layer"})
    report = prune(trained_llama, tmp_path / "out", path)
    stored = Checkpoint.open(tmp_path / "out").parameters()
    widths = [stored[f"model.layers.{n}.mlp.down_proj.weight"].shape[1] for n in range(3)]
    assert len(set(widths)) > 1
    assert report.after.parameters <= even.after.parameters
    assert report.calibration["data"][0]["samples"] == 8
    ids = windows(trained_llama, text_file, 8)
    assert divergence(trained_llama, tmp_path / "out", ids) < 1.3 * divergence(trained_llama, tmp_path / "even", ids)


def test_taylor_shares_out_what_the_loss_feels(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    """By hand: of all neurons of all layers those of least w² E[g²] go."""
    model = hf.AutoModelForCausalLM.from_pretrained(trained_llama)
    found = sensitivities(model, windows(trained_llama, text_file, 4))
    method = {"name": "width", "sparsity": 0.5, "multiple": 1, "score": "taylor", "loss": "task", "widths": "per_layer"}
    prune(trained_llama, tmp_path / "out", recipe(tmp_path, text(text_file, 4), method))
    stored = Checkpoint.open(tmp_path / "out").parameters()
    widths = [stored[f"model.layers.{n}.mlp.down_proj.weight"].shape[1] for n in range(3)]
    totals = []
    for number in range(3):
        of = {name: found[f"model.layers.{number}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        totals.append(of["gate"].sum(1) + of["up"].sum(1) + of["down"].sum(0))
    limit = torch.cat(totals).sort(descending=True).values[3 * 64]
    expected = [int((total > limit).sum()) for total in totals]
    assert max(abs(one - other) for one, other in zip(widths, expected, strict=True)) <= 4  # sizes are tried in steps


def test_later_steps(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    """Quantizing goes on; what would change the structure again is refused."""
    prune(trained_llama, tmp_path / "uneven", recipe(tmp_path, text(text_file), UNEVEN))
    ints = tmp_path / "int8.yaml"
    method = {"name": "gptq", "bits": 8, "granularity": "channel", "refine": 0}
    ints.write_text(json.dumps({"version": 1, "method": method, "calibration": text(text_file)}))
    made = planner.make_plan(
        tmp_path / "uneven", Destination(tmp_path / "int8"), load_recipe(str(ints), "quantize"), "quantize"
    )
    layerwise.run(made, OFF)
    ids = windows(trained_llama, text_file, 2)
    before, after = logits(load(tmp_path / "uneven"), ids), logits(load(tmp_path / "int8"), ids)
    assert float((after - before).norm() / before.norm()) < 0.05
    torch.testing.assert_close(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "int8"), ids), after,
                               atol=0.05, rtol=0.05)  # fmt: skip
    with pytest.raises(CompressError, match="its layers have unlike widths"):
        prune(
            tmp_path / "uneven", tmp_path / "again", recipe(tmp_path, text(text_file), {**UNEVEN, "widths": "uniform"})
        )


def test_what_cannot_be(tmp_path: Path, tiny_mixtral: Path, text_file: Path) -> None:
    with pytest.raises(CompressError, match="merged in the model"):
        prune(tiny_mixtral, tmp_path / "out", recipe(tmp_path, text(text_file), UNEVEN))
