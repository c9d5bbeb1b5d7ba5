"""Fixtures shared by every test: small real checkpoints and data, built once per session. Treat them as read-only."""

from __future__ import annotations

import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and the suite itself runs on every core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.pop("COLUMNS", None)  # a parallel run sets it: tables would be cut to a terminal that is not there

import pytest
import torch

from tests import checkpoints, processes

# Kernels that this processor cannot run have their tests in files of their own.
collect_ignore_glob = [] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["*_bfloat16.py"]

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
    "test_checkpoints.py::test_training_lowers_the_loss_on_unseen_text",
    "test_docs.py::test_shell_blocks_run",
    "test_hf.py",
    "test_sentence_transformers.py",
    "test_stock.py",
    "test_wheel.py",
    "weights/test_new_form.py",
)


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
    gc.collect()
    gc.freeze()


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
    """What stands for the interpreter in a command, with torch and transformers imported; aicompress is not."""
    models = ("modeling_utils", "models.auto.modeling_auto", "models.llama.modeling_llama", "models.bert.modeling_bert")
    modules = ("torch", "pydantic", "rich.console", "typer", *(f"transformers.{name}" for name in models))
    return processes.server(processes.shared(tmp_path_factory, "python"), *modules)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What stands for the interpreter in a command, with torch imported and nothing that it does not import."""
    return processes.server(processes.shared(tmp_path_factory, "bare"), "torch")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the session's checkpoints, which all workers have."""
    return processes.shared(tmp_path_factory, "built")


def written(path: Path, lines: list[str]) -> Path:
    """A text file of these lines."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def once(path: Path, make: Callable[[Path], Path]) -> Path:
    """A file or folder that the first worker to ask for it makes."""
    with processes.one_at_a_time(path.with_name(f"{path.name}.lock")):
        return path if path.exists() else make(path)


@pytest.fixture(scope="session")
def tiny_llama(built: Path) -> Path:
    """Random Llama, tied, fp32, with tokenizer: hidden 64, 3 layers, 4 heads on 2, intermediate 128, vocabulary 256."""
    return once(built / "llama", checkpoints.make_llama)


@pytest.fixture(scope="session")
def tiny_llama_untied(built: Path) -> Path:
    """The same with its own lm_head."""
    return once(built / "llama-untied", lambda path: checkpoints.make_llama(path, tied=False))


@pytest.fixture(scope="session")
def tiny_llama_bf16(built: Path) -> Path:
    """The tied one in bfloat16, in several shards."""
    return once(built / "llama-bf16", lambda path: checkpoints.make_llama(path, dtype=torch.bfloat16, shards=3))


@pytest.fixture(scope="session")
def trained_llama(built: Path) -> Path:
    """The tied one after 120 training steps: its loss means something, so quality can be compared."""
    return once(built / "llama-trained", lambda path: checkpoints.make_llama(path, steps=120))


@pytest.fixture(scope="session")
def tiny_gpt2(built: Path) -> Path:
    return once(built / "gpt2", checkpoints.make_gpt2)


@pytest.fixture(scope="session")
def tiny_bert(built: Path) -> Path:
    """BertModel without prefix, with the side files of sentence-transformers."""
    return once(built / "bert", checkpoints.make_bert)


@pytest.fixture(scope="session")
def tiny_t5(built: Path) -> Path:
    return once(built / "t5", checkpoints.make_t5)


@pytest.fixture(scope="session")
def tiny_vit(built: Path) -> Path:
    return once(built / "vit", checkpoints.make_vit)


@pytest.fixture(scope="session")
def tiny_mixtral(built: Path) -> Path:
    """Random Mixtral: 2 blocks, 12 experts, 2 a token."""
    return once(built / "mixtral", lambda path: checkpoints.make_mixtral(path, experts=12))


@pytest.fixture(scope="session")
def tiny_qwen_moe(built: Path) -> Path:
    """Random Qwen3-MoE: 2 blocks, 4 experts, 2 a token."""
    return once(built / "qwen-moe", checkpoints.make_qwen_moe)


@pytest.fixture(scope="session")
def mlp_file(built: Path) -> Path:
    """fc1, fc2, fc3 (784-300-100-10), trained on the digits."""
    torch.manual_seed(0)
    return once(built / "mlp.safetensors", lambda at: checkpoints.make_file(at, checkpoints.learn(checkpoints.Mlp())))


@pytest.fixture(scope="session")
def cnn_file(built: Path) -> Path:
    """conv1, bn1, conv2, bn2, fc, trained on the digits."""
    torch.manual_seed(0)
    learnt = functools.partial(checkpoints.learn, epochs=2)
    return once(built / "cnn.safetensors", lambda at: checkpoints.make_file(at, learnt(checkpoints.Cnn())))


@pytest.fixture(scope="session")
def lstm_file(built: Path) -> Path:
    """embed, lstm (two layers), fc; random."""
    torch.manual_seed(0)
    return once(built / "lstm.safetensors", lambda path: checkpoints.make_file(path, checkpoints.Lstm()))


@pytest.fixture(scope="session")
def text_file(built: Path) -> Path:
    """Six hundred English sentences, one per line."""
    return once(built / "text.txt", lambda path: written(path, checkpoints.sentences(600)))


@pytest.fixture(scope="session")
def heldout_file(built: Path) -> Path:
    """Three hundred sentences that no fixture model was trained on."""
    return once(built / "heldout.txt", lambda path: written(path, checkpoints.sentences(300, skip=1400)))


@pytest.fixture(scope="session")
def digits_npz(built: Path) -> Path:
    """train_images (1000, 28, 28) uint8, train_labels, test_images (400, 28, 28), test_labels."""
    return once(built / "digits.npz", checkpoints.make_digits)
