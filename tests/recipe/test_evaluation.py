from pathlib import Path

import pytest

from aicompress.errors import RecipeError
from aicompress.metrics.perplexity import Perplexity
from aicompress.recipe import shipped
from aicompress.recipe.evaluation import load, recipe_class


def written(folder: Path, text: str) -> str:
    path = folder / "eval.yaml"
    path.write_text(f"version: 1\n{text}")
    return str(path)


@pytest.mark.parametrize("path", sorted((shipped() / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load(f"eval/{path.stem}").latency is not None
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    found = load(written(tmp_path, "quality: {perplexity: {text: novel.txt, samples: 4, kl_samples: 2}}"))
    ((metric, data),) = found.quality.asked
    assert metric.name == "perplexity"
    assert isinstance(data, Perplexity)
    assert data.text == str(tmp_path / "novel.txt")
    assert data.kl_samples == 2


def test_overrides_come_before_validation(tmp_path: Path) -> None:
    found = load(written(tmp_path, "latency: {batch: 8}"), ["latency.rounds=5"])
    assert found.latency is not None
    assert (found.latency.batch, found.latency.rounds) == (8, 5)


def test_figures_depend_on_a_baseline(tmp_path: Path) -> None:
    text = "quality: {perplexity: {text: a}, embedding: {text: b}}"
    found = load(written(tmp_path, text))
    assert found.figures(compared=False) == ("perplexity",)
    compared = ("perplexity", "kl", "top1_agreement", "embedding_agreement", "embedding_cosine")
    assert found.figures(compared=True) == compared


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quality: {perplexty: {text: a}}", "quality.perplexty: unknown key"),
        ("quality: {perplexity: {pairs: a.tsv, columns: [0, 1], score: 2}}", "perplexity is measured on"),
        ("quality: {similarity: {text: a}}", "similarity is measured on pairs"),
        ("quality: {accuracy: {arrays: a.npz, inputs: x}}", "accuracy needs `labels`"),
        ("quality: {accuracy: {text: a}}", "accuracy is measured on"),
        ("latency: {rounds: 1}", "latency.rounds"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load(written(tmp_path, text))


def test_the_digest_follows_the_content() -> None:
    recipe = recipe_class()
    assert recipe(version=1).sha256() == recipe(version=1, seed=0).sha256()
    assert recipe(version=1).sha256() != recipe(version=1, seed=1).sha256()
    plain = {"perplexity": {"text": "a"}}
    assert recipe(version=1).sha256() != recipe.model_validate({"version": 1, "quality": plain}).sha256()


def test_an_unknown_metric_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, "quality: {acuracy: {text: a}}"))
    assert "'accuracy'" in caught.value.hint


def test_arrays_are_those_that_something_is_measured_on(tmp_path: Path) -> None:
    arrays = load(written(tmp_path, "quality: {accuracy: {arrays: a.npz, inputs: x, labels: y}}")).quality.arrays
    assert arrays is not None
    assert (arrays.kind, arrays.inputs) == ("arrays", "x")
    assert load(written(tmp_path, "quality: {perplexity: {text: a}}")).quality.arrays is None


def test_a_key_outside_of_its_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="samples: unknown key") as caught:
        load(written(tmp_path, "samples: 4"))
    assert "quality.perplexity.samples" in caught.value.hint
