"""HQQ and optimum-quanto: quantization of a loaded model without data."""

from __future__ import annotations

from scripts.bench.peers.job import Job, dump, linears, saved_bytes


def hqq(job: Job) -> None:
    """HQQLinear for every linear layer, default optimizer, then its decoded weights as the output."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = job.causal()
    config = BaseQuantizeConfig(nbits=job.setting["bits"], group_size=job.setting.get("group_size", 64), axis=1)
    layers: dict[str, HQQLinear] = {}
    with job.timed("compress_seconds"):
        for name, module in linears(model):
            dtype = module.weight.dtype
            layers[name] = HQQLinear(module, config, del_orig=False, compute_dtype=dtype, device="cpu")
    state = {name: tensor for name, tensor in _tied_once(model).items() if name.removesuffix(".weight") not in layers}
    with job.timed("save_seconds"):
        stored = saved_bytes({**state, **{name: layer.state_dict() for name, layer in layers.items()}}, job.out)
    job.finished(stored)
    if job.setting.get("dump", True):
        with torch.no_grad():
            for name, module in linears(model):
                module.weight.copy_(layers[name].dequantize())
        dump(job, model)


def quanto(job: Job) -> None:
    """`quantize` and `freeze`, then its decoded weights as the output."""
    import torch
    from optimum import quanto as peer

    model = job.causal()
    names = [name for name, _ in linears(model)]
    with job.timed("compress_seconds"):
        peer.quantize(model, weights=getattr(peer, job.setting["dtype"]), include=names)
        for name in names:
            if model.get_submodule(name).weight_group_size is not None:  # of its own accord it takes 128
                model.get_submodule(name).weight_group_size = job.setting.get("group_size", 64)
        peer.freeze(model)
    with job.timed("save_seconds"):
        stored = saved_bytes(_tied_once(model), job.out)
    job.finished(stored)
    dense = job.causal()
    with torch.no_grad():
        for name in names:
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
    dump(job, dense)


def _tied_once(model: object) -> dict[str, object]:
    """The state dict without the second name of a tied head."""
    tied = getattr(model.config, "tie_word_embeddings", False)  # type: ignore[attr-defined]
    state: dict[str, object] = model.state_dict()  # type: ignore[attr-defined]
    return {name: tensor for name, tensor in state.items() if not (tied and name.startswith("lm_head."))}
