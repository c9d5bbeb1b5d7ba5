import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoTokenizer

from aicompress.checkpoint.reader import digests
from aicompress.checkpoint.source import locate
from aicompress.data import Data
from aicompress.errors import CheckpointError, GateFailed, OutputExists, Problems, RecipeError
from aicompress.metrics.perplexity import Perplexity
from aicompress.pipeline.evaluation.run import EvalOptions, evaluate
from aicompress.pipeline.step.options import Options
from aicompress.recipe import Model
from aicompress.recipe.evaluation import EvalRecipe, Timing, recipe_class
from aicompress.report.gates import require
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Report
from aicompress.weights import Dense, forms
from tests import checkpoints
from tests.model.compressed import compress, halved, integers
from tests.weights.forms import FORMS, write_form

QUICK = Timing(batch=1, length=16, rounds=3, warmup=0)
DIGITS = {"inputs": "test_images", "labels": "test_labels", "scale": 255}
MLP = Model(sequential=("flatten", "fc1", "relu", "fc2", "relu", "fc3"))


@pytest.fixture(scope="module")
def compressed(trained_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "w3"
    return compress(trained_llama, out, lambda info, w: integers(w, 3, 32) if info.kind == "linear" else None)


def of_text(path: Path, **fields: object) -> EvalRecipe:
    return measuring({"perplexity": Perplexity(text=str(path), samples=6, length=32)}, **fields)


def measuring(quality: dict[str, Data], **fields: object) -> EvalRecipe:
    return recipe_class().model_validate({"version": 1, "quality": quality, **fields})


def test_a_language_model_against_its_original(
    trained_llama: Path, compressed: Path, heldout_file: Path, tmp_path: Path
) -> None:
    recipe = of_text(heldout_file, latency=QUICK)
    found = evaluate(str(compressed), [str(trained_llama)], recipe, EvalOptions(out=tmp_path / "eval"))
    assert found.before is not None
    assert found.before.path == str(trained_llama)
    assert found.after.weight_bytes == (compressed / "model.safetensors").stat().st_size
    assert found.size_ratio is not None
    assert 0.1 < found.size_ratio < 0.8
    assert found.after.sha256 == digests(locate(compressed))
    quality = found.quality
    assert set(quality) == {"perplexity", "kl", "top1_agreement"}
    assert quality["kl"]["value"] > 0
    assert quality["perplexity"]["value"] > quality["perplexity"]["baseline"]
    assert quality["perplexity"]["n"] == 6 * 31
    for figure in quality.values():
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["kernels"]
        assert figure["baseline_kernels"] == "stored numbers"
    change = quality["perplexity"]["change"]
    assert change["value"] == pytest.approx(quality["perplexity"]["value"] / quality["perplexity"]["baseline"])
    assert change["low"] < change["value"] < change["high"]
    assert found.latency is not None
    assert found.latency.rounds == 3
    for side in (found.before, found.after):
        assert side.load_seconds is not None
        assert side.load_peak_rss is not None
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"report.json", "report.md", "report.html"}
    assert Report.from_json((tmp_path / "eval" / "report.json").read_text()) == found
    assert "load time, median" in (tmp_path / "eval" / "report.md").read_text()


def test_alone_there_is_nothing_to_compare(trained_llama: Path, heldout_file: Path) -> None:
    found = evaluate(str(trained_llama), [], of_text(heldout_file))
    assert found.before is None
    assert list(found.quality) == ["perplexity"]
    assert found.latency is None
    assert found.warnings == ()  # a recipe without a section for latency asks for none


def test_the_report_says_what_was_read(trained_llama: Path, tmp_path: Path) -> None:
    """Rows of nothing are counted, and windows begin as the tokenizer begins a text."""
    copied = Path(shutil.copytree(trained_llama, tmp_path / "copied"))
    tokenizer = AutoTokenizer.from_pretrained(copied)
    plain = evaluate(str(copied), [], of_rows(tmp_path, ["a line of text " * 20, None, "", "another " * 20]))
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.save_pretrained(copied)
    found = evaluate(str(copied), [], of_rows(tmp_path, ["a line of text " * 20, None, "", "another " * 20]))
    assert (plain.data["perplexity"]["bos"], found.data["perplexity"]["bos"]) == ("", "<s>")
    assert found.data["perplexity"]["skipped"] == 2
    assert "rows.jsonl: rows that are null or empty are left out: 2" in found.warnings
    assert found.quality["perplexity"]["value"] != plain.quality["perplexity"]["value"]


