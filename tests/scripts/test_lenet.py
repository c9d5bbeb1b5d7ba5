"""The scripts of the LeNets: what stands still, what is not run again, and what a table says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from aicompress.model.loading.chain import module_for
from aicompress.recipe import Model
from scripts.lenet.commands import Chain, split_file
from scripts.lenet.networks import NETWORKS, Classifier, shifted
from scripts.lenet.records import RECORDS, line
from scripts.reproduce_deep_compression import PAPERS, layers, table


def test_images_move_as_a_whole() -> None:
    images = torch.zeros(50, 28, 28)
    images[:, 10:12, 14] = torch.tensor([1.0, 2.0])
    moved = shifted(images, torch.Generator().manual_seed(0))
    places = {(int(image.nonzero()[0][0]), int(image.nonzero()[0][1])) for image in moved}
    assert all(image[image > 0].tolist() == [1.0, 2.0] for image in moved)
    assert len(places) > 10
    assert {abs(row - 10) for row, _ in places} | {abs(column - 14) for _, column in places} == {0, 1, 2}


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
    images, labels = np.zeros((count, 2, 2), dtype=np.uint8), np.arange(count)
    np.savez(tmp_path / "mnist.npz", train_images=images, train_labels=labels)
    with np.load(split_file(tmp_path / "mnist.npz", tmp_path)) as parts:
        assert parts["fit_labels"].tolist() == [0, 1, 2]
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
