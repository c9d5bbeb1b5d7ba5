from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from scripts.bench import prune, quantize, streaming
from scripts.bench.encoder import pruned as sentences_pruned
from scripts.bench.encoder import rows as encoder
from scripts.bench.inputs import first_windows
from scripts.bench.measuring import Bench, Failed, filled, last_words, parameters
from scripts.bench.rows import Row, ours, unknown
from scripts.bench.running import Schedule, run_rows
from scripts.bench.store import Store
from tests.checkpoints import sentences

SHORT, LONG = Row("peer-short", "peer", "g", seconds=10), Row("peer-long", "peer", "g", seconds=1000, long=True)
MINE = ours("mine", "g", "quantize/rtn-w4", seconds=10)
ALL = (SHORT, LONG, MINE)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, Path("python"), 1, Store(tmp_path / "results.jsonl"), "1")


def schedule(minutes: float = 1e6, only: tuple[str, ...] = (), skip: bool = False, retry: bool = False) -> Schedule:
    return Schedule(3, 1, only, skip, minutes, retry, time.monotonic())


def test_a_run_goes_on_where_it_was_cut(bench: Bench) -> None:
    calls: list[str] = []

    def measure(row: Row) -> dict[str, object]:
        calls.append(row.key)
        return {"seconds": 1.0}

    run_rows([SHORT], bench, schedule(), measure, {})
    assert run_rows(ALL, bench, schedule(), measure, {}) == 0
    assert Counter(calls) == {"peer-short": 3, "peer-long": 1, "mine": 3}
    assert calls[3:] == ["peer-long", "mine", "mine", "mine"]


def test_rounds_take_turns(bench: Bench) -> None:
    calls: list[str] = []
    run_rows([SHORT, MINE], bench, schedule(), lambda row: calls.append(row.key) or {}, {})
    assert calls == ["peer-short", "mine"] * 3


def test_nothing_begins_that_would_not_end_in_time(bench: Bench) -> None:
    assert run_rows(ALL, bench, schedule(minutes=1), lambda row: {"seconds": 1.0}, {}) == 1
    assert {record.row for record in bench.store.records()} == {"peer-short", "mine"}


def test_what_failed_is_kept_and_tried_again_only_when_asked(bench: Bench) -> None:
    calls: list[str] = []

    def fails(row: Row) -> dict[str, object]:
        calls.append(row.key)
        raise Failed("no memory")

    for again in (False, False, True):
        run_rows([MINE], bench, schedule(retry=again), fails, {})
    assert len(calls) == 6
    assert {record.failed for record in bench.store.records()} == {"no memory"}


def test_rows_are_chosen_by_a_part_of_their_name_or_by_tool() -> None:
    assert schedule(only=("short", "aicompress")).chosen(ALL) == [SHORT, MINE]
    assert schedule(skip=True).chosen(ALL) == [SHORT, MINE]


def test_a_process_that_fails_says_why(bench: Bench) -> None:
    with pytest.raises(Failed, match="exit code 3: boom"):
        bench.run(["sh", "-c", "echo boom >&2; exit 3"])
    with pytest.raises(Failed, match="cannot be started"):
        bench.run([str(bench.folder / "absent")])
    assert last_words("warning\nerror: bad\nhint: good\n", 2) == "exit code 2: error: bad hint: good"


def test_threads_are_those_of_the_run(bench: Bench) -> None:
    assert bench.run(["sh", "-c", 'test "$OMP_NUM_THREADS" = 1']) > 0


def test_bytes_of_another_row_and_parameters_are_put_in(tiny_llama: Path) -> None:
    assert filled("method.target_bytes={bytes:gptq-w4}", {"gptq-w4": 7}, tiny_llama) == "method.target_bytes=7"
    with pytest.raises(Failed, match="gptq-w3 was not measured"):
        filled("method.target_bytes={bytes:gptq-w3}", {}, tiny_llama)
    total, blocks = parameters(tiny_llama)
    attention, forward = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 128
    assert blocks == 3 * (attention + forward)
    assert total == blocks + 256 * 64 + 7 * 64  # the embedding, and norms
    assert filled("{parameters:0.75}", {}, tiny_llama) == str(total - blocks // 4)


def test_the_calibration_text_holds_exactly_its_windows(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "\n".join(sentences(200))
    cut = first_windows(text, tokenizer, samples=4, length=32)
    whole, part = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, cut))
    assert 4 * 32 <= len(part) < 5 * 32
    assert part[: 4 * 32] == whole[: 4 * 32]
    with pytest.raises(SystemExit, match="are needed"):
        first_windows("Too short.", tokenizer, samples=4, length=32)


@pytest.mark.parametrize(
    "part", [quantize, prune, streaming, encoder, sentences_pruned], ids=lambda part: part.__name__
)
def test_rows_and_targets_name_rows_that_exist(part: object) -> None:
    assert not unknown(part.ROWS, part.TARGETS)
    assert len({row.key for row in part.ROWS}) == len(part.ROWS)
