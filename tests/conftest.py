"""What every test has: a cache of its own, processes that start at once, and the inputs of tests/inputs.py."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and the suite itself runs on every core
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that waits leaves its core to the other worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.pop("COLUMNS", None)  # a parallel run sets it: tables would be cut to a terminal that is not there

import pytest

from tests import processes

MEMORY = "/dev/shm"  # a step flushes its output to the disk: a tenth of the suite's time, where that is no memory
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("TMPDIR", MEMORY)
    tempfile.tempdir = None  # asked before: to be found anew

gc.disable()  # until everything is imported and collected, of which most stays
HERE = Path(__file__).parent
# What runs a model, starts processes, or takes a second: `make test-fast` leaves it out, and does not even import files
# and folders that are slow as a whole.
SLOW = (
    "checkpoint/test_damage.py",
    "checkpoint/test_header.py::test_a_shape_of_endless_numbers_is_refused_at_once",
    "checkpoint/test_header.py::test_any_json_is_refused_or_read_consistently",
    "checkpoint/test_header.py::test_built_headers_read_back",
    "checkpoint/test_header.py::test_damaged_files_are_refused_or_read_consistently",
    "checkpoint/test_layouts.py::test_targets_match_exactly_what_they_are_for",
    "checkpoint/test_reader.py::test_descriptions_must_fit_their_tensors",
    "checkpoint/test_reader.py::test_memory_holds_a_layer_and_not_the_file",
    "checkpoint/test_writer.py::test_a_killed_writer_leaves_nothing_at_the_output",
    "cli/test_app.py::test_help_imports_nothing_heavy",
    "cli/test_app.py::test_help_is_fast",
    "cli/test_app.py::test_the_module_is_the_command",
    "cli/test_boundary.py",
    "cli/test_calibration.py",
    "cli/test_new_verb.py",
    "cli/test_packing.py",
    "cli/test_refused_inputs.py",
    "cli/test_render.py::test_a_report_is_shown_without_importing_torch",
    "cli/test_startup.py",
    "cli/test_survey.py",
    "cli/test_wrong_values.py",
    "methods/prune/masks/test_calibrated.py::test_counts_are_exact",
    "methods/prune/masks/test_permutation.py",
    "methods/quantize/grid/test_compiled.py::test_is_what_torch_gives",
    "methods/quantize/test_gptq.py",
    "methods/test_budget.py::test_as_good_as_brute_force",
    "methods/test_contract.py",
    "methods/test_peak.py",
    "metrics/test_perplexity.py",
    "metrics/test_perplexity.py::test_kl_on_the_first_windows_only",
    "metrics/test_registry.py",
    "metrics/test_registry.py::test_the_same_seed_gives_the_same_figures",
    "model/architecture/",
    "model/blocks/",
    "model/channels/",
    "model/equivalence/",
    "model/loading/",
    "model/sensitivity/",
    "pipeline/",
    "recipe/test_endless.py",
    "scripts/",
    "test_checkpoints.py::test_training_lowers_the_loss_on_unseen_text",
    "test_docs.py::test_shell_blocks_run",
    "test_hf.py",
    "test_sentence_transformers.py",
    "test_stock.py",
    "test_wheel.py",
    "weights/test_forms.py::TestEveryForm::test_tensors_that_are_lost",
    "weights/test_new_form.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Load the inputs, with torch and transformers; the process that only hands out tests to workers needs neither."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.inputs")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out slow files where they are not asked for, and kernels that this processor cannot run."""
    place = collection_path.relative_to(HERE).as_posix() + "/" * collection_path.is_dir()
    if config.getoption("markexpr", "") == "not slow" and place in SLOW:
        return True
    if not collection_path.match("*_bfloat16.py"):
        return None
    import torch

    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow; a name that leads nowhere is a mistake."""
    lost = [name for name in SLOW if not (HERE / name.partition("::")[0]).exists()]
    if lost:
        raise pytest.UsageError(f"tests/conftest.py: SLOW names what is not there: {', '.join(lost)}")
    for item in items:
        path = item.path.relative_to(HERE).as_posix()
        if f"{path}::{item.name}".startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the garbage collector need not look through it again and again.

    Nor need it look often: a test makes millions of objects, few of them in circles, beside what was imported later.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own for every test, none of which exists yet."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws without a generator of its own draws the same numbers in every run, and in any order."""
    import torch  # not with this file, which the command line's own tests wait for

    torch.default_generator.manual_seed(0)  # `torch.manual_seed` notes a traceback for every other device


@pytest.fixture(autouse=True)
def cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of what this test's dry runs keep: it exists once one has."""
    folder = next(caches)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType, str, str], None]]:
    """(package, name, source): a file in a folder of its own is a module of the package until the test ends."""
    joined: list[tuple[ModuleType, str]] = []

    def join(package: ModuleType, name: str, source: str) -> None:
        folder = tmp_path / f"more-{len(joined)}"
        folder.mkdir()
        (folder / f"{name}.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        importlib.invalidate_caches()
        joined.append((package, name))

    yield join
    for package, name in joined:
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What stands for the interpreter in a command, with torch, transformers and most of aicompress imported.

    The command line is not: it notes the time when it is imported. Code that is given by -c finds no aicompress.
    """
    models = ("models.auto.modeling_auto", "models.llama.modeling_llama", "models.bert.modeling_bert")
    transformers = ("modeling_utils", "generation.utils", "tokenization_utils_base", *models)
    rooms = ("steps", "layerwise.run", "layerwise.planner", "evaluation.run", "step.timing.layer_latency")
    modules = (
        *("torch", "pydantic", "rich.console", "typer", "aicompress.report.html"),
        *(f"transformers.{name}" for name in transformers),
        *(f"aicompress.pipeline.{room}" for room in rooms),
    )
    return processes.server(processes.shared(tmp_path_factory, "python"), *modules)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What stands for the interpreter in a command, with torch imported and nothing that it does not import."""
    return processes.server(processes.shared(tmp_path_factory, "bare"), "torch")
