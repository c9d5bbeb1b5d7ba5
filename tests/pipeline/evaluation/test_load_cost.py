import os
from pathlib import Path

import pytest

from aicompress.data import Data
from aicompress.errors import Refused
from aicompress.measure import peak_rss
from aicompress.pipeline.evaluation.load_cost import evict, footprint
from aicompress.pipeline.step.input import Adapted
from aicompress.pipeline.step.models.running_model import Setting
from aicompress.recipe import Model
from tests import checkpoints
from tests.checkpoint.test_adapters import GATE, pair, save_adapter


def test_a_directory_is_loaded_and_run_in_its_own_process(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora", pair(GATE, 128, 64))
    found = footprint(Adapted(tiny_llama, ((str(adapter), 0.5),)), Setting())
    assert 0 < found.warm_seconds < 60
    assert 0 < found.cold_seconds < 60
    assert 30e6 < found.idle_rss <= found.peak_rss
    assert found.ran


def test_a_bare_file_runs_on_the_recipes_arrays(mlp_file: Path, digits_npz: Path) -> None:
    model = Model(sequential=("flatten", "fc1", "relu", "fc2", "relu", "fc3"))
    data = Data(arrays=str(digits_npz), inputs="test_images", labels="test_labels", scale=255)
    assert footprint(Adapted(mlp_file), Setting(model), (8, 1), data).ran


def test_peak_memory_is_that_of_the_checkpoint_not_of_this_process(tmp_path: Path, tiny_llama: Path) -> None:
    """A model of 100 MB more shows, whatever this process has held before."""
    held = bytearray(800_000_000)
    held[::4096] = b"x" * len(held[::4096])
    del held
    large = checkpoints.make_llama(tmp_path / "large", intermediate_size=40_000)  # 3 x 3 x 64 x 40,000 x 4 B = 92 MB
    small_peak = footprint(Adapted(tiny_llama), Setting()).peak_rss
    large_peak = footprint(Adapted(large), Setting()).peak_rss
    assert peak_rss() > 800_000_000
    assert small_peak < 800_000_000
    assert 70e6 < large_peak - small_peak < 250e6


def test_what_fails_there_is_said_here(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(Refused, match="not a complete safetensors file"):
        footprint(Adapted(tmp_path / "broken.safetensors"), Setting())


def test_files_can_be_evicted(mlp_file: Path) -> None:
    assert evict(str(mlp_file)) == hasattr(os, "posix_fadvise")
