"""An output is a finished checkpoint or does not exist, whatever stops the writer."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter, plan_shards
from aicompress.checkpoint.journal import Journal
from aicompress.checkpoint.place import require_apart, require_free, take_place, working_path
from aicompress.checkpoint.shards import index_text
from aicompress.checkpoint.source import INDEX, locate
from aicompress.disk import require_writable
from aicompress.errors import CompressError, OutOfSpace, OutputExists, Refused
from aicompress.weights import TensorSpec

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.weight_scale": torch.ones(3, 1, dtype=torch.bfloat16),
    "a.bias": torch.ones(3, dtype=torch.float16),
    "n": torch.tensor(7),
    "flag": torch.tensor([True, False, True]),
    "none": torch.ones(0, 5),
    "é.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
}

MARK = {"aicompress": '{"format_version": 1}'}  # of a file that a step wrote


def shards(tensors: dict[str, Tensor] = TENSORS, limit: int | None = None, note: str = "000"):
    return plan_shards({name: TensorSpec.of(t) for name, t in tensors.items()}, limit, {"note": note, **MARK})


def write(out: Path, tensors: dict[str, Tensor] = TENSORS, limit: int | None = None) -> None:
    plan = shards(tensors, limit)
    with CheckpointWriter(out, plan) as writer:
        for name, tensor in reversed(tensors.items()):  # any order
            writer.put(name, tensor)
        if len(plan) > 1:
            writer.add(INDEX, index_text(plan, 30).encode())
        files = [] if writer.single else [*writer.names(), "report.json"]
        writer.add("report.json", json.dumps({"schema_version": 1, "tool_version": "0", "files": files}).encode())
        writer.stamp({"note": "xyz", **MARK})
        writer.seal()


def start(out: Path, count: int, error: BaseException | None = None) -> None:
    """Write the first tensors, then stop with an error, or seal too early."""
    with CheckpointWriter(out, shards()) as writer:
        Journal.start(writer.work, "f")
        for name in list(TENSORS)[:count]:
            writer.put(name, TENSORS[name])
        if error is not None:
            raise error
        writer.seal()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n].float(), t.float())
        for n, t in wanted.items()
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_streamed_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write(tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), TENSORS)
    assert Checkpoint.open(tmp_path / "out.safetensors").metadata == {"format": "pt", "note": "xyz", **MARK}
    assert names(tmp_path) == ["out.report.json", "out.safetensors"]


def test_shards_keep_modules_together_and_the_index_counts_every_byte(tmp_path: Path) -> None:
    write(tmp_path / "out", limit=40)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = {file: load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())}
    assert len(files) > 1
    assert same({name: files[file][name] for name, file in index["weight_map"].items()}, TENSORS)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert len({file for name, file in index["weight_map"].items() if name.startswith("a.")}) == 1
    assert same({n: Checkpoint.open(tmp_path / "out").read(n) for n in TENSORS}, TENSORS)


def test_planned_bytes_are_the_files_bytes(tmp_path: Path) -> None:
    write(tmp_path / "out", limit=40)
    assert {s.name: s.nbytes for s in shards(limit=40)} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    }


@pytest.mark.parametrize("out", ["out", "new/deep/out.safetensors"])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, out: str) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        start(tmp_path / out, 2, RuntimeError("boom"))
    assert names(tmp_path) == []


def test_a_tensor_that_was_never_written_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not written"):
        start(tmp_path / "out", 2)
    assert names(tmp_path) == []


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="planned"),
        CheckpointWriter(tmp_path / "out", shards()) as writer,
    ):
        writer.put("n", torch.ones(2))


def test_rows_are_written_in_any_order(tmp_path: Path) -> None:
    """A tensor that has fewer rows than the weight, and one that is whole each time."""
    tensors = {
        "w_packed": torch.arange(6).reshape(3, 2),
        "w_scale": torch.rand(96, 1),
        "w_shape": torch.tensor([96, 8]),
    }
    with CheckpointWriter(tmp_path / "out", shards(tensors)) as writer:
        for start in (64, 0, 32):
            writer.put_rows("w_packed", tensors["w_packed"][start // 32 : start // 32 + 1], start, 96)
            writer.put_rows("w_scale", tensors["w_scale"][start : start + 32], start, 96)
            writer.put_rows("w_shape", tensors["w_shape"], start, 96)
        writer.seal()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_rows_that_are_missing_or_do_not_fit_are_noticed(tmp_path: Path) -> None:
    tensors = {"w": torch.rand(8, 2)}
    with CheckpointWriter(tmp_path / "a", shards(tensors)) as writer:
        writer.put_rows("w", tensors["w"][:4], 0, 8)
        with pytest.raises(ValueError, match="not written"):
            writer.seal()
    for part in (torch.rand(4, 3), torch.rand(4, 2).half(), torch.rand(5, 2)):
        with pytest.raises(ValueError, match="planned"), CheckpointWriter(tmp_path / "b", shards(tensors)) as writer:
            writer.put_rows("w", part, 4, 8)
    assert names(tmp_path) == []


def test_an_interrupt_keeps_the_work_for_a_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        start(out, 4, KeyboardInterrupt())
    assert names(tmp_path) == [working_path(out).name]
    with CheckpointWriter(out, shards(), resume=True) as writer:
        for name in list(TENSORS)[4:]:
            writer.put(name, TENSORS[name])
        writer.seal()
    assert same(load_file(out / "model.safetensors"), TENSORS)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["model.safetensors"]


def test_without_resume_a_stopped_run_is_forgotten(tmp_path: Path) -> None:
    work = working_path(tmp_path / "out")
    work.mkdir()
    (work / "stale.bin").write_bytes(b"1")
    (work / "model.safetensors").write_bytes(b"1" * 9999)
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.safetensors", "report.json"]


def test_resuming_a_run_whose_files_are_gone_is_refused(tmp_path: Path) -> None:
    work = working_path(tmp_path / "out")
    work.mkdir()
    Journal.start(work, "f")
    with pytest.raises(Refused, match="stopped run"), CheckpointWriter(tmp_path / "out", shards(), resume=True):
        pass


def test_two_runs_into_one_output_are_kept_apart(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shards()) as first:
        with (
            pytest.raises(Refused, match="in use by another run"),
            CheckpointWriter(tmp_path / "out", shards()),
        ):
            pass
        for name, tensor in TENSORS.items():
            first.put(name, tensor)
        first.seal()
    assert same(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_overwriting_replaces_everything(tmp_path: Path, out: str) -> None:
    write(tmp_path / out, {"old": torch.zeros(4)}, limit=None)
    write(tmp_path / out)
    file = tmp_path / out / "model.safetensors" if out == "out" else tmp_path / out
    assert same(load_file(file), TENSORS)
    assert names(tmp_path) == (["out"] if out == "out" else ["out.report.json", "out.safetensors"])


def test_a_directory_is_replaced_even_where_names_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicompress.checkpoint.place._exchange", lambda one, other: False)
    for name in ("new", "out"):
        write(tmp_path / name, {name: torch.ones(1)})
    assert take_place(tmp_path / "new", tmp_path / "out") == []
    assert names(tmp_path) == ["out"]
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["new"]


@pytest.mark.parametrize("renames", ["by the system", "step by step"])
@pytest.mark.parametrize("earlier", [False, True], ids=["nothing before", "an output before"])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_comes_to_the_outputs_place_while_a_run_is_on_stays(
    tmp_path: Path, out: str, earlier: bool, renames: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if renames == "step by step":
        monkeypatch.setattr("aicompress.checkpoint.place._renameat2", lambda old, new, flags: None)
    single, place = out.endswith(".safetensors"), tmp_path / out
    if earlier:
        write(place, {"old": torch.zeros(4)})
    with CheckpointWriter(place, shards()) as writer:
        for name, tensor in TENSORS.items():
            writer.put(name, tensor)
        if earlier:
            place.rename(tmp_path / "moved")
        if single:
            place.write_text("mine")
        else:
            place.mkdir()
            (place / "thesis.txt").write_text("mine")
        with pytest.raises(CompressError, match="made by somebody else") as caught:
            writer.seal()
    assert (place if single else place / "thesis.txt").read_text() == "mine"
    beside = tmp_path / out.replace("out", "out-1")
    assert str(beside) in caught.value.hint
    assert same(load_file(beside if single else beside / "model.safetensors"), TENSORS)
    assert not any(name.startswith(".") for name in names(tmp_path))


@pytest.mark.parametrize("swaps", [True, False], ids=["by the system", "step by step"])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_comes_into_an_output_while_a_run_replaces_it_stays(
    tmp_path: Path, out: str, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr("aicompress.checkpoint.place._exchange", lambda one, other: False)
    single, place = out.endswith(".safetensors"), tmp_path / out
    write(place)
    mine = tmp_path / "out.report.md" if single else place / "sub" / "thesis.txt"
    with CheckpointWriter(place, shards()) as writer:
        for name, tensor in TENSORS.items():
            writer.put(name, tensor)
        writer.add("report.json", b"{}")
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        (tmp_path / "out.report.json").write_text("{}")
        with pytest.raises(CompressError, match="did not write") as caught:
            writer.seal()
    assert mine.read_text() == "mine"
    assert single or load_file(place / "model.safetensors")
    beside = tmp_path / out.replace("out", "out-1")
    assert str(beside) in caught.value.hint
    assert same(load_file(beside if single else beside / "model.safetensors"), TENSORS)
    assert (tmp_path / "out-1.report.json" if single else beside / "report.json").read_text() == "{}"
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_a_file_written_over_the_output_while_a_run_is_on_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write(out)
    with CheckpointWriter(out, shards({"n": torch.ones(1)})) as writer:
        writer.put("n", torch.ones(1))
        out.write_text("mine")  # the same file with other content
        with pytest.raises(CompressError, match=r"did not write out\.safetensors"):
            writer.seal()
    assert out.read_text() == "mine"


def test_an_empty_folder_that_comes_to_the_outputs_place_is_no_invitation(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shards({"n": torch.ones(1)})) as writer:
        writer.put("n", torch.ones(1))
        (tmp_path / "out").mkdir()
        with pytest.raises(CompressError, match="made by somebody else"):
            writer.seal()
    assert names(tmp_path / "out") == []


def test_an_output_that_appeared_after_the_plan_is_not_replaced_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with (
        pytest.raises(OutputExists, match="exists"),
        CheckpointWriter(tmp_path / "out", shards({"n": torch.ones(1)}), overwrite=False),
    ):
        pass
    assert same(load_file(tmp_path / "out" / "model.safetensors"), TENSORS)


def test_an_output_behind_a_link_is_written_where_the_link_points(tmp_path: Path) -> None:
    write(tmp_path / "real", {"old": torch.zeros(4)})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same(load_file(tmp_path / "real" / "model.safetensors"), TENSORS)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_a_file_larger_than_the_system_allows_is_one_clear_error(tmp_path: Path) -> None:
    """A limit on file size is what a full disk looks like to a writer, and it needs no privileges."""
    big = {"w": torch.zeros(1 << 20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with (
            pytest.raises(OutOfSpace, match="larger than a file may be"),
            CheckpointWriter(tmp_path / "deep" / "out", shards(big)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("code", "text"), [(28, "is full"), (122, "is full"), (5, "cannot be written")])
def test_errors_of_the_disk_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(CompressError, match=text) as caught:
        start(tmp_path / "out", 1)
    assert caught.value.exit_code == 1
    assert caught.value.hint
    assert names(tmp_path) == []


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="is not a directory"):
        require_writable(tmp_path / "file" / "out")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    places = [closed] if not os.access(closed, os.W_OK) else [Path("/proc")]  # the superuser may write anywhere else
    for place in places:
        with pytest.raises(CompressError) as caught:
            start(place / "out", 1)
        assert caught.value.exit_code == 1
        assert "cannot be written" in caught.value.message


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_killed_writer_leaves_nothing_at_the_output(tmp_path: Path, out: str) -> None:
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        specs = {name: TensorSpec(torch.float32, (8,)) for name in "ab"}
        with (
            contextlib.suppress(BaseException),
            CheckpointWriter(tmp_path / out, plan_shards(specs, None, {})) as writer,
        ):
            writer.put("a", torch.ones(8))
            os.write(writing, b"half")
            time.sleep(60)
        os._exit(1)
    os.close(writing)
    assert os.read(reading, 4) == b"half"
    os.close(reading)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not (tmp_path / out).exists()
    write(tmp_path / out)  # and its lock has gone with it
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


class TestPlaces:
    def test_a_free_path_and_an_empty_directory(self, tmp_path: Path) -> None:
        require_free(tmp_path / "x", overwrite=False)
        require_free(tmp_path, overwrite=True)
        with pytest.raises(OutputExists, match="exists"):
            require_free(tmp_path, overwrite=False)

    @pytest.mark.parametrize(
        "content",
        [["notes.txt"], ["config.json"], ["a.safetensors"], ["model.safetensors", "config.json", "report.json"]],
    )
    def test_what_no_run_wrote_is_never_replaced(self, tmp_path: Path, content: list[str]) -> None:
        (tmp_path / "x").mkdir()
        for name in content:
            (tmp_path / "x" / name).write_text("{}")
        with pytest.raises(OutputExists, match=f"did not write {', '.join(sorted(content))} in"):
            require_free(tmp_path / "x", overwrite=True)
        (tmp_path / "y.safetensors").write_text("mine")
        with pytest.raises(OutputExists, match="did not write"):
            require_free(tmp_path / "y.safetensors", overwrite=True)
        (tmp_path / "z.safetensors").touch()  # nothing in it can be lost
        require_free(tmp_path / "z.safetensors", overwrite=True)

    @pytest.mark.parametrize(
        "own",
        ["notes.txt", "eval/report.json", ".git/HEAD", "checkpoint-500/", "link", "linked/", "1_Pooling/mine.txt"],
    )
    def test_a_checkpoint_that_holds_more_than_a_run_wrote_is_not_replaced(self, tmp_path: Path, own: str) -> None:
        for earlier in (False, True):
            out = tmp_path / str(earlier)
            write(out)
            if earlier:
                (out / "report.json").write_text('{"schema_version": 1, "tool_version": "0.2.0"}')
            require_free(out, overwrite=True)
            path = out / own
            path.parent.mkdir(exist_ok=True)
            if own in ("link", "linked/"):
                path.symlink_to(tmp_path / "elsewhere" if own == "link" else tmp_path)
            elif own.endswith("/"):
                path.mkdir()
            else:
                path.write_text("mine")
            with pytest.raises(OutputExists, match=f"did not write {own.removesuffix('/')}"):
                require_free(out, overwrite=True)

    @pytest.mark.parametrize("manifest", ["report.json", "aicompress.json"])
    def test_an_output_of_an_earlier_version_is_told_by_its_names(self, tmp_path: Path, manifest: str) -> None:
        kept = ["config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt", "1_Pooling/config.json"]
        kept += ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"]
        kept += ["model-00001-of-00002.safetensors", INDEX, "modeling_aicompress.py", "special_tokens_map.json"]
        for name in kept:
            (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name).touch()
        with pytest.raises(OutputExists):
            require_free(tmp_path / "x", overwrite=True)
        (tmp_path / "x" / manifest).write_text('{"schema_version": 1, "tool_version": "0.2.0", "lineage": []}')
        require_free(tmp_path / "x", overwrite=True)

    def test_reports_beside_one_file_are_replaced_only_where_a_run_wrote_them(self, tmp_path: Path) -> None:
        (tmp_path / "x.report.md").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(OutputExists, match=r"x\.report\.md, which aicompress did not write"):
                require_free(tmp_path / "x.safetensors", overwrite)
        (tmp_path / "x.report.json").write_text('{"schema_version": 1, "tool_version": "0.2.0"}')
        require_free(tmp_path / "x.safetensors", overwrite=False)

    def test_files_and_directories_do_not_replace_each_other(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").mkdir()
        (tmp_path / "y").write_text("")
        for name in ("x.safetensors", "y"):
            with pytest.raises(OutputExists):
                require_free(tmp_path / name, overwrite=True)

    def test_a_checkpoint_is_replaced(self, tmp_path: Path) -> None:
        write(tmp_path / "x")
        write(tmp_path / "y.safetensors")
        require_free(tmp_path / "x", overwrite=True)
        require_free(tmp_path / "y.safetensors", overwrite=True)

    def test_the_working_directory_is_never_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "x")
        monkeypatch.chdir(tmp_path / "x")
        with pytest.raises(OutputExists, match="working directory"):
            require_free(Path("."), overwrite=True)

    def test_the_input_is_never_touched(self, tmp_path: Path) -> None:
        write(tmp_path / "in")
        (tmp_path / "in" / "config.json").write_text("{}")
        (tmp_path / "link").symlink_to(tmp_path / "in")
        source = locate(tmp_path / "in")
        file = tmp_path / "in" / "model.safetensors"
        for out in ("in", "link", "in/out", "link/a/b.safetensors", ".", "in/model.safetensors"):
            with pytest.raises(Refused, match="input"):
                require_apart(source, tmp_path / out)
            if out not in ("in/out", "link/a/b.safetensors"):  # a bare file says nothing of its neighbours
                with pytest.raises(Refused, match="input"):
                    require_apart(locate(file), tmp_path / out)
        require_apart(source, tmp_path / "out")
        require_apart(locate(file), tmp_path / "in" / "small.safetensors")
        (tmp_path / "other.safetensors").symlink_to(file)
        for one, other in ((file, "other.safetensors"), (tmp_path / "other.safetensors", "in/model.safetensors")):
            with pytest.raises(Refused, match="input itself"):
                require_apart(locate(one), tmp_path / other)
