"""Models are run once on every sample, in batches that do not show in the figures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aicompress.data import Data
from aicompress.errors import CheckpointError, RecipeError
from aicompress.metrics import metrics
from aicompress.metrics.outputs import ClassLogits, TokenLogits
from aicompress.metrics.perplexity import Perplexity
from aicompress.pipeline.evaluation import quality as running
from aicompress.pipeline.evaluation.quality import model_outputs
from aicompress.pipeline.evaluation.samples import read_samples
from aicompress.pipeline.step.models.running_model import Running, Setting
from tests import checkpoints

METRICS = metrics()


def outputs(
    models: Sequence[Running], name: str, data: Data, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Any]:
    metric = METRICS[name]
    return model_outputs(models, metric, data, read_samples(models, metric, data), progress)


@torch.inference_mode()
def token_logits(models: Sequence[Running], text: Path) -> list[TokenLogits]:
    return list(outputs(models, "perplexity", Perplexity(text=str(text), samples=6, length=32)))


@torch.inference_mode()
def class_logits(
    modules: Sequence[torch.nn.Module], inputs: torch.Tensor, labels: torch.Tensor, folder: Path
) -> list[ClassLogits]:
    np.savez(folder / "samples.npz", x=inputs.numpy(), y=labels.numpy())
    data = Data(arrays=str(folder / "samples.npz"), inputs="x", labels="y")
    models = [Running(f"model {number}", module) for number, module in enumerate(modules)]
    return list(outputs(models, "accuracy", data))


@pytest.fixture(scope="module")
def llama(trained_llama: Path) -> Running:
    return Setting().start(str(trained_llama))


def test_one_batch_holds_as_many_logits_as_memory_allows(
    llama: Running, heldout_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_logits([llama, llama], heldout_file)
    assert [len(batch.targets) for batch in whole] == [1, 5]
    monkeypatch.setattr(running, "LOGITS", 2 * 32 * 256)
    parts = token_logits([llama, llama], heldout_file)
    assert [len(batch.targets) for batch in parts] == [1, 2, 2, 1]
    assert torch.equal(torch.cat([batch.targets for batch in parts]), torch.cat([batch.targets for batch in whole]))
    one, other = (torch.cat([batch.logits[1] for batch in batches]) for batches in (parts, whole))
    assert torch.allclose(one, other, atol=1e-4)


def test_progress_counts_windows(llama: Running, heldout_file: Path) -> None:
    told: list[tuple[int, int]] = []
    data = Perplexity(text=str(heldout_file), samples=6, length=32)
    for _ in outputs([llama], "perplexity", data, lambda done, total: told.append((done, total))):
        pass
    assert told == [(1, 6), (6, 6)]


def test_an_encoder_has_no_perplexity(tiny_bert: Path, heldout_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no logits") as caught:
        token_logits([Setting().start(str(tiny_bert))], heldout_file)
    assert "perplexity is measured on language models" in caught.value.hint


@pytest.mark.parametrize("rows", [300, 5])
def test_tables_that_are_padded_otherwise_are_compared_on_the_tokens_they_share(
    llama: Running, heldout_file: Path, tmp_path: Path, rows: int
) -> None:
    other = Setting().start(str(checkpoints.make_llama(tmp_path / "other")))
    other.module.resize_token_embeddings(rows)  # type: ignore[operator]
    if rows < 256:
        with pytest.raises(CheckpointError, match="has 5 tokens"):
            token_logits([llama, other], heldout_file)
        return
    (whole, *_), (both, *_) = token_logits([llama], heldout_file), token_logits([llama, other], heldout_file)
    assert {logits.shape[-1] for logits in both.logits} == {256}
    assert torch.equal(both.logits[0], whole.logits[0])


def test_samples_keep_their_labels_in_every_batch(tmp_path: Path) -> None:
    labels = torch.arange(150) % 2
    inputs = torch.nn.functional.one_hot(labels, 2).float()
    batches = class_logits([torch.nn.Identity(), torch.nn.Softmax(-1)], inputs, labels, tmp_path)
    assert [len(batch.labels) for batch in batches] == [64, 64, 22]
    for batch in batches:
        assert batch.unit == "samples"
        assert all(torch.equal(logits.argmax(-1), batch.labels) for logits in batch.logits)


def test_an_image_classifier_of_transformers(tiny_vit: Path, tmp_path: Path) -> None:
    model = Setting().start(str(tiny_vit)).module
    images = torch.rand(12, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=images.unsqueeze(1)).logits.argmax(-1)
    batches = class_logits([model], images, expected, tmp_path)
    accuracy = METRICS["accuracy"].measure(batches, Data(text="unread.txt"), 0).alone[0]["accuracy"]
    assert accuracy.value == 1.0


def test_labels_must_be_classes_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="from 0 to 5, the model has 2 classes"):
        class_logits([torch.nn.Identity()], torch.zeros(10, 2), torch.arange(10) % 6, tmp_path)


def test_an_output_that_is_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not \\(samples, classes\\)"):
        class_logits([torch.nn.Flatten(0)], torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64), tmp_path)


def test_a_sentence_is_encoded_once(tiny_bert: Path, tmp_path: Path) -> None:
    texts = checkpoints.sentences(21)
    (tmp_path / "pairs.tsv").write_text("\n".join(f"{n}\t{texts[0]}\t{other}" for n, other in enumerate(texts[1:])))
    data = Data(pairs=str(tmp_path / "pairs.tsv"), columns=(1, 2), score=0, length=32)
    (encoded,) = outputs([Setting().start(str(tiny_bert))], "similarity", data)
    assert encoded.embeddings[0].shape[0] == 21
    assert encoded.first.unique().numel() == 1
    assert encoded.second.unique().numel() == 20
    assert encoded.scores.tolist() == list(range(20))


def test_too_many_sentences_are_refused_before_any_is_encoded(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("\n".join(f"sentence {number}" for number in range(2001)))
    models = [Running(str(tiny_bert), torch.nn.Identity())]  # running it would fail
    with pytest.raises(RecipeError, match="2001 are too many"):
        next(outputs(models, "embedding", Data(text=str(tmp_path / "many.txt"))))