def of_rows(folder: Path, texts: list[str | None]) -> EvalRecipe:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return measuring({"perplexity": Perplexity(jsonl=str(folder / "rows.jsonl"), length=16)})


def test_a_copy_of_a_tied_parameter_counts_once(trained_llama: Path, heldout_file: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(trained_llama, tmp_path / "copied"))
    tensors = load_file(copied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    found = evaluate(str(copied), [str(trained_llama)], of_text(heldout_file))
    assert found.before is not None
    assert found.after.parameters == found.before.parameters
    assert found.after.weight_bytes > found.before.weight_bytes  # the file is as large as it is
    assert sum(found.after.by_kind.values()) == found.after.weight_bytes
    assert found.quality["kl"]["value"] == 0.0


def test_reference_kernels_judge_exactly_what_is_stored(
    trained_llama: Path, compressed: Path, heldout_file: Path, tmp_path: Path
) -> None:
    decoded = compress(
        trained_llama,
        tmp_path / "decoded",
        lambda info, w: Dense(integers(w, 3, 32).dense()) if info.kind == "linear" else None,
    )
    found = evaluate(str(compressed), [str(decoded)], of_text(heldout_file, kernels="reference"))
    assert found.quality["kl"]["value"] == 0.0
    assert found.quality["top1_agreement"]["value"] == 1.0


def test_reference_kernels_round_the_inputs_of_w8a8(trained_llama: Path, heldout_file: Path, tmp_path: Path) -> None:
    plain = compress(trained_llama, tmp_path / "plain", lambda i, w: integers(w, 8) if i.kind == "linear" else None)
    rounded = compress(
        trained_llama,
        tmp_path / "rounded",
        lambda i, w: integers(w, 8, activations=8) if i.kind == "linear" else None,
    )
    found = evaluate(str(rounded), [str(plain)], of_text(heldout_file, kernels="reference"))
    assert found.quality["kl"]["value"] > 0.0


def test_further_baselines(trained_llama: Path, compressed: Path, tiny_llama: Path, heldout_file: Path) -> None:
    recipe = of_text(heldout_file, latency=QUICK)
    found = evaluate(str(compressed), [str(trained_llama), str(tiny_llama)], recipe)
    against = found.quality["against"][str(tiny_llama)]
    assert against["perplexity"]["value"] == found.quality["perplexity"]["value"]
    assert against["perplexity"]["baseline"] > found.quality["perplexity"]["baseline"]  # tiny_llama is random
    assert against["kl"]["value"] > found.quality["kl"]["value"]
    (baseline,) = found.baselines
    assert baseline.side.path == str(tiny_llama)
    assert baseline.latency is not None
    assert f"| `{tiny_llama}` |" in to_markdown(found).partition("## Further baselines")[2]
    assert Report.from_json(found.to_json()) == found


def test_gates_are_judged_after_the_report_is_written(
    trained_llama: Path, compressed: Path, heldout_file: Path, tmp_path: Path
) -> None:
    recipe = of_text(heldout_file, gates=("quality.kl <= 0.000001", "bytes <= 1MB"))
    options = EvalOptions(out=tmp_path / "eval", fail_if=("quality.perplexity > 1", "size.ratio > 0.9"))
    found = evaluate(str(compressed), [str(trained_llama)], recipe, options)
    assert [gate.passed for gate in found.gates] == [False, True, False, True]
    written = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert written["gates"][2]["expression"] == "fail if quality.perplexity > 1"
    with pytest.raises(GateFailed, match="2 of 4 gates failed"):
        require(found.gates)


@pytest.mark.parametrize(
    ("fields", "fail_if", "message"),
    [
        ({"gates": ("size.ratio <= 0.3",)}, (), "size.ratio will not be measured"),
        ({}, ("latency.ratio > 1",), "latency.ratio will not be measured"),
        ({}, ("before.bytes > 1",), "before.bytes will not be measured"),
        ({}, ("training.loss > 1",), "training.loss will not be measured"),
        ({"gates": ("quality.kl <= 1",)}, (), "will not be measured"),  # there is no baseline
        ({"gates": ("quality.perplexity.change <= 1.01",)}, (), "quality.perplexity.change will not be measured"),
        ({}, ("quality.accuracy < 0.9",), "will not be measured"),
        ({}, ("nonsense",), "no comparison"),
    ],
)
def test_wrong_gates_are_refused_before_any_work(
    fields: dict[str, object], fail_if: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate("nowhere", [], of_text(tmp_path / "none.txt", **fields), EvalOptions(fail_if=fail_if))


def test_every_wrong_gate_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        evaluate("nowhere", [], of_text(tmp_path, gates=("a <= 1", "b <= 2")))
    assert len(caught.value.problems) == 2


def test_a_report_never_goes_into_a_checkpoint(trained_llama: Path, heldout_file: Path) -> None:
    with pytest.raises(OutputExists):
        evaluate(str(trained_llama), [], of_text(heldout_file), EvalOptions(out=trained_llama))


def test_another_tokenizer_is_refused(trained_llama: Path, heldout_file: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    other = checkpoints.make_llama(tmp_path / "other", vocab_size=200)
    with pytest.raises(CheckpointError, match="other tokens"):
        evaluate(str(trained_llama), [str(other)], of_text(heldout_file))


def test_what_a_text_or_a_model_has_no_more_of_is_told(trained_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line\n" * 400)
    data = Perplexity(text=str(tmp_path / "text.txt"), samples=50, length=400)  # type: ignore[arg-type]
    report = evaluate(str(trained_llama), [], measuring({"perplexity": data}))
    (tmp_path / "line.txt").write_text("a line\n" * 4)
    short = data.model_copy(update={"text": str(tmp_path / "line.txt")})
    few = evaluate(str(trained_llama), [], measuring({"perplexity": short}))
    length = few.quality["perplexity"]["n"] + 1
    told = f"line.txt: it holds fewer tokens than a sample is to have: samples are {length} tokens long"
    assert few.data["perplexity"]["length"] == length < 256
    assert told in few.warnings
    used = report.data["perplexity"]
    assert used["asked"] == 50
    assert 1 < used["samples"] == used["available"] < 50
    assert "perplexity: samples are 256 tokens long, not 400: the model takes no more" in report.warnings
    assert f"text.txt: it holds fewer samples than are asked for: {used['samples']} of 50" in report.warnings


@pytest.mark.parametrize(
    ("text", "fields", "why"),
    [
        (b"a", {"samples": 50}, "too few to predict one from another"),
        (b"a line\n" * 400 + b"\xff\xfe\n", {"samples": None}, "is not UTF-8 text"),
    ],
)
def test_a_text_that_does_not_fit_is_refused_before_anything_is_timed(
    trained_llama: Path, tmp_path: Path, text: bytes, fields: dict[str, object], why: str
) -> None:
    (tmp_path / "text.txt").write_bytes(text)
    data = Perplexity(**{"text": str(tmp_path / "text.txt"), "samples": 2, "length": 32, **fields})  # type: ignore[arg-type]
    timed: list[str] = []
    watched = Options(progress=lambda what, done, total: timed.append(what))
    with pytest.raises(RecipeError, match=why):
        evaluate(str(trained_llama), [], measuring({"perplexity": data}, latency=QUICK), options=watched)
    assert not timed


def test_an_encoder_without_a_tokenizer_is_refused_before_anything_is_timed(
    tiny_bert: Path, heldout_file: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bert, bare, ignore=shutil.ignore_patterns("*token*", "vocab*"))
    timed: list[str] = []
    watched = Options(progress=lambda what, done, total: timed.append(what))
    recipe = measuring({"embedding": Data(text=str(heldout_file), samples=20)}, latency=QUICK)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(str(tiny_bert), [str(bare)], recipe, options=watched)
    assert not timed


def test_accuracy_of_a_bare_file(mlp_file: Path, digits_npz: Path, tmp_path: Path) -> None:
    out = compress(mlp_file, tmp_path / "sparse.safetensors", lambda info, w: halved(w))
    data = Data(arrays=str(digits_npz), **DIGITS)
    recipe = measuring({"accuracy": data}, model=MLP, latency=QUICK)
    found = evaluate(str(out), [str(mlp_file)], recipe)
    accuracy = found.quality["accuracy"]
    assert accuracy["n"] == 400
    assert accuracy["value"] > 0.5
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert found.quality["prediction_agreement"]["value"] > 0.5
    assert found.latency is not None
    assert "1 sample" in found.latency.what


def test_a_bare_file_needs_a_model_section(mlp_file: Path, digits_npz: Path) -> None:
    data = Data(arrays=str(digits_npz), **DIGITS)
    with pytest.raises(CheckpointError, match="names no architecture"):
        evaluate(str(mlp_file), [], measuring({"accuracy": data}))


def test_accuracy_of_a_text_classifier(tmp_path: Path) -> None:
    classifier = checkpoints.make_bert(tmp_path / "bert")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=3).eval()
    model.save_pretrained(classifier)
    texts = checkpoints.sentences(12)
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    encoded = AutoTokenizer.from_pretrained(classifier)(texts, **options)
    answers = model(**encoded).logits.argmax(-1).tolist()
    answers[0] = (answers[0] + 1) % 3
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, answers, strict=True)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    data = Data(jsonl=str(tmp_path / "test.jsonl"), labels="label", length=64)
    found = evaluate(str(classifier), [], measuring({"accuracy": data}))
    assert found.quality["accuracy"]["value"] == pytest.approx(11 / 12)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Iterator[Path]:
    texts = checkpoints.sentences(40)
    rows = [
        f"{number % 6}\t{one}\t{other}" for number, (one, other) in enumerate(zip(texts[:20], texts[20:], strict=True))
    ]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    return tmp_path / "pairs.tsv"


def test_a_sentence_encoder(tiny_bert: Path, heldout_file: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = compress(tiny_bert, tmp_path / "w4", lambda info, w: integers(w, 4, 16) if info.kind == "linear" else None)
    quality = {
        "similarity": Data(pairs=str(pairs_file), columns=(1, 2), score=0, length=64),
        "embedding": Data(text=str(heldout_file), samples=50, length=64),
    }
    found = evaluate(str(out), [str(tiny_bert)], measuring(quality)).quality
    assert set(found) == {"similarity", "similarity_agreement", "embedding_agreement", "embedding_cosine"}
    assert found["similarity"]["n"] == 20
    assert found["embedding_agreement"]["n"] == 50 * 49 // 2
    assert 0.5 < found["embedding_agreement"]["value"] < 1
    assert 0.9 < found["embedding_cosine"]["value"] < 1


def test_embeddings_need_a_baseline(tiny_bert: Path, heldout_file: Path) -> None:
    recipe = measuring({"embedding": Data(text=str(heldout_file))})
    with pytest.raises(RecipeError, match="no baseline"):
        evaluate(str(tiny_bert), [], recipe)


def test_same_seed_same_figures(trained_llama: Path, compressed: Path, heldout_file: Path) -> None:
    runs = [evaluate(str(compressed), [str(trained_llama)], of_text(heldout_file)).quality for _ in range(2)]
    assert runs[0] == runs[1]


def test_progress_rises_to_the_end(trained_llama: Path, heldout_file: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    evaluate(str(trained_llama), [], of_text(heldout_file), options=Options(progress=lambda *call: calls.append(call)))
    shares = [done / total for _, done, total in calls]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert "latency" not in [what for what, _, _ in calls]  # nothing is timed


def test_missing_data_is_refused_before_anything_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(RecipeError, match=r"nothing\.txt does not exist"):
        evaluate(
            str(tiny_llama),
            (),
            of_text(tmp_path / "nothing.txt", latency=QUICK),
            options=Options(progress=lambda what, done, total: said.append(what)),
        )
    assert not said


@pytest.mark.parametrize("form", sorted(forms()))
def test_numbers_that_are_not_finite_are_refused_where_sizes_alone_are_read(form: str, tmp_path: Path) -> None:
    weight = next(weight for weight in FORMS.values() if weight.form == form)
    tensors = {suffix: tensor.clone() for suffix, tensor in weight.tensors().items()}
    real = [suffix for suffix, tensor in tensors.items() if tensor.is_floating_point()]
    tensors[real[-1]].view(-1)[-1] = float("nan")
    write_form(tmp_path / "fc.safetensors", weight, tensors)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        evaluate(str(tmp_path / "fc.safetensors"), [], measuring({}))
