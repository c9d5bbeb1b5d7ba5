"""The scripts of the LeNets: what stands still, what is not run again, and what a table says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from aicompress.model.loading.definitions.chain import module_for
from aicompress.recipe import Model
from scripts import encoder_records
from scripts.lenet.commands import Chain
from scripts.lenet.images import COPIES, deformed, training_file
from scripts.lenet.networks import NETWORKS, Classifier
from scripts.lenet.records import RECORDS, line
from scripts.reproduce_deep_compression import PAPERS, layers, table


def test_images_are_deformed_a_little_and_each_in_its_own_way() -> None:
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    images[:, 8:20, 12:16] = 200
    images[:, 8:10, 12:20] = 200
    moved = deformed(images, torch.Generator().manual_seed(0))
    assert moved.dtype is torch.uint8
    assert len({image.numpy().tobytes() for image in moved}) == len(moved)
    rows = (moved.float().sum(dim=2) * torch.arange(28)).sum(dim=1) / moved.float().sum(dim=(1, 2))
    centre = float((images[0].float().sum(dim=1) * torch.arange(28)).sum() / images[0].float().sum())
    assert float((rows - centre).abs().max()) < 3
    assert 0.9 < float(moved.float().sum() / images.float().sum()) < 1.1


def test_the_tool_runs_the_networks_that_are_trained(tmp_path: Path) -> None:
    for network in NETWORKS.values():
        model, path = Classifier(network).eval(), tmp_path / "network.safetensors"
        save_file(model.state_dict(), path)
        ours = module_for(path, Model(sequential=network.sequential)).to_empty(device="cpu")
        ours.load_state_dict(model.state_dict())
        images = torch.rand(2, 28, 28)
        assert torch.allclose(model(images), ours(images))


def test_the_last_training_images_are_for_validation(tmp_path: Path) -> None:
    count = 10_003
    images, labels = np.zeros((count, 8, 8), dtype=np.uint8), np.arange(count)
    images[:, 2:6, 3:5] = 9
    np.savez(tmp_path / "mnist.npz", train_images=images, train_labels=labels)
    with np.load(training_file(tmp_path / "mnist.npz", tmp_path)) as parts:
        assert parts["fit_labels"].tolist() == [0, 1, 2] * (1 + COPIES)
        assert (parts["fit_images"][:3] == images[:3]).all()
        assert parts["validation_images"].shape == (10_000, 8, 8)
        assert parts["validation_labels"].tolist() == list(range(3, count))


def test_a_step_whose_output_is_there_is_not_run(tmp_path: Path) -> None:
    chain = Chain("lenet-5", tmp_path / "nowhere.npz", tmp_path, 0)
    (tmp_path / "dense.safetensors").touch()
    (tmp_path / "pruned.safetensors").touch()
    assert chain.step("prune", chain.dense(), "pruned", "prune.yaml") == tmp_path / "pruned.safetensors"


def test_tables_count_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    weights = {f"{name}.weight": torch.zeros(4, 5) for name in PAPERS["lenet-300-100"].layers}
    weights["fc1.weight"][0, :3] = torch.tensor([1.0, 2.0, 3.0])
    save_file(weights, path)
    assert layers(path)["fc1"].kept == 3
    lines = table("lenet-300-100", [path], [(1.6, 1.5)])
    assert f"| 27,000 | {path.stat().st_size:,} |" in "\n".join(lines)
    record = RECORDS[0]
    assert "| met |" in line(record, [path], [record.most[0]])
    assert "| missed |" in line(record, [path], [math.nextafter(record.most[0], 2)])


def test_rows_of_an_encoder_are_met_by_bytes_and_by_what_is_lost() -> None:
    row = encoder_records.ROWS[0]
    figure = {"value": 0.867, "low": 0.85, "high": 0.88, "change": {"value": -0.002, "low": -0.004, "high": 0.001}}
    assert "| met |" in encoder_records.line(row, row.most[0], figure)
    assert "| missed |" in encoder_records.line(row, row.most[0] + 1, figure)
    figure["change"] = {"value": -0.0031, "low": -0.004, "high": 0.001}
    assert "| missed |" in encoder_records.line(row, row.most[0], figure)
