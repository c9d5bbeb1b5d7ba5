"""What a user does wrong gives one clear line and an exit code; nothing else reaches the terminal or the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aicompress.checkpoint.place import working_path
from aicompress.cli.app import app
from aicompress.cli.boundary import run
from aicompress.errors import CheckpointError, CompressError, Problems, RecipeError, Refused
from tests.cli.calls import Call, refused


def damaged(name: str, mlp: Path, folder: Path) -> Path:
    """A bad input."""
    path = folder / "in" / f"{name}.safetensors"
    path.parent.mkdir()
    sound = mlp.read_bytes()
    if name in ("nan", "inf"):
        tensors = load_file(mlp)
        tensors["fc1.weight"][0, 0] = float(name)
        save_file(tensors, path)
        return path
    lying = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(
        {
            "truncated": sound[:-10],
            "cut-header": sound[:50],
            "empty": b"",
            "lying": struct.pack("<Q", len(lying)) + lying,
            "noise": bytes(range(256)),
        }[name]
    )
    return path


@pytest.mark.parametrize("name", ["truncated", "cut-header", "empty", "lying", "noise", "nan", "inf"])
def test_bad_files_are_refused_and_nothing_is_left(call: Call, tmp_path: Path, mlp_file: Path, name: str) -> None:
    source = damaged(name, mlp_file, tmp_path)
    message = refused(call("quantize", source, tmp_path / "out" / "o.safetensors", "-r", "quantize/rtn-w8"))
    assert name in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ("version: 1\nmethod: {name: rtm}", "no method 'rtm'"),
        ("version: 1\nmethod: {name: rtn, bitz: 4}", "bitz"),
        ("version: 1\nmethod: {name: rtn, bits: 5}", "bits"),
        ("version: 1\nmethod: {name: rtn}\nselekt: {}", "selekt"),
        ("version: 2\nmethod: {name: rtn}", "version"),
        ("method: {name: rtn}", "version"),
        ("version: 1", "method.name is missing"),
        ("version: 1\nversion: 1\nmethod: {name: rtn}", "given twice"),
        ("version: 1\nmethod: {name: rtn}\n? [a]\n: b", "a key is a list"),
        ("version: 1\nmethod: {name: !!python/object/apply:os.system [true]}", "not YAML"),
        ("version: 1\nmethod: [", "not YAML"),
        ("[1, 2]", "not a recipe"),
        ("", "not a recipe"),
        ("[" * 1000, "recipe.yaml"),
        ("version: 1\nmethod: {name: svd, keep: 0.5}", "no method 'svd'"),
        ("version: 1\nmethod: {name: rtn}\nselect: {include: [nothing]}", "matches no layer"),
        ("version: 1\nmethod: {name: rtn, granularity: group, group_size: 7}", "does not divide"),
        ("version: 1\nmethod: {name: rtn, granularity: channel}\ngates: ['size.ratio < x']", "size.ratio"),
    ],
)
def test_bad_recipes_are_refused(call: Call, tmp_path: Path, mlp_file: Path, recipe: str, part: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = call("quantize", mlp_file, tmp_path / "o.safetensors", "-r", tmp_path / "recipe.yaml")
    assert result[0] == 2, result
    assert result[1] == ""
    assert part in result[2]
    assert result[2].startswith("error: ")
    assert "Traceback" not in result[2]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc"])
def test_a_recipe_that_is_no_text_is_refused(call: Call, tmp_path: Path, mlp_file: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert "r.yaml" in refused(call("quantize", mlp_file, tmp_path / "o.safetensors", "-r", tmp_path / "r.yaml"))
    assert "rtn-w8" in call("quantize", mlp_file, tmp_path / "o.safetensors", "-r", "quantize/rtn-w9")[2]


@pytest.mark.parametrize(
    "edit", ["method.bits", "=3", "rules.9.bits=3", "version.x=1", "method.bits=[", "select.include.x=fc1"]
)
def test_bad_overrides_are_refused(call: Call, tmp_path: Path, mlp_file: Path, edit: str) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nmethod: {name: rtn}\nselect: {include: [fc1]}\nrules: []")
    result = call("quantize", mlp_file, tmp_path / "o.safetensors", "-r", tmp_path / "r.yaml", "--set", edit)
    assert (result[0], result[1]) == (2, "")
    assert result[2].startswith("error: --set")


def test_overrides_edit_the_recipe(call: Call, tmp_path: Path, mlp_file: Path) -> None:
    out = tmp_path / "o.safetensors"
    edits = ["--set", "method.bits=3", "--set", "method.granularity=channel", "--set", "select.include=[fc2]"]
    code, text, _ = call("quantize", mlp_file, out, "-r", "quantize/rtn-w4", *edits, "--dry-run", "--json")
    assert code == 0
    assert json.loads(text)["method"]["bits"] == 3
    assert [row["name"] for row in json.loads(text)["rows"]] == ["fc2"]
    assert not out.exists()


def test_a_taken_output_is_refused_and_kept(call: Call, tmp_path: Path, mlp_file: Path) -> None:
    out = tmp_path / "o.safetensors"
    out.write_bytes(b"mine")
    step = ("quantize", mlp_file, out, "-r", "quantize/rtn-w8", "--latency", "off")
    assert "exists" in refused(call(*step))
    assert f"did not write {out}" in refused(call(*step, "--overwrite"))
    assert out.read_bytes() == b"mine"
    out.unlink()
    assert call(*step)[0] == 0
    assert "exists" in refused(call(*step))
    assert call(*step, "--overwrite")[0] == 0
    assert load_file(out)


def test_overwriting_replaces_what_a_run_wrote_and_nothing_else(
    call: Call, tmp_path: Path, mlp_file: Path, heldout_file: Path
) -> None:
    out, quiet = tmp_path / "out", ("--overwrite", "-q", "--latency", "off")
    assert call("quantize", mlp_file, out, "-r", "quantize/rtn-w8", *quiet)[0] == 0
    assert sorted(json.loads((out / "report.json").read_text())["files"]) == sorted(path.name for path in out.iterdir())
    assert call("prune", mlp_file, out, "-r", "prune/magnitude-50", *quiet)[0] == 0
    (out / "eval").mkdir()
    (out / "eval" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    data = ("--set", f"data.text={heldout_file}")
    for verb, *more in (
        ("quantize", "-r", "quantize/rtn-w8"),
        ("prune", "-r", "prune/channels-mlp", "--allow-code"),
        ("prune", "-r", "prune/depth-2"),
        ("factorize", "-r", "factorize/svd-energy"),
        ("distill", "-r", "distill/kl", "--teacher", mlp_file, *data),
    ):
        assert "did not write eval/notes.txt in" in call(verb, mlp_file, out, *more, *quiet)[2]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_reports_replace_reports_and_nothing_else(call: Call, tmp_path: Path, mlp_file: Path) -> None:
    out, recipe = tmp_path / "eval", tmp_path / "eval.yaml"
    recipe.write_text("version: 1\n")
    out.mkdir()
    (out / "report.md").write_text("mine")
    assert "did not write" in refused(call("eval", mlp_file, "-r", recipe, "-o", out))
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("report.md", "mine")]
    (out / "report.md").rename(out / "mine.md")
    for _ in range(2):
        assert call("eval", mlp_file, "-r", recipe, "-o", out, "-q")[0] == 0
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert "did not write" in refused(call("compare", out / "report.json", "--html", page))
    assert page.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        assert call("compare", out / "report.json", "--html", page)[0] == 0


def test_pickles_and_the_hub_offline(call: Call, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "not a safetensors" in refused(
        call("quantize", tmp_path / "model.pt", tmp_path / "o", "-r", "quantize/rtn-w8")
    )
    assert "hf://nobody/nothing" in refused(
        call("quantize", "hf://nobody/nothing", tmp_path / "o", "-r", "quantize/rtn-w8")
    )


def test_paths_that_can_be_none_are_refused(
    call: Call, tmp_path: Path, mlp_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a" * 300, "a" * 230, f"{'a' * 300}/b", f"{'a' * 240}.safetensors", "loop", "loop/o.safetensors"):
        refused(call("quantize", mlp_file, tmp_path / name, "-r", "quantize/rtn-w8"))
        for command in (
            ["quantize", tmp_path / name, tmp_path / "o", "-r", "quantize/rtn-w8"],
            ["inspect"],
            ["verify"],
        ):
            refused(call(*command, *([tmp_path / name] if command[1:] == [] else [])))
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
    refused(call("quantize", mlp_file, tmp_path / "o", "-r", "r" * 300))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "working directory" in refused(call("quantize", mlp_file, "o.safetensors", "-r", "quantize/rtn-w8"))


def test_paths_that_are_not_utf8_are_read_and_written(
    call: Call, tmp_path: Path, mlp_file: Path, tiny_llama: Path
) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    shutil.copy(mlp_file, folder / "\udcff.safetensors")
    out = folder / "o\udcff.safetensors"
    step = ["-r", "quantize/rtn-w8", "--latency", "off"]
    code, text, err = call("quantize", folder / "\udcff.safetensors", out, *step, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["after"]["path"] == str(out)
    for command in (["verify"], ["inspect"], ["inspect", "--json"], ["compare"]):
        assert call(command[0], out, *command[1:])[0] == 0
    assert call("quantize", tiny_llama, folder / "dir", *step)[0] == 0
    assert call("verify", folder / "dir")[0] == 0


def test_a_place_that_cannot_be_written_is_refused(call: Call, tmp_path: Path, mlp_file: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "o.safetensors"
    assert "not a directory" in refused(call("quantize", mlp_file, place, "-r", "quantize/rtn-w8"))


def test_json_is_alone_on_standard_output_and_quiet_is_silent(call: Call, tmp_path: Path, mlp_file: Path) -> None:
    recipe = ["-r", "quantize/rtn-w8", "--latency", "off"]
    code, out, _ = call("quantize", mlp_file, tmp_path / "a.safetensors", *recipe, "--json")
    assert code == 0
    assert json.loads(out)["command"] == "quantize"
    assert call("quantize", mlp_file, tmp_path / "b.safetensors", *recipe, "--quiet") == (0, "", "")
    code, out, err = call("quantize", mlp_file, tmp_path / "c.safetensors", *recipe)
    assert (code, err) == (0, "")
    assert "c.report.html" in out


def test_a_failed_gate_keeps_output_and_report(call: Call, tmp_path: Path, mlp_file: Path) -> None:
    out = tmp_path / "o.safetensors"
    gate = ["--set", "gates=['size.ratio <= 0.01']", "--latency", "off"]
    code, text, err = call("quantize", mlp_file, out, "-r", "quantize/rtn-w8", *gate, "--json")
    assert code == 3
    assert "size.ratio" in err
    assert json.loads(text)["gates"][0]["passed"] is False
    assert load_file(out)
    assert json.loads((tmp_path / "o.report.json").read_text())["gates"][0]["passed"] is False


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (Refused("no", "try"), 2, ["error: no", "hint: try"]),
        (CompressError("no"), 1, ["error: no"]),
        (RecipeError("no"), 2, ["error: no", "hint: change that line"]),
        (CheckpointError("no"), 2, ["error: no", "hint: `aicompress inspect`"]),
        (Problems([Refused("a", "x"), Refused("b")]), 2, ["error: a", "hint: x", "error: b"]),
        (
            Problems([*(Refused(f"layer {n}", "x") for n in range(9)), Refused("b", "y")]),
            2,
            [
                "error: layer 0",
                "error: layer 1",
                "error: layer 2",
                "error: 6 more like these",
                "hint: x",
                "error: b",
                "hint: y",
            ],
        ),
        (ValueError("first\nsecond"), 1, ["error: ValueError: first", "hint: this is a defect of aicompress; "]),
        (MemoryError(), 1, ["error: out of memory", "hint: close other programs, "]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["error: out of memory", "hint: close"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, ["error: a cannot be used: ", "hint: choose"]),
        (RuntimeError("Symlink loop from '/a'"), 2, ["error: /a cannot be used: too many", "hint: choose"]),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2, ["error: the working directory", "hint: change"]),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), 1, ["error: /a cannot be used: ", "hint: check"]),
        (OSError(errno.ENOSPC, "No space left on device"), 1, ["error: a file cannot be written", "hint: free space"]),
        (Refused("a\x1b[31m\udcff" + "b" * 1_000_000), 2, ["error: a\\x1b[31m\\udcffbbb"]),
        (SystemExit(5), 5, []),
        (SystemExit(None), 0, []),
    ],
)
def test_exceptions_become_exit_codes(
    capfd: pytest.CaptureFixture[str], error: BaseException, code: int, lines: list[str]
) -> None:
    def broken() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(broken)
    assert stop.value.code == code
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == len(lines)
    assert all(line.startswith(start) for line, start in zip(printed, lines, strict=True))
    assert all(len(line) < 1100 for line in printed)


def test_traceback_is_shown_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise Refused("no")

    monkeypatch.setattr(sys, "argv", ["aicompress", "--traceback"])
    with pytest.raises(Refused):
        run(broken)


@pytest.fixture(scope="module")
def long_step(tmp_path_factory: pytest.TempPathFactory, python: list[str]) -> tuple[list[str], bytes]:
    """A step that takes seconds, without its output, and the bytes of a run of it in one go."""
    folder = tmp_path_factory.mktemp("long")
    generator = torch.Generator().manual_seed(0)
    weights = {f"l.{i}.weight": torch.randn(256, 256, generator=generator) for i in range(30)}
    save_file(weights, folder / "in.safetensors")
    recipe = ["-r", "quantize/hqq-w4", "--set", "method.iterations=40", "--latency", "off", "--quiet"]
    step = [*python, "-m", "aicompress", "quantize", *recipe, str(folder / "in.safetensors")]
    subprocess.run([*step, str(folder / "whole.safetensors")], check=True)
    return step, (folder / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_step_says_how_to_go_on_and_does(
    tmp_path: Path, long_step: tuple[list[str], bytes], number: int, code: int, said: str
) -> None:
    """A real Ctrl-C, or SIGTERM, in a real process, then --resume: the same bytes as a run in one go."""
    step, whole = long_step
    out = tmp_path / "o.safetensors"
    journal = working_path(out) / "journal.jsonl"
    # A run of the tests in the background ignores Ctrl-C, and its children would inherit that.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "stderr": subprocess.PIPE}
    with subprocess.Popen([*step, str(out)], text=True, **heeding) as process:
        while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < 4):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == code
    assert err == f"error: {said}\nhint: give --resume to go on where this run was\n"
    assert not out.exists()
    assert 4 <= journal.read_text().count("\n") < 31
    subprocess.run([*step, str(out), "--resume"], check=True)
    assert out.read_bytes() == whole
    assert not journal.parent.exists()


@pytest.mark.parametrize("arguments", [["methods", "quantize"], ["--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], python: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*python, "-m", "aicompress", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


@pytest.mark.parametrize("gate", ["size.ratio <= 0.3", "size.ratio <= 0.01"])
def test_a_full_standard_output_loses_nothing(
    call: Call, tmp_path: Path, mlp_file: Path, monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    out = tmp_path / "o.safetensors"
    step = ["quantize", mlp_file, out, "-r", "quantize/rtn-w8", "--latency", "off", "--set", f"gates=['{gate}']"]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        result = call(*step)
    if "0.01" in gate:
        assert result[0] == 3
        assert "size.ratio" in result[2]
    else:
        assert "standard output" in refused(result, 1)
    assert load_file(out)
    assert (tmp_path / "o.report.json").exists()


@pytest.mark.parametrize("command", [["schema", "eval"], ["schema", "quantize"], ["methods"], ["--help"]])
def test_a_full_standard_output_is_said(call: Call, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "standard output" in refused(call(*command), 1)


def test_streams_that_are_closed_get_no_file_s_number(
    tmp_path: Path, mlp_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.safetensors"
    step = ["quantize", str(mlp_file), str(out), "-r", "quantize/rtn-w8", "--latency", "off"]
    monkeypatch.setattr(sys, "argv", ["aicompress", *step])
    child = os.fork()
    if not child:
        try:
            for number in range(3):
                os.close(number)
            sys.stdout = sys.stderr = None  # as the interpreter starts then
            run(app)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert load_file(out)


def test_usage_errors_exit_with_two(call: Call, tmp_path: Path) -> None:
    cases: list[list[Any]] = [["quantize"], ["quantize", "a", "b"], ["qantize"], ["quantize", "a", "b", "--nope"]]
    for arguments in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err
