"""Models that transformers makes of a config.json."""

from __future__ import annotations

import pytest
import transformers as hf

from aicompress.errors import CheckpointError
from aicompress.model.loading.definitions.definition import new_skeleton

FALCON = {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


def test_a_class_that_transformers_cannot_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**FALCON, "architectures": ["FalconModel"]}
    assert new_skeleton(config) is not None
    monkeypatch.setattr(hf.FalconModel, "post_init", lambda model: None)  # as where a constructor does not call it
    with pytest.raises(CheckpointError, match="transformers cannot load FalconModel"):
        new_skeleton(config)
