from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aicompress.checkpoint import Checkpoint
from scripts.bench.random_llama import TEXT, main, write


def test_it_loads_and_its_files_are_of_one_size(tmp_path: Path) -> None:
    count = write(tmp_path / "model", 3, hidden=64, vocabulary=600)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype is torch.bfloat16
    assert model.num_parameters() == count
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")((tmp_path / "model" / TEXT).read_text())["input_ids"]
    assert len(ids) > 16 * 512
    assert max(ids) < 600
    sizes = [file.stat().st_size for file in Checkpoint.open(tmp_path / "model").source.files]
    assert len(sizes) == 4
    assert max(sizes) < 3 * min(sizes)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists"):
        main(["--out", str(tmp_path)])
