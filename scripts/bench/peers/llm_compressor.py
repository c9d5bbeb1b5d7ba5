"""llm-compressor: round to nearest, GPTQ, AWQ, W8A8, Wanda, SparseGPT, and its quantization without a model."""

from __future__ import annotations

from typing import Any

from scripts.bench.peers.job import Job, folder_bytes

HEAD = ["re:.*lm_head.*"]  # a plain "lm_head" does not match: half of a tied embedding would be pruned


def scheme(setting: dict[str, Any]) -> dict[str, Any]:
    """Its config_groups for linear layers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=setting["bits"],
        type="int",
        symmetric=setting.get("symmetric", True),
        strategy="group",
        group_size=setting.get("group_size", 64),
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def modifiers(setting: dict[str, Any]) -> list[Any]:
    """Its recipe for a setting, everything else at its default."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    method = setting["method"]
    if method in ("wanda", "sparsegpt"):
        kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
        pattern = {"mask_structure": setting["pattern"]} if "pattern" in setting else {}
        return [kind(sparsity=setting["sparsity"], targets=["Linear"], ignore=HEAD, **pattern)]
    if method == "w8a8":
        return [QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=HEAD)]
    if method == "smoothquant":
        return [SmoothQuantModifier(), QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=HEAD)]
    if method == "gptq":
        return [GPTQModifier(config_groups=scheme(setting), ignore=HEAD)]
    before = [AWQModifier()] if method == "awq" else []
    return [*before, QuantizationModifier(config_groups=scheme(setting), ignore=HEAD)]


def compress(job: Job) -> None:
    """One call of `oneshot`, saved in compressed-tensors; a pruned model is saved dense."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # AWQ pins memory even where nothing can be pinned, and fails
        IntermediatesCache.pin_memory = lambda *arguments, **options: None
    model, recipe = job.causal(), modifiers(job.setting)
    calibrated: dict[str, Any] = {}
    if job.setting["method"] not in ("rtn", "w8a8"):
        windows = job.windows()
        rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
        calibrated = {
            "dataset": Dataset.from_dict(rows),
            "max_seq_length": job.length,
            "num_calibration_samples": job.samples,
        }
    with job.timed("compress_seconds"):
        oneshot(model=model, recipe=recipe, **calibrated)
    with job.timed("save_seconds"):
        model.save_pretrained(job.out, save_compressed=True)
        job.tokenizer().save_pretrained(job.out)
    job.finished(folder_bytes(job.out))


def stream(job: Job) -> None:
    """`model_free_ptq`: tensor by tensor from file to file, 4 bits in groups of 128."""
    from llmcompressor import model_free_ptq

    ignore = [*HEAD, "re:.*embed.*"]  # without a model it takes every matrix for a linear layer
    with job.timed("compress_seconds"):
        model_free_ptq(job.model, job.out, scheme=job.setting["scheme"], ignore=ignore, device="cpu")
    job.finished(folder_bytes(job.out))
