from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from aicompress.checkpoint import Checkpoint
from aicompress.measure import WallTimes, interleaved
from aicompress.model.architecture.small_models import bounded_run
from aicompress.pipeline.step.environment import threads
from aicompress.pipeline.step.models.running_model import Running, example, forward_call
from aicompress.pipeline.step.timing import latency
from aicompress.pipeline.step.timing.latency import compare, latency_of, rounds_within, whole
from tests.model.compressed import compress, integers


class Recorder(torch.nn.Module):
    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__()
        self.name, self.order = name, order

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.order.append(self.name)
        return inputs


def test_models_are_timed_in_turn() -> None:
    order: list[str] = []
    models = [Running(name, Recorder(name, order)) for name in "ABC"]
    first, further = whole(models, (torch.zeros(1), "1 sample"), rounds=4, warmup=1)
    assert order == list("ABC") * 5
    assert first.rounds == 4
    assert len(further) == 1
    assert first.before_ms is not None


def test_alone_there_is_no_ratio() -> None:
    first, further = whole([Running("A", Recorder("A", []))], (torch.zeros(1), "1 sample"), rounds=3, warmup=0)
    assert (first.before_ms, first.ratio, further) == (None, None, ())


def test_medians_come_from_the_samples() -> None:
    before, after = WallTimes((0.010, 0.030, 0.020)), WallTimes((0.005, 0.001, 0.100))
    found = latency_of("x", before, after)
    assert (found.before_ms, found.after_ms) == (20, 5)
    assert (found.before_p95_ms, found.after_p95_ms) == (30, 100)
    assert (found.ratio, found.low, found.high) == (0.5, 0.001 / 0.030, 5)  # in the same rounds
    assert not found.is_measurable


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ((0.5,) * 8, None),
        ((1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07), None),
        ((1.2,) * 8, "the output is slower here: it took 1.20 to 1.20 times the input's"),
        ((0.3, 1.9) * 4, "latency is not measurable here: the output took 0.30 to 1.90 times the input's"),
    ],
)
def test_a_slower_output_and_a_ratio_that_says_nothing_are_told(times: tuple[float, ...], words: str | None) -> None:
    told = latency.judged(latency_of("x", WallTimes((1.0,) * len(times)), WallTimes(times)))
    assert len(told) == (words is not None)
    assert words is None or told[0].startswith(words)


def test_interleaving_counts_only_what_comes_after_the_warm_up() -> None:
    calls: list[int] = []
    timings = interleaved([lambda: calls.append(0), lambda: calls.append(1)], rounds=3, warmup=2)
    assert calls == [0, 1] * 5
    assert [len(timing.samples) for timing in timings] == [3, 3]


def test_rounds_fit_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "interleaved", lambda calls, rounds, warmup: [WallTimes((0.1,)) for _ in calls])
    assert rounds_within([lambda: None] * 2, seconds=2.0) == 10
    assert rounds_within([lambda: None] * 2, seconds=0.1) == 6
    assert rounds_within([lambda: None] * 2, seconds=100.0) == 30


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tiny_llama", "1 × 128 tokens"),
        ("tiny_bert", "8 × 64 tokens"),
        ("tiny_vit", "8 images"),
        ("tiny_t5", "1 × 128 tokens"),
    ],
)
def test_whole_models_are_timed(
    name: str, what: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "BUDGET", 0.01)
    source = request.getfixturevalue(name)
    out = compress(source, tmp_path / "out", lambda info, w: integers(w, 8) if info.kind == "linear" else None)
    found, warnings = compare(Checkpoint.open(source), Checkpoint.open(out))
    assert warnings in ([], latency.judged(found))
    assert found is not None
    assert found.what.startswith(f"whole model, {what}, ")
    assert found.ratio is not None
    assert found.rounds == 6


def test_a_bare_file_is_timed_by_layers(mlp_file: Path) -> None:
    checkpoint = Checkpoint.open(mlp_file)
    found, warnings = compare(checkpoint, checkpoint)
    assert found is not None
    assert found.what.startswith("sum over 3 matrix layers")
    assert warnings == []


def test_large_models_are_timed_by_layers(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "WHOLE", 1000)
    checkpoint = Checkpoint.open(tiny_llama)
    assert compare(checkpoint, checkpoint)[0].what.startswith("sum over")  # type: ignore[union-attr]


def test_a_model_that_cannot_be_built_is_timed_by_layers_and_said(tiny_llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "unknown"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    checkpoint = Checkpoint.open(folder)
    found, warnings = compare(checkpoint, checkpoint)
    assert found is not None
    assert found.what.startswith("sum over")
    assert "the whole model could not be timed" in warnings[0]


def test_a_model_that_runs_on_and_on_is_timed_by_layers_and_said(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a random vocoder does, which draws how long its sound lasts."""
    monkeypatch.setattr(bounded_run, "MOST_WORK", 1e6)
    monkeypatch.setattr(latency, "PER_TOKEN", 1e-3)
    checkpoint = Checkpoint.open(tiny_llama)
    found, warnings = compare(checkpoint, checkpoint)
    assert found is not None
    assert found.what.startswith("sum over")
    assert "the whole model could not be timed, its layers were: a forward pass takes far longer" in warnings[0]


def test_off_says_so(mlp_file: Path) -> None:
    checkpoint = Checkpoint.open(mlp_file)
    assert compare(checkpoint, checkpoint, "off") == (None, [])


def test_inputs_stay_within_the_models_positions(tiny_gpt2: Path) -> None:
    from transformers import AutoModel

    inputs, what = example(AutoModel.from_pretrained(tiny_gpt2), 2, 500)  # type: ignore[misc]
    assert inputs["input_ids"].shape == (2, 128)  # type: ignore[index]
    assert what == "2 × 128 tokens"


def test_a_model_of_texts_and_images_is_timed_on_both() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**shape, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    inputs = example(model, 2, 64)
    assert inputs is not None
    forward_call(model, inputs[0])()
    assert inputs[1] == "2 × 8 tokens and 2 images"


def test_one_thread_is_one_thread() -> None:
    before = torch.get_num_threads()
    for number, words in ((1, "1 thread"), (2, "2 threads")):
        torch.set_num_threads(number)
        assert threads() == words
    torch.set_num_threads(before)
