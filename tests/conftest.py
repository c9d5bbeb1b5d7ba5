"""What every test has: a cache of its own, processes that start at once, and the inputs of tests/inputs.py."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and the suite itself runs on every core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.pop("COLUMNS", None)  # a parallel run sets it: tables would be cut to a terminal that is not there

import pytest

from tests import processes

gc.disable()  # until everything is imported and collected, of which most stays
HERE = Path(__file__).parent
# Files and functions that start processes, or whose cases take about a second each: `make test-fast` leaves them out.
SLOW = (
    "checkpoint/test_header.py::test_any_json_is_refused_or_read_consistently",
    "checkpoint/test_layouts.py::test_targets_match_exactly_what_they_are_for",
    "checkpoint/test_reader.py::test_memory_holds_a_layer_and_not_the_file",
    "checkpoint/test_writer.py::test_a_killed_writer_leaves_nothing_at_the_output",
    "cli/test_app.py::test_help_imports_nothing_heavy",
    "cli/test_app.py::test_help_is_fast",
    "cli/test_boundary.py::test_a_reader_that_goes_away_is_no_error",
    "cli/test_boundary.py::test_an_interrupted_step_says_how_to_go_on_and_does",
    "cli/test_calibration.py",
    "cli/test_startup.py",
    "cli/test_survey.py",
    "methods/prune/masks/test_calibrated.py::test_counts_are_exact",
    "methods/quantize/grid/test_compiled.py::test_is_what_torch_gives",
    "methods/test_budget.py::test_as_good_as_brute_force",
    "methods/test_contract.py::test_a_transposed_view_gives_the_same_bytes",
    "methods/test_contract.py::test_compressed_input",
    "methods/test_contract.py::test_stored_weight",
    "methods/test_peak.py",
    "metrics/test_perplexity.py::test_kl_on_the_first_windows_only",
    "metrics/test_registry.py::test_the_same_seed_gives_the_same_figures",
    "model/blocks/test_bf16_interior.py::test_every_family_stays_as_near_to_float32_as_in_bfloat16",
    "model/equivalence/test_scaling_groups.py::test_rescaling_every_place_keeps_the_model",
    "model/loading/test_definition.py::test_layers_of_a_class_of_their_own_are_quantized",
    "model/loading/test_load.py::test_integer_checkpoints_are_what_transformers_loads",
    "model/loading/test_load.py::test_parameters_must_be_exactly_the_architectures",
    "model/loading/test_load.py::test_plain_checkpoints_are_what_transformers_loads",
    "model/loading/test_weight_reads.py",
    "model/sensitivity/test_gradients.py::test_they_are_those_of_the_whole_model",
    "model/sensitivity/test_output_divergence.py::test_as_the_changed_model",
    "pipeline/calibration/test_data.py::test_a_translator_is_calibrated_on_windows_of_text",
    "pipeline/calibration/test_data.py::test_an_encoder_decoder_is_calibrated_on_features",
    "pipeline/calibration/test_gradients.py",
    "pipeline/calibration/test_memory.py",
    "pipeline/calibration/test_processes.py",
    "pipeline/calibration/test_statistics_file.py",
    "pipeline/channels/test_config_widths.py::test_calibration_repairs",
    "pipeline/channels/test_config_widths.py::test_refusals",
    "pipeline/channels/test_run.py",
    "pipeline/distillation/test_movement.py",
    "pipeline/distillation/test_new_loss.py",
    "pipeline/distillation/test_processes.py",
    "pipeline/distillation/test_run.py",
    "pipeline/evaluation/test_load_cost.py",
    "pipeline/evaluation/test_model_outputs.py",
    "pipeline/evaluation/test_new_metric.py",
    "pipeline/evaluation/test_run.py",
    "pipeline/layerwise/allocation/test_search.py",
    "pipeline/layerwise/allocation/test_sparsity.py",
    "pipeline/layerwise/test_block_tuning.py",
    "pipeline/layerwise/test_calibrated.py",
    "pipeline/layerwise/test_compress.py",
    "pipeline/layerwise/test_plan.py::test_a_dry_run_states_the_bytes_that_the_run_writes",
    "pipeline/layerwise/test_pruning.py",
    "pipeline/layerwise/test_quantized_forms.py",
    "pipeline/layerwise/test_reads.py",
    "pipeline/layerwise/test_rotation.py",
    "pipeline/layerwise/test_row_blocks.py",
    "pipeline/layerwise/test_scaling.py",
    "pipeline/step/test_latency.py",
    "pipeline/step/test_layer_latency.py",
    "pipeline/step/test_run.py",
    "pipeline/step/test_survey.py",
    "pipeline/structured/test_allocation.py",
    "pipeline/structured/test_calibrated.py",
    "pipeline/structured/test_edit.py::test_refuses_what_it_does_not_understand",
    "pipeline/structured/test_gradient_scores.py",
    "pipeline/structured/test_reference_cut.py",
    "pipeline/structured/test_run.py",
    "pipeline/structured/test_size_targets.py",
    "pipeline/structured/units/",
    "pipeline/test_adapted_inputs.py",
    "pipeline/test_chain.py",
    "pipeline/test_export.py",
    "pipeline/test_foreign_inputs.py",
    "pipeline/test_mixed_widths.py",
    "pipeline/test_steps_compose.py",
    "scripts/bench/test_mnist.py",
    "scripts/bench/test_random_llama.py",
    "scripts/test_demo_rules.py::test_recipes_are_not_chosen_on_what_the_figures_are_from",
    "scripts/test_make_demo_text.py::test_the_files_share_no_sentence",
    "scripts/test_make_tiny_lm.py",
    "scripts/test_output_digests.py::test_two_records_are_equal_and_a_difference_is_named",
    "scripts/test_sweep.py",
    "test_checkpoints.py::test_training_lowers_the_loss_on_unseen_text",
    "test_docs.py::test_shell_blocks_run",
    "test_hf.py",
    "test_stock.py",
    "test_wheel.py",
    "weights/test_new_form.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Load the inputs, with torch and transformers; the process that only hands out tests to workers needs neither."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.inputs")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out kernels that this processor cannot run: their tests are in files of their own."""
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
    """What is imported and collected stays: the garbage collector need not look through it again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own for every test, none of which exists yet."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of what this test's dry runs keep: it exists once one has."""
    folder = next(caches)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What stands for the interpreter in a command, with torch, transformers and most of aicompress imported.

    The command line is not: it notes the time when it is imported. Code that is given by -c finds no aicompress.
    """
    models = ("models.auto.modeling_auto", "models.llama.modeling_llama", "models.bert.modeling_bert")
    transformers = ("modeling_utils", "generation.utils", "tokenization_utils_base", *models)
    rooms = ("steps", "layerwise.run", "layerwise.planner", "evaluation.run", "step.layer_latency")
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
