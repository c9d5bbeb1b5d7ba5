"""auto-round: rounding learnt by signed gradients, block by block."""

from __future__ import annotations

from scripts.bench.peers.job import Job, dump, folder_bytes


def auto_round(job: Job) -> None:
    """Symmetric groups, float32, no compiler; saved in its own form, its decoded weights as the output."""
    import shutil

    from auto_round import AutoRound

    model = job.causal()
    rounding = AutoRound(
        model,
        job.tokenizer(),
        bits=job.setting["bits"],
        group_size=job.setting.get("group_size", 64),
        sym=True,
        iters=job.setting["iterations"],
        nsamples=job.samples,
        seqlen=job.length,
        dataset=list(job.windows().split(8)),
        amp=False,
        enable_torch_compile=False,
        device_map="cpu",
    )
    with job.timed("compress_seconds"):
        found, _ = rounding.quantize()
    dump(job, found)
    packed = job.out.with_name(f"{job.out.name}-packed")
    with job.timed("save_seconds"):
        rounding.save_quantized(str(packed), format="auto_round", inplace=True)
    files = [file.parent for file in packed.rglob("*.safetensors")]
    job.finished(folder_bytes(files[0]))
    shutil.rmtree(packed)
