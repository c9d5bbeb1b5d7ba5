"""Records of equal code are equal, and what differs is named."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from scripts.output_digests.__main__ import CONFIGS, PATH_LENGTH, call, compare, main, working_folder
from scripts.output_digests.digests import comparable, differences, digests
from scripts.output_digests.runs import LEFT_OUT, STEPS, Run, all_runs, needs, selected


@functools.cache
def runs() -> dict[str, Run]:
    """Every run by name; its recipes are read once."""
    return all_runs(CONFIGS)


def test_two_records_are_equal_and_a_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two recipes for a bare file: it records the path of its calibration data in its header."""
    first, second, other = (tmp_path / f"{name}.json" for name in ("first", "second", "other"))
    main(["--out", str(first), "--only", "prune/channels-mlp*"])
    record = json.loads(first.read_text())
    assert record["runs"].keys() == {"prune/channels-mlp", "prune/channels-mlp-taylor"}
    for run in record["runs"].values():
        assert run["files"].keys() == {"out.safetensors"}
        assert "error" not in run

    changed = json.loads(first.read_text())
    changed["runs"]["prune/channels-mlp"]["files"]["out.safetensors"] = "0" * 64
    other.write_text(json.dumps(changed))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(second), "--only", "prune/channels-mlp*", "--against", str(other)])
    assert stop.value.code == 1
    assert capsys.readouterr().out.endswith(" s\nchanged  runs: prune/channels-mlp: files: out.safetensors\n")
    assert json.loads(second.read_text()) == record
    assert compare(first, record) == []
    assert capsys.readouterr().out == f"2 runs as in {first}\n"


def test_every_recipe_is_run_or_left_out_with_a_reason() -> None:
    recipes = {f"{step}/{path.stem}" for step in STEPS for path in (CONFIGS / step).glob("*.yaml")}
    assert recipes == LEFT_OUT.keys() | {run.recipe for run in runs().values() if run.name == run.recipe}
    assert all(LEFT_OUT.values())


def test_runs_come_after_those_that_they_read() -> None:
    order = list(runs())
    for name, others in needs(runs()).items():
        assert all(order.index(other) < order.index(name) for other in others)
    assert set(selected(runs(), "chain/quantize")) == {"prune/width-20", "chain/factorize", "chain/quantize"}
    assert set(selected(runs(), "prune/movement-50")) == {"prune/width-20", "distill/kl", "prune/movement-50"}
    assert selected(runs(), "absent") == {}


def test_reports_are_left_out_and_source_is_only_noted(tmp_path: Path) -> None:
    for name in (
        "out/report.json",
        "out.report.html",
        "out/model.safetensors",
        "out/modeling.py",
        "out/my_report.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = digests(tmp_path, tmp_path)
    assert found.keys() == {"out/model.safetensors", "out/modeling.py", "out/my_report.json"}
    assert found["out/modeling.py"] == "source"
    assert len({*found.values()}) == 3


def test_versions_and_the_working_folder_do_not_count() -> None:
    def text(version: str, folder: str, digest: str, samples: int = 8) -> bytes:
        lineage = {"tool": f"aicompress {version}", "recipe": {"text": f"{folder}/text.txt", "samples": samples}}
        return json.dumps(json.dumps({**lineage, "recipe_sha256": digest})).encode()

    one = comparable(text("0.1.0", "/tmp/one", "a" * 64), Path("/tmp/one"))
    assert one == comparable(text("0.2.0", "/tmp/two", "b" * 64), Path("/tmp/two"))
    assert one != comparable(text("0.1.0", "/tmp/one", "a" * 64, samples=9), Path("/tmp/one"))
    elsewhere = [text("0.1.0", "/data", digest * 64) for digest in "ab"]
    assert comparable(elsewhere[0], Path("/tmp/one")) != comparable(elsewhere[1], Path("/tmp/one"))


def test_differences_name_what_is_changed_missing_and_new() -> None:
    before = {"runs": {"a": {"files": {"x": "1", "y": "2"}}}, "same": [1.0]}
    after = {"runs": {"a": {"files": {"x": "3", "z": "2"}}}, "same": [1.0]}
    lines = ["changed  runs: a: files: x", "missing  runs: a: files: y", "new      runs: a: files: z"]
    assert differences(before, after) == lines
    assert differences(before, before) == []


def test_the_path_of_the_working_folder_has_one_length(tmp_path: Path) -> None:
    (tmp_path / "longer").mkdir()
    assert {len(str(working_folder(str(path)))) for path in (tmp_path, tmp_path / "longer")} == {PATH_LENGTH}


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    message = call(["quantize", str(tmp_path / "absent"), str(tmp_path / "out"), "-r", "quantize/rtn-w8"])
    assert message.startswith("exit code 2: error: ")
    assert "absent" in message
    assert call(["--version"]) == ""


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run is named 'absent'"):
        main(["--out", str(tmp_path / "out.json"), "--only", "absent"])
    with pytest.raises(SystemExit, match=r"absent\.json does not exist"):
        main(["--out", str(tmp_path / "out.json"), "--against", str(tmp_path / "absent.json")])
