from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from aicompress.data import Data, text_files, token_windows
from aicompress.errors import CheckpointError, RecipeError


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_windows_are_the_text_in_order(tokenizer: Any, text_file: Path) -> None:
    windows, source = token_windows(Data(text=str(text_file), length=32), tokenizer)
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    assert windows.dtype == torch.int64
    assert windows.shape == (len(ids) // 32, 32)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert source.samples == source.available == len(windows)


def test_without_a_seed_the_first_windows_are_taken(tokenizer: Any, text_file: Path) -> None:
    every, _ = token_windows(Data(text=str(text_file), length=32), tokenizer)
    first, _ = token_windows(Data(text=str(text_file), length=32, samples=5), tokenizer)
    assert torch.equal(first, every[:5])


def test_a_seed_gives_a_repeatable_choice_of_all_windows(tokenizer: Any, text_file: Path) -> None:
    data = Data(text=str(text_file), length=32, samples=6)
    every, _ = token_windows(data.model_copy(update={"samples": None}), tokenizer)
    chosen, source = token_windows(data, tokenizer, seed=11)
    again, _ = token_windows(data, tokenizer, seed=11)
    other, _ = token_windows(data, tokenizer, seed=12)
    assert torch.equal(chosen, again)
    assert not torch.equal(chosen, other)
    assert source.available == len(every)
    rows = [tuple(row) for row in every.tolist()]
    assert all(tuple(row) in rows for row in chosen.tolist())


def test_a_short_text_is_taken_whole_in_windows_as_long_as_it_allows(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one two three " * 20)
    count = len(tokenizer(path.read_text())["input_ids"])
    windows, source = token_windows(Data(text=str(path), length=32, samples=50), tokenizer)
    assert len(windows) == source.samples == source.available == count // 32
    assert source.asked == 50
    assert source.length is None
    for least in (1, 2):
        windows, source = token_windows(Data(text=str(path), length=4096), tokenizer, least=least)
        assert windows.shape == (least, count // least)
        assert source.length == count // least
    path.write_text("o")
    with pytest.raises(RecipeError, match="holds 1 tokens, too few"):
        token_windows(Data(text=str(path), length=4096), tokenizer)


def test_rows_are_divided_by_the_end_token(tokenizer: Any, table: dict[str, str]) -> None:
    windows, _ = token_windows(Data(**table, length=2), tokenizer)
    ids = windows.flatten().tolist()
    assert ids.count(tokenizer.eos_token_id) in (2, 3)  # the last one may fall into an incomplete window
    assert tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]) == "A first text, with a comma."


def test_rows_are_divided_by_an_empty_line_where_there_is_no_end_token(tokenizer: Any, table: dict[str, str]) -> None:
    tokenizer.eos_token = None
    windows, _ = token_windows(Data(**table, length=2), tokenizer)
    assert tokenizer.decode(windows.flatten()).startswith('A first text, with a comma.\n\nOne with "quotes".\n\n')


def test_a_long_text_is_read_in_pieces_and_only_as_far_as_needed(
    tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(text=str(text_file), length=32, samples=4)
    whole, all_of_it = token_windows(data, tokenizer)
    monkeypatch.setattr(text_files, "PIECE", 2000)
    pieces, read = token_windows(data, tokenizer)
    assert torch.equal(pieces, whole)
    assert read.available < all_of_it.available
    everything = "".join(text_files.pieces(text_file))
    assert everything == text_file.read_text()


def test_no_tokenizer_is_refused(text_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        token_windows(Data(text=str(text_file)), None)


CHAT = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A sequence."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def test_chats_are_written_with_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    called = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in CHAT]
    path.write_text(json.dumps([{"messages": CHAT}, {"messages": None}, {"messages": called}]))
    data = Data(jsonl=str(path), field="messages", length=2)
    with pytest.raises(CheckpointError, match="no chat template") as caught:
        token_windows(data, tokenizer)
    assert "messages.content" in caught.value.hint
    tokenizer.chat_template = TEMPLATE
    windows, source = token_windows(data, tokenizer)
    written = "<user>What is a list?\n<assistant>A sequence.\n" * 2
    assert tokenizer.decode(windows.flatten()) in (written, written[:-1])
    assert source.skipped == 1
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RecipeError, match="item 1: the chat template does not take these messages: roles must"):
        token_windows(data, tokenizer)


def test_windows_begin_as_the_tokenizer_begins_a_text(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    data = Data(text=str(text_file), length=32, samples=4)
    without, source = token_windows(data, tokenizer)
    assert source.bos == ""
    bos = tokenizer.bos_token
    start = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    for seed in (None, 5):
        windows, source = token_windows(data, tokenizer, seed)
        assert windows.shape == (4, 32)
        assert set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
        assert source.bos == bos
    windows, _ = token_windows(data, tokenizer)
    assert torch.equal(windows[:, 1:].flatten(), without.flatten()[: 4 * 31])  # no token of the text is lost
    off, source = token_windows(data.model_copy(update={"bos": False}), tokenizer)
    assert torch.equal(off, without)
    assert source.bos == ""
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}))
    chats, _ = token_windows(Data(jsonl=str(tmp_path / "chats.jsonl"), field="messages", length=8), tokenizer)
    assert chats[0].tolist().count(tokenizer.bos_token_id) == 1  # the template's own is not doubled
