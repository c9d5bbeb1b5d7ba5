"""Fixtures shared by every test: small real checkpoints and data, built once per session. Treat them as read-only."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.pop("COLUMNS", None)  # a parallel run sets it: tables would be cut to a terminal that is not there

import pytest
import torch

from tests import checkpoints

# Kernels that this processor cannot run have their tests in files of their own.
collect_ignore_glob = [] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["*_bfloat16.py"]

torch.set_num_threads(1)  # the models are tiny, and the suite itself runs on every core


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of what this test's dry runs keep."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the session's checkpoints."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="session")
def tiny_llama(built: Path) -> Path:
    """Random Llama, tied, fp32, with tokenizer: hidden 64, 3 layers, 4 heads on 2, intermediate 128, vocabulary 256."""
    return checkpoints.make_llama(built / "llama")


@pytest.fixture(scope="session")
def tiny_llama_untied(built: Path) -> Path:
    """The same with its own lm_head."""
    return checkpoints.make_llama(built / "llama-untied", tied=False)


@pytest.fixture(scope="session")
def tiny_llama_bf16(built: Path) -> Path:
    """The tied one in bfloat16, in several shards."""
    return checkpoints.make_llama(built / "llama-bf16", dtype=torch.bfloat16, shards=3)


@pytest.fixture(scope="session")
def trained_llama(built: Path) -> Path:
    """The tied one after 120 training steps: its loss means something, so quality can be compared."""
    return checkpoints.make_llama(built / "llama-trained", steps=120)


@pytest.fixture(scope="session")
def tiny_gpt2(built: Path) -> Path:
    return checkpoints.make_gpt2(built / "gpt2")


@pytest.fixture(scope="session")
def tiny_bert(built: Path) -> Path:
    """BertModel without prefix, with the side files of sentence-transformers."""
    return checkpoints.make_bert(built / "bert")


@pytest.fixture(scope="session")
def tiny_t5(built: Path) -> Path:
    return checkpoints.make_t5(built / "t5")


@pytest.fixture(scope="session")
def tiny_vit(built: Path) -> Path:
    return checkpoints.make_vit(built / "vit")


@pytest.fixture(scope="session")
def tiny_mixtral(built: Path) -> Path:
    """Random Mixtral: 2 blocks, 12 experts, 2 a token."""
    return checkpoints.make_mixtral(built / "mixtral", experts=12)


@pytest.fixture(scope="session")
def tiny_qwen_moe(built: Path) -> Path:
    """Random Qwen3-MoE: 2 blocks, 4 experts, 2 a token."""
    return checkpoints.make_qwen_moe(built / "qwen-moe")


@pytest.fixture(scope="session")
def mlp_file(built: Path) -> Path:
    """fc1, fc2, fc3 (784-300-100-10), trained on the digits."""
    torch.manual_seed(0)
    return checkpoints.make_file(built / "mlp.safetensors", checkpoints.learn(checkpoints.Mlp()))


@pytest.fixture(scope="session")
def cnn_file(built: Path) -> Path:
    """conv1, bn1, conv2, bn2, fc, trained on the digits."""
    torch.manual_seed(0)
    return checkpoints.make_file(built / "cnn.safetensors", checkpoints.learn(checkpoints.Cnn(), epochs=2))


@pytest.fixture(scope="session")
def lstm_file(built: Path) -> Path:
    """embed, lstm (two layers), fc; random."""
    torch.manual_seed(0)
    return checkpoints.make_file(built / "lstm.safetensors", checkpoints.Lstm())


@pytest.fixture(scope="session")
def text_file(built: Path) -> Path:
    """Six hundred English sentences, one per line."""
    path = built / "text.txt"
    path.write_text("\n".join(checkpoints.sentences(600)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def heldout_file(built: Path) -> Path:
    """Three hundred sentences that no fixture model was trained on."""
    path = built / "heldout.txt"
    path.write_text("\n".join(checkpoints.sentences(300, skip=1400)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def digits_npz(built: Path) -> Path:
    """train_images (1000, 28, 28) uint8, train_labels, test_images (400, 28, 28), test_labels."""
    return checkpoints.make_digits(built / "digits.npz")
