"""Pruning by torch itself and by torch-pruning."""

from __future__ import annotations

import json
import math

from scripts.bench.peers.job import Job, dump, folder_bytes, linears


def magnitude(job: Job) -> None:
    """`torch.nn.utils.prune.l1_unstructured` on each linear layer.

    llm-compressor's magnitude modifier is no peer: in one shot it zeroes nothing.
    """
    from torch.nn.utils import prune

    model = job.causal()
    with job.timed("compress_seconds"):
        for _, module in linears(model):
            prune.l1_unstructured(module, "weight", amount=job.setting["sparsity"])
            prune.remove(module, "weight")
    dump(job, model)
    job.found["save_seconds"] = job.found.pop("dump_seconds")
    job.finished(folder_bytes(job.out))


def feed_forward(job: Job) -> None:
    """torch-pruning by weight norm on the inner width of every feed-forward block.

    Attention heads are left out: its search for groups does not end on them. config.json gets the new width, so that
    the output can be loaded; the library itself leaves a pickled module.
    """
    import torch
    import torch_pruning as pruning

    model = job.causal()
    blocks = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    inner = model.config.intermediate_size
    share = math.ceil(round(job.setting["keep"] * inner, 6)) / inner
    others = [module for name, module in linears(model) if not name.endswith((".gate_proj", ".up_proj"))]
    with job.timed("compress_seconds"):
        pruner = pruning.pruner.MetaPruner(
            model,
            torch.zeros(1, 8, dtype=torch.int64),
            importance=pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.0,
            pruning_ratio_dict={block.gate_proj: 1 - share for block in blocks},
            ignored_layers=[*others, model.get_output_embeddings()],
            output_transform=lambda found: found.logits,
        )
        pruner.step()
    widths = {block.gate_proj.out_features for block in blocks}
    assert len(widths) == 1, f"the widths differ: {sorted(widths)}"
    model.config.intermediate_size = widths.pop()
    dump(job, model)
    job.found["save_seconds"] = job.found.pop("dump_seconds")
    job.found["width"] = json.loads((job.out / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    job.finished(folder_bytes(job.out))
