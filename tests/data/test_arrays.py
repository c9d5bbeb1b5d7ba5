from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aicompress.data import Data, arrays
from aicompress.errors import RecipeError


def save(folder: Path, **named: Any) -> str:
    path = folder / "a.npz"
    np.savez(path, **named)
    return str(path)


def test_images_are_scaled_and_stay_with_their_labels(digits_npz: Path) -> None:
    data = Data(arrays=str(digits_npz), inputs="test_images", labels="test_labels", scale=255, samples=50)
    stored = np.load(digits_npz)
    for seed in (None, 3):
        images, labels, source = arrays(data, seed)
        assert images.shape == (50, 28, 28)
        assert images.dtype == torch.float32
        assert labels is not None
        assert labels.dtype == torch.int64
        assert 0 <= images.min() < images.max() <= 1
        assert (source.samples, source.available, source.seed) == (50, 400, seed)
        where = [np.flatnonzero((stored["test_images"] == (i.numpy() * 255).round()).all((1, 2)))[0] for i in images]
        assert labels.tolist() == stored["test_labels"][where].tolist()


def test_token_ids_stay_whole_numbers(tmp_path: Path) -> None:
    ids = np.array([[1, 2**31 + 5]], dtype=np.int64)
    inputs, labels, _ = arrays(Data(arrays=save(tmp_path, ids=ids), inputs="ids"))
    assert inputs.tolist() == ids.tolist()
    assert labels is None


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"x": np.array([{"a": 1}], dtype=object)}, "pickled objects, which are never loaded"),
        ({"x": np.ones((2, 3)) * np.nan}, "NaN"),
        ({"x": np.array(["a", "b"])}, "not samples of numbers"),
        ({"x": np.float32(3)}, "not samples of numbers"),
        ({"x": np.ones((0, 3))}, "holds no sample"),
        ({"x": np.ones((2, 3)), "y": np.ones(2)}, "not whole numbers"),
        ({"x": np.ones((2, 3)), "y": np.ones(3, dtype=int)}, "not whole numbers"),
    ],
)
def test_unusable_arrays_are_refused(named: dict[str, Any], words: str, tmp_path: Path) -> None:
    labels = "y" if "y" in named else None
    with pytest.raises(RecipeError, match=words):
        arrays(Data(arrays=save(tmp_path, **named), inputs="x", labels=labels))


def test_an_unknown_name_is_refused_with_the_nearest(digits_npz: Path) -> None:
    with pytest.raises(RecipeError, match="no array 'test_image'") as caught:
        arrays(Data(arrays=str(digits_npz), inputs="test_image"))
    assert caught.value.hint == "did you mean 'test_images'?"


def test_files_that_are_no_npz_are_refused(tmp_path: Path, digits_npz: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(3))
    contents = {"t.npz": b"plain text", "e.npz": b"", "cut.npz": digits_npz.read_bytes()[:5000]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "one.npy"):
        with pytest.raises(RecipeError, match=f"{name} is not an .npz file"):
            arrays(Data(arrays=str(tmp_path / name), inputs="x"))
    with pytest.raises(RecipeError, match="does not exist"):
        arrays(Data(arrays=str(tmp_path / "absent.npz"), inputs="x"))


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = Path(save(tmp_path, x=np.zeros((100, 100))))
    damaged = bytearray(path.read_bytes())
    damaged[40_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(RecipeError, match="is damaged: Bad CRC-32"):
        arrays(Data(arrays=str(path), inputs="x"))
