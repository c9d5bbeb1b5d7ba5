"""Experts: what is written computes as the model whose router never asks those that went; scores by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.pipeline.calibration.request import Request
from tests.pipeline.calibration.steps import text
from tests.pipeline.families import FAMILIES
from tests.pipeline.steps import loaded, prune, refused
from tests.pipeline.structured.test_calibrated import logits, recipe, windows
from tests.pipeline.structured.test_calibrated import prune as calibrated

SHAPE = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.3}
ROUTED = {"num_experts_per_tok": 2}
DEEPSEEK = {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}
DEEPSEEK |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
IDS = torch.arange(3, 35).reshape(2, 16)


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SHAPE, **ROUTED, num_local_experts=6))


def qwen() -> Any:
    fields = {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SHAPE, **ROUTED, **fields, norm_topk_prob=True))


def gpt_oss() -> Any:
    """All experts in one tensor on disk, with biases."""
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SHAPE, **ROUTED, num_local_experts=6))


def deepseek() -> Any:
    """A dense first layer, groups of experts, a bias that corrects the router."""
    fields = {**SHAPE, **ROUTED, **DEEPSEEK, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    fields.pop("head_dim")
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**fields))


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt-oss": gpt_oss, "deepseek": deepseek}


def saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(folder)
    return model


def routers(model: Any) -> list[Any]:
    """Modules with a row for each expert, in the order of the layers."""
    found = [getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None) for layer in model.model.layers]
    return [router for router in found if router is not None and hasattr(router, "weight")]


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_the_model_that_never_asks_the_others(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "in")
    before = logits(model, IDS)
    report = prune(tmp_path / "in", tmp_path / "out", name="experts", experts=4, score="norm")
    narrow = loaded(model, tmp_path / "out")
    assert report.after.parameters < report.before.parameters
    experts = model.model.layers[-1].mlp.experts
    assert narrow.model.layers[-1].mlp.experts.down_proj.shape[0] == 4
    for wide, few in zip(routers(model), routers(narrow), strict=True):
        kept = [int((wide.weight == row).all(dim=1).nonzero()) for row in few.weight]
        assert kept == sorted(kept)
        never = [expert for expert in range(6) if expert not in kept]
        if name == "deepseek":
            assert len([expert for expert in kept if expert < 3]) == 2  # two of each group of three
        silence(wide, never, name)
    last = routers(model)[-1].weight
    place = [int((last == row).all(dim=1).nonzero()) for row in routers(narrow)[-1].weight]
    assert torch.equal(narrow.model.layers[-1].mlp.experts.down_proj, experts.down_proj[place])
    after = logits(narrow, IDS)
    torch.testing.assert_close(after, logits(model, IDS), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def silence(router: Any, never: list[int], name: str) -> None:
    """A router that never chooses some experts: their scores are as low as can be."""
    with torch.no_grad():
        if name == "deepseek":  # sigmoid scores: the correction decides the choice
            router.e_score_correction_bias[never] = -1e4
        elif name == "gpt-oss":
            router.bias[never] = -1e4
        else:
            weight, forward = router.weight, router.forward
            plain = torch.nn.functional.linear

            def quiet(given: Tensor) -> Any:
                def linear(states: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
                    found = plain(states, matrix, bias)
                    return found.index_fill(1, torch.tensor(never), -1e4) if matrix is weight else found

                torch.nn.functional.linear = linear
                try:
                    return forward(given)
                finally:
                    torch.nn.functional.linear = plain

            router.forward = quiet


def by_hand(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """REAP scores and token counts of each layer of a Mixtral, expert by expert."""
    found: list[tuple[Tensor, Tensor]] = []

    def see(module: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
        states, chosen, weights = given
        count, total = torch.zeros(module.num_experts), torch.zeros(module.num_experts)
        for token, experts, gates in zip(states, chosen, weights / weights.sum(1, keepdim=True), strict=True):
            for expert, gate in zip(experts.tolist(), gates, strict=True):
                first, second = (module.gate_up_proj[expert] @ token).chunk(2)
                answer = module.down_proj[expert] @ (module.act_fn(first) * second)
                count[expert] += 1
                total[expert] += gate * answer.norm()
        found.append((total / count.clamp_min(1), count))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(see)
    with torch.no_grad():
        model(input_ids=ids)
    return found


@pytest.mark.parametrize("fixture", ["tiny_mixtral", "tiny_qwen_moe"])
@pytest.mark.parametrize("score", ["reap", "frequency"])
def test_scores_are_those_by_hand(
    tmp_path: Path, text_file: Path, fixture: str, score: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(fixture)
    model = hf.AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    found = by_hand(model, windows(source, text_file, 2))
    size = len(found[0][0]) // 2
    method = {"name": "experts", "sparsity": 0.5, "score": score}
    report = calibrated(source, tmp_path / "out", recipe(tmp_path, text(text_file, 2), method))
    assert report.calibration["data"][0]["samples"] == 2
    for number, (reap, count) in enumerate(found):
        best = (reap if score == "reap" else count).argsort(descending=True, stable=True)[:size].sort().values
        told = f"model.layers.{number}: kept experts {', '.join(map(str, best.tolist()))} of {2 * size}"
        assert told in report.notes


def test_experts_of_one_tensor_are_scored_too(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    """GPT-OSS multiplies with transposed matrices, clamps and adds biases: it is run, not imitated."""
    torch.manual_seed(0)
    config = hf.GptOssConfig(**{**SHAPE, "vocab_size": 256}, **ROUTED, num_local_experts=6)
    hf.GptOssForCausalLM(config).save_pretrained(tmp_path / "in")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / file).write_bytes((tiny_llama / file).read_bytes())
    method = {"name": "experts", "experts": 3}
    report = calibrated(tmp_path / "in", tmp_path / "out", recipe(tmp_path, text(text_file, 2), method))
    assert sum("kept experts" in line for line in report.notes) == 2
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_local_experts == 3


def test_what_cannot_be_is_refused(tmp_path: Path, tiny_mixtral: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    assert "12 experts, 2 for each token: 1 cannot stay" in refused(tiny_mixtral, out, name="experts", experts=1)
    assert "13 cannot stay" in refused(tiny_mixtral, out, name="experts", experts=13)
    assert "2 to 12" in refused(tiny_mixtral, out, name="experts", sparsity=0.99)
    FAMILIES["llama"].saved(tmp_path / "dense")
    assert "counts no experts" in refused(tmp_path / "dense", out, name="experts", sparsity=0.5)
    saved("deepseek", tmp_path / "grouped")
    message = refused(tmp_path / "grouped", out, name="experts", experts=3, score="norm")
    assert "in 2 groups" in message
    assert "a multiple of 2" in message
    method = {"name": "experts", "experts": 4}
    with pytest.raises(CompressError, match="needs calibration data"):
        calibrated(tiny_mixtral, out, recipe(tmp_path, None, method))
    stats = Request(stats=(tmp_path / "s.safetensors",))
    with pytest.raises(CompressError, match="files of statistics do not hold"):
        calibrated(tiny_mixtral, out, recipe(tmp_path, text(text_file), method), stats)


def test_a_target_in_parameters(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "in")
    four = prune(tmp_path / "in", tmp_path / "four", name="experts", experts=4, score="norm").after.parameters
    report = prune(tmp_path / "in", tmp_path / "out", name="experts", score="norm", target_parameters=four + 10)
    assert report.after.parameters == four
