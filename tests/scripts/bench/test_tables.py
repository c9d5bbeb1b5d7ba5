from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.bench.rows import Row, Target, ours
from scripts.bench.store import Record, Store
from scripts.bench.tables import conditions, is_worse, ratios, rounds, section

RUN = Path(__file__).parent / "run.jsonl"
ROWS = (
    Row("peer-a", "peer", "4 bits"),
    ours("ours-a", "4 bits", "quantize/a", against=("peer-a",)),
    ours("ours-b", "4 bits", "quantize/b", against=("peer-a",)),
)
TARGETS = (
    Target("ours-a", "seconds", 0.5, "peer-a"),
    Target("ours-a", "kl", 1.0, "peer-a"),
    Target("ours-a", "peak_rss", 500e6),
    Target("ours-b", "kl", 0.002),
)


@pytest.fixture
def records() -> list[Record]:
    return Store(RUN).records("1")


def test_ratios_are_of_the_same_round_of_the_same_run(records: list[Record]) -> None:
    found = rounds(records)
    assert ratios(found["ours-a"], found["peer-a"], "seconds") == [0.4, 0.2]
    later = {9: found["ours-a"][1]}
    assert ratios(later, found["peer-a"], "seconds") == [0.25]  # no round in common: of the medians
    assert ratios(found["ours-a"], {}, "seconds") == []


def test_a_row_is_the_median_of_its_rounds_with_least_and_greatest(records: list[Record]) -> None:
    text = section("All", ROWS, records, TARGETS)
    assert "| peer-a | peer | 16.0 (10.0 to 20.0) | 800 | 7.50 | 0.0023 | 48.03 | 0.9655 | 3 |  |" in text
    assert "| ours-a | **aicompress** | 4.00 | 400 | 7.60 | 0.0030 | 48.04 | 0.9600 | 2 |  |" in text
    assert "process s" not in text  # no row has it


def test_what_is_lost_is_said(records: list[Record]) -> None:
    text = section("All", ROWS, records, TARGETS)
    assert "| ours-a | peer-a | 0.30 | 0.50 | **1.01** | **1.30** | 1.00 |" in text
    assert "- ours-a against peer-a: weights MB 1.01 ×, KL 1.30 ×, top-1 agreement 0.99 ×\n" in text
    assert "- ours-b (aicompress): exit code 2: error: no such method\n" in text


def test_every_target_has_a_verdict(records: list[Record]) -> None:
    text = section("All", ROWS, records, TARGETS)
    assert "| ours-a | seconds | ≤ 0.5 × peer-a | 0.3 × | met |" in text
    assert "| ours-a | kl | ≤ 1 × peer-a | 1.304 × | **missed** |" in text
    assert "| ours-a | peak_rss | ≤ 5e+08 | 4e+08 | met |" in text
    assert "| ours-b | kl | ≤ 0.002 |  | not measured |" in text


def test_nothing_measured_gives_targets_alone() -> None:
    text = section("All", ROWS, [], TARGETS)
    assert "### 4 bits" not in text
    assert text.count("not measured") == len(TARGETS)


@pytest.mark.parametrize(
    ("ratio", "lower", "worse"),
    [
        (1.0, True, False),
        (1.004, True, False),
        (1.1, True, True),
        (0.9, False, True),
        (1.1, False, False),
        (9, None, False),
    ],
)
def test_half_a_percent_is_no_difference(ratio: float, lower: bool | None, worse: bool) -> None:
    assert is_worse(ratio, lower) == worse


def test_conditions_name_every_machine_once(records: list[Record]) -> None:
    assert conditions(records) == "Measured with cpu A, threads 2."
    assert len(conditions(Store(RUN).records()).splitlines()) == 2


def test_a_line_that_was_cut_short_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    store = Store(Path(shutil.copy(RUN, tmp_path / "results.jsonl")))
    store.path.write_bytes(store.path.read_bytes().rstrip(b"\n"))
    before = len(store.records())
    store.add(Record("1", "ours-a", 3, {"seconds": 5.0}))
    assert len(store.records()) == before + 1
    assert store.records()[-1].figures == {"seconds": 5.0}


def test_of_a_measurement_made_again_the_last_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    store.add(Record("1", "a", 1, {}, "failed"))
    store.add(Record("1", "a", 1, {"seconds": 1.0}))
    assert [record.failed for record in store.records("1")] == [""]


def test_the_same_weights_are_judged_once() -> None:
    store = Store(RUN)
    assert store.quality("bb", {"text": "t"}, ["kl", "top1"]) == {"kl": 0.003, "top1": 0.96}
    assert store.quality("bb", {"text": "other"}, ["kl"]) is None
    assert store.quality("bb", {"text": "t"}, ["kl", "spearman"]) is None
