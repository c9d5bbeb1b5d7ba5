"""Values that cannot be, in recipes, configurations and reports, are refused in a clear line; none is a defect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calls import Call, refused

STEP = ["-r", "quantize/rtn-w8", "--latency", "off"]
GPTQ = ["-r", "quantize/gptq-w4", "--latency", "off"]


@pytest.mark.parametrize(
    "value",
    ["!!int x", "!!bool maybe", "!!float x", "2024-99-99", "9" * 5000, "!!timestamp x", "!!binary é", "!!omap 3"],
)
def test_values_that_yaml_cannot_make(call: Call, tmp_path: Path, mlp_file: Path, value: str) -> None:
    (tmp_path / "r.yaml").write_text(f"version: 1\nmethod: {{name: rtn}}\nseed: {value}\n")
    message = refused(call("quantize", mlp_file, tmp_path / "o", "-r", tmp_path / "r.yaml"))
    assert "r.yaml is not YAML at line 3" in message
    message = refused(call("quantize", mlp_file, tmp_path / "o", "-r", "quantize/rtn-w8", "--set", f"seed={value}"))
    assert "--set seed" in message
    assert len(message) < 300


@pytest.mark.parametrize("command", ["eval", "distill"])
def test_every_recipe_has_to_be_text(call: Call, tmp_path: Path, mlp_file: Path, command: str) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    places = [mlp_file] if command == "eval" else [mlp_file, tmp_path / "o.safetensors", "-t", mlp_file]
    assert "cannot be read as text" in refused(call(command, *places, "-r", tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "edit",
    ["rules.²=1", "rules.١=1", "tune=[1]", "tune=1", "calibration=[1]", 'calibration.text="a\\0b"', "method.bits=[4]"],
)
def test_edits_that_cannot_be(call: Call, tmp_path: Path, mlp_file: Path, edit: str) -> None:
    recipe = ["-r", "quantize/gptq-w4", "--effort", "best", "--set", "rules=[]", "--set", edit]
    result = call("quantize", mlp_file, tmp_path / "o.safetensors", *recipe)
    assert (result[0], result[1]) == (2, "")
    assert "defect" not in result[2]


def test_a_home_is_found_where_a_shell_has_not_looked(
    call: Call, tmp_path: Path, mlp_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(mlp_file, tmp_path / "in.safetensors")
    (tmp_path / "r.yaml").write_text("version: 1\nmethod: {name: rtn, bits: 8, granularity: channel}\n")
    assert call("quantize", "~/in.safetensors", "~/o/o.safetensors", "-r", "~/r.yaml", "--latency", "off")[0] == 0
    assert call("compare", "~/o/o.report.json", "--html", "~/page.html")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "o", "page.html", "r.yaml"]
    (tmp_path / "eval.yaml").write_text("version: 1\nquality: {perplexity: {text: ~/text.txt}}\n")
    assert f"{tmp_path}/text.txt does not exist" in refused(call("eval", "~/in.safetensors", "-r", "~/eval.yaml"))
    edit = ["--set", "quality.perplexity.text=~/other.txt"]
    assert f"{tmp_path}/other.txt" in refused(call("eval", "~/in.safetensors", "-r", "~/eval.yaml", *edit))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"architectures": 5}),
        ("config.json", {"architectures": [5]}),
        ("config.json", {"model_type": []}),
        ("config.json", {"auto_map": "x"}),
        ("aicompress.json", {"format_version": 1, "lineage": [5]}),
        ("aicompress.json", {"format_version": 1, "lineage": {"a": 1}}),
        ("aicompress.json", {"format_version": [], "lineage": []}),
    ],
)
def test_descriptions_of_a_checkpoint(
    call: Call, tmp_path: Path, tiny_llama: Path, file: str, change: dict[str, Any]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "in")
    place = tmp_path / "in" / file
    plain = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps({**plain, **change}))
    for command in (["inspect"], ["eval", "-r", "eval/size-and-speed"]):
        assert file in refused(call(command[0], tmp_path / "in", *command[1:]))
    code, out, err = call("verify", tmp_path / "in")
    assert code == 2
    assert file in out + err
    refused(call("quantize", tmp_path / "in", tmp_path / "out", *STEP))
    assert not (tmp_path / "out").exists()


def test_steps_that_say_little_are_shown(call: Call, tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "in")
    steps = [{}, {"recipe": 5}, {"recipe": {"method": []}}]
    (tmp_path / "in" / "aicompress.json").write_text(json.dumps({"format_version": 1, "lineage": steps}))
    assert call("inspect", tmp_path / "in")[0] == 0
    assert call("quantize", tmp_path / "in", tmp_path / "out", *STEP)[0] == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["garbage", "[]", '{"version": 5}', '{"temperature": [], "added_tokens": 5}'])
def test_files_beside_a_model(
    call: Call, tmp_path: Path, tiny_llama: Path, text_file: Path, name: str, content: str
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "in")
    (tmp_path / "in" / name).write_text(content)
    data = f"{{text: {text_file}, samples: 2, length: 16}}"
    (tmp_path / "r.yaml").write_text(f"version: 1\nquality: {{perplexity: {data}}}\n")
    code, _, err = call("eval", tmp_path / "in", "-r", tmp_path / "r.yaml", "--quiet")
    assert code in (0, 2)  # transformers reads over some of it
    assert "defect" not in err
    if content == "garbage":
        assert code == 2


def test_a_recipe_for_another_kind_of_model(call: Call, tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    lines = ["--set", f"quality.embedding.text={text_file}", "--set", "quality.embedding.samples=4"]
    places = ["eval", tiny_llama, "--against", tiny_llama, "-r", "eval/sentence-encoder", "--set", "latency=null"]
    refused(call(*places, *lines, "--quiet"))


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(after=5),
        lambda report: report.update(seconds="1"),
        lambda report: report.update(quality=[]),
        lambda report: report.update(recipe=5),
        lambda report: report.update(environment=[]),
        lambda report: report.update(command=None),
        lambda report: report.update(layers=5),
        lambda report: report.update(lineage=[5]),
        lambda report: report.update(schema_version=True),
        lambda report: report["after"].update(weight_bytes="1"),
        lambda report: report["after"].update(parameters=None),
        lambda report: report["after"].update(path=5),
        lambda report: report["before"].update(sha256={"a": []}),
        lambda report: report["before"].update(sha256=[]),
        lambda report: report["before"].update(weight_bytes=[]),
        lambda report: report["latency"].update(before_ms="x"),
        lambda report: report.update(quality={"kl": {"value": {}, "n": []}, "x": []}),
    ],
)
def test_reports_with_other_types(call: Call, tmp_path: Path, change: Change) -> None:
    side = {"path": "a", "bytes": 1, "weight_bytes": 1, "parameters": 1, "by_kind": {}, "sha256": {}}
    latency = {"what": "", "before_ms": 1.0, "after_ms": 1, "before_p95_ms": 1, "after_p95_ms": 1, "rounds": 3}
    report: dict[str, Any] = {
        "schema_version": 1, "command": "eval", "tool_version": "0", "before": {**side}, "after": {**side},
        "layers": [], "latency": latency, "quality": {}, "training": {}, "warnings": [], "gates": [],
        "environment": {}, "recipe": {}, "lineage": [], "seconds": 1.0, "peak_rss": 1,
    }  # fmt: skip
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert call("compare", file, file, "--html", tmp_path / "a.html")[0] == 0
    change(report)
    file.write_text(json.dumps(report))
    code, out, err = call("compare", file, file, "--html", tmp_path / "b.html")
    if code or "kl" not in report["quality"]:
        assert "report.json" in refused((code, out, err))


def test_a_report_that_is_no_text(call: Call, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00{")
    assert "report.json cannot be read: it is not UTF-8 text" in refused(call("compare", tmp_path / "report.json"))


def test_a_data_file_that_is_no_text(call: Call, tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a line\n\x00\x00\n")
    untimed = ["-r", "eval/language-model", "--set", "latency=null", "--quiet"]
    for command in (["eval", tiny_llama, *untimed], ["quantize", tiny_llama, tmp_path / "o", *GPTQ]):
        message = refused(call(*command, "--text", tmp_path / "a.txt"))
        assert message.endswith("a.txt, line 2: holds NUL characters, so it is no text")
    assert not (tmp_path / "o").exists()


def test_drawn_tokens_stand_in_the_place_of_a_text(call: Call, tmp_path: Path, tiny_llama: Path) -> None:
    short = [*GPTQ, "--set", "calibration.length=16", "--set", "method.group_size=16"]
    code, out, err = call("quantize", tiny_llama, tmp_path / "o", *short, "--drawn", "3", "--json")
    assert code == 0, err
    (drawn,) = json.loads(out)["calibration"]["data"]
    assert (drawn["kind"], drawn["path"], drawn["samples"]) == ("drawn", "merge ranks of the tokenizer", 3)
    (tmp_path / "a.txt").write_text("a little text, and no more than this; " * 9)
    both = [*short, "--drawn", "3", "--text", tmp_path / "a.txt"]
    code, out, err = call("quantize", tiny_llama, tmp_path / "both", *both, "--json")
    assert code == 0, err
    assert [source["kind"] for source in json.loads(out)["calibration"]["data"]] == ["text", "drawn"]
    arrays = ["-r", "prune/channels-cnn", "--set", "calibration.arrays=a.npz", "--drawn", "3"]
    assert "calibration reads arrays" in refused(call("prune", tiny_llama, tmp_path / "p", *arrays))
