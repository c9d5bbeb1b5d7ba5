from __future__ import annotations

from pathlib import Path

import pytest

from aicompress.cli.app import app
from scripts.bench import mnist


def test_lines_of_a_network_begin_with_the_network_as_it_is() -> None:
    resnet, mlp = mnist.jobs("resnet", [0.3, 0.5], []), mnist.jobs("mlp", [0.5], ["taylor"])
    assert len(resnet) == 1 + 2 * len(mnist.JOBS)
    assert mlp == [(0.0, "l2", "nothing"), (0.5, "taylor", "nothing"), (0.5, "taylor", "norms and fit")]


def test_the_table_holds_accuracy_and_size_of_what_is_left(
    tmp_path: Path, digits_npz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mnist, "aicompress", lambda *words: app(list(words), standalone_mode=False))
    given = ["--data", str(digits_npz), "--folder", str(tmp_path), "--network", "mlp"]
    mnist.main([*given, "--sparsity", "0.5", "--score", "taylor"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| mlp")]
    whole, bare, fitted = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert whole[1:5] == ["0%", "-", "-", "266,610"]  # 784 x 300, 300 x 100, 100 x 10 and their biases
    assert bare[1:5] == ["50%", "taylor", "nothing", "125,810"]  # 784 x 150, 150 x 50, 50 x 10
    assert fitted[3] == "norms and fit"
    accuracy = [float(cells[6].split()[0]) for cells in (whole, bare, fitted)]
    assert accuracy[0] > 80
    assert accuracy[2] > 60
    assert all("-" in cells[6] and float(cells[7]) > 0 for cells in (whole, bare, fitted))
