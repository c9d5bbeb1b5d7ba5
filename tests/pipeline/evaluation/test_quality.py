"""Several metrics in one evaluation."""

from pathlib import Path

import pytest

from aicompress.pipeline.evaluation.quality import asked_quality, measure_quality
from aicompress.pipeline.step.models.running_model import Setting
from aicompress.recipe.evaluation import recipe_class
from tests import checkpoints


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    texts = checkpoints.sentences(40)
    rows = [f"{n % 6}\t{one}\t{other}" for n, (one, other) in enumerate(zip(texts[:20], texts[20:], strict=True))]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    return tmp_path / "pairs.tsv"


def test_progress_rises_over_all_metrics(tiny_bert: Path, heldout_file: Path, pairs_file: Path) -> None:
    quality = {
        "embedding": {"text": str(heldout_file), "samples": 50, "length": 64},
        "similarity": {"pairs": str(pairs_file), "columns": [1, 2], "score": 0, "length": 64},
    }
    model = Setting().start(str(tiny_bert))
    calls: list[tuple[str, int, int]] = []
    recipe = recipe_class().model_validate({"version": 1, "quality": quality})
    asked = asked_quality(recipe, [model, model])
    figures = measure_quality([model, model], asked, 0, lambda *call: calls.append(call))
    assert list(figures) == ["similarity", "similarity_agreement", "embedding_agreement", "embedding_cosine"]
    assert figures["similarity"]["baseline"] == figures["similarity"]["value"]
    assert figures["embedding_agreement"]["value"] == pytest.approx(1.0)
    assert [what for what, _, _ in calls] == ["similarity"] * 2 + ["embedding"] * 2
    shares = [done / total for _, done, total in calls]
    assert shares == [0, 0.25, 0.5, 0.75]
