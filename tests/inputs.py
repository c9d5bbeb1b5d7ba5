"""Small real checkpoints and data, each made once for all workers of a run of the tests. Treat them as read-only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import checkpoints, processes


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the session's checkpoints, which all workers have."""
    return processes.shared(tmp_path_factory, "built")


def written(path: Path, lines: list[str]) -> Path:
    """A text file of these lines."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def once(path: Path, make: Callable[[Path], Path]) -> Path:
    """A file or folder that the first worker to ask for it makes."""
    with processes.one_at_a_time(path.with_name(f"{path.name}.lock")):
        return path if path.exists() else make(path)


@pytest.fixture(scope="session")
def tiny_llama(built: Path) -> Path:
    """Random Llama, tied, fp32, with tokenizer: hidden 64, 3 layers, 4 heads on 2, intermediate 128, vocabulary 256."""
    return once(built / "llama", checkpoints.make_llama)


@pytest.fixture(scope="session")
def tiny_llama_untied(built: Path) -> Path:
    """The same with its own lm_head."""
    return once(built / "llama-untied", lambda path: checkpoints.make_llama(path, tied=False))


@pytest.fixture(scope="session")
def tiny_llama_bf16(built: Path) -> Path:
    """The tied one in bfloat16, in several shards."""
    return once(built / "llama-bf16", lambda path: checkpoints.make_llama(path, dtype=torch.bfloat16, shards=3))


@pytest.fixture(scope="session")
def trained_llama(built: Path) -> Path:
    """The tied one after 120 training steps: its loss means something, so quality can be compared."""
    return once(built / "llama-trained", lambda path: checkpoints.make_llama(path, steps=120))


@pytest.fixture(scope="session")
def tiny_gpt2(built: Path) -> Path:
    return once(built / "gpt2", checkpoints.make_gpt2)


@pytest.fixture(scope="session")
def tiny_bert(built: Path) -> Path:
    """BertModel without prefix, with the side files of sentence-transformers."""
    return once(built / "bert", checkpoints.make_bert)


@pytest.fixture(scope="session")
def tiny_t5(built: Path) -> Path:
    return once(built / "t5", checkpoints.make_t5)


@pytest.fixture(scope="session")
def tiny_vit(built: Path) -> Path:
    return once(built / "vit", checkpoints.make_vit)


@pytest.fixture(scope="session")
def tiny_mixtral(built: Path) -> Path:
    """Random Mixtral: 2 blocks, 12 experts, 2 a token."""
    return once(built / "mixtral", lambda path: checkpoints.make_mixtral(path, experts=12))


@pytest.fixture(scope="session")
def tiny_qwen_moe(built: Path) -> Path:
    """Random Qwen3-MoE: 2 blocks, 4 experts, 2 a token."""
    return once(built / "qwen-moe", checkpoints.make_qwen_moe)


@pytest.fixture(scope="session")
def mlp_file(built: Path) -> Path:
    """fc1, fc2, fc3 (784-300-100-10), trained on the digits."""
    torch.manual_seed(0)
    return once(built / "mlp.safetensors", lambda at: checkpoints.make_file(at, checkpoints.learn(checkpoints.Mlp())))


@pytest.fixture(scope="session")
def cnn_file(built: Path) -> Path:
    """conv1, bn1, conv2, bn2, fc, trained on the digits."""
    torch.manual_seed(0)
    learnt = functools.partial(checkpoints.learn, epochs=2)
    return once(built / "cnn.safetensors", lambda at: checkpoints.make_file(at, learnt(checkpoints.Cnn())))


@pytest.fixture(scope="session")
def lstm_file(built: Path) -> Path:
    """embed, lstm (two layers), fc; random."""
    torch.manual_seed(0)
    return once(built / "lstm.safetensors", lambda path: checkpoints.make_file(path, checkpoints.Lstm()))


@pytest.fixture(scope="session")
def text_file(built: Path) -> Path:
    """A hundred and eighty English sentences, one per line."""
    return once(built / "text.txt", lambda path: written(path, checkpoints.sentences(180)))


@pytest.fixture(scope="session")
def heldout_file(built: Path) -> Path:
    """Three hundred sentences that no fixture model was trained on."""
    return once(built / "heldout.txt", lambda path: written(path, checkpoints.sentences(300, skip=1400)))


@pytest.fixture(scope="session")
def digits_npz(built: Path) -> Path:
    """train_images (1000, 28, 28) uint8, train_labels, test_images (400, 28, 28), test_labels."""
    return once(built / "digits.npz", checkpoints.make_digits)
