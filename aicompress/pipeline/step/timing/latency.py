"""Forward times of two checkpoints, measured in turn in one process: the whole model, or the sum over its layers.

What runs a model, or a layer, is imported when one is timed: a step that times nothing does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.measure import WallTimes, interleaved, paired_ratio
from aicompress.pipeline.step.environment import threads
from aicompress.pipeline.step.options import Mode
from aicompress.report.model import Latency

if TYPE_CHECKING:
    from aicompress.pipeline.step.models.running_model import Running

WHOLE = 1_000_000_000  # bytes of weights up to which a step builds both models to time them
BUDGET = 1.5  # seconds that a step spends on counted rounds at most
PER_BYTE = 15e-9  # seconds for a byte of the input: timing a small model must not take longer than compressing it
PER_TOKEN = 32  # multiplications for a token and a byte of the input, above which a forward pass is not waited for
MOST_WRITTEN = 2**29  # numbers that one operator writes
SLOWER = 1.05  # ratio of times from which on an output is called slower
SIZES = {"generates": (1, 128), "encodes": (8, 64)}  # batch, tokens


def compare(before: Checkpoint, after: Checkpoint, mode: Mode = "auto") -> tuple[Latency | None, list[str]]:
    """Time the input and the output of a step, in a few seconds.

    Args:
        before: the input.
        after: the output, where it is written now.
        mode: "auto" times whole models of a Hugging Face directory below WHOLE bytes and layers otherwise; "layers"
            times layers; "off" nothing.

    Returns:
        The latency, and warnings; no latency comes with the reason, unless it was switched off.
    """
    if mode == "off":
        return None, []
    sizes = [sum(ref.spec.nbytes for ref in side.tensors.values()) for side in (before, after)]
    named = before.config is not None and after.config is not None
    warnings: list[str] = []
    if mode == "auto" and named and max(sizes) < WHOLE:
        try:
            latency = _whole_models(before, after, min(BUDGET, PER_BYTE * sizes[0]))
        except CompressError as error:
            warnings.append(f"the whole model could not be timed, its layers were: {error.message}")
        else:
            if latency is not None:
                return latency, [*warnings, *judged(latency)]
            warnings.append("nothing says what the model takes: its layers were timed, not the whole")
    from aicompress.pipeline.step.timing.layer_latency import layers

    latency = layers(before, after)
    if latency is None:
        return None, [*warnings, "latency was not measured: there is no matrix layer"]
    return latency, [*warnings, *judged(latency)]


def judged(latency: Latency | None) -> list[str]:
    """Warn of an output that is slower than the input, or of times from which nobody can tell."""
    if latency is None or latency.low is None or latency.high is None:
        return []
    spread = f"{latency.low:.2f} to {latency.high:.2f} times the input's"
    if not latency.is_measurable:
        return [f"latency is not measurable here: the output took {spread}; give the machine less else to do"]
    return [f"the output is slower here: it took {spread}"] if latency.low > SLOWER else []


def _whole_models(before: Checkpoint, after: Checkpoint, seconds: float) -> Latency | None:
    """Time whole models of two directories; None where nothing says what they take.

    Raises:
        CheckpointError: one of them cannot be run, or would run on and on.
    """
    from aicompress.model.architecture.small_models.bounded_run import MOST_WORK, BoundedRun
    from aicompress.pipeline.step.models.running_model import Setting, example, forward_call

    running = [Setting().start(str(side.path)) for side in (before, after)]
    can_generate = getattr(running[0].module, "can_generate", lambda: False)
    batch, length = SIZES["generates" if can_generate() else "encodes"]
    inputs = example(running[0].module, batch, length)
    if inputs is None:
        return None
    calls = [forward_call(each.module, inputs[0]) for each in running]
    nbytes = sum(ref.spec.nbytes for ref in before.tensors.values())
    with BoundedRun("a forward pass", most=max(MOST_WORK, PER_TOKEN * batch * length * nbytes), largest=MOST_WRITTEN):
        calls[0]()
    timings = interleaved(calls, rounds_within(calls, seconds))
    return latency_of(f"whole model, {inputs[1]}", timings[0], timings[1])


def whole(
    models: Sequence[Running], inputs: tuple[object, str], rounds: int, warmup: int
) -> tuple[Latency, tuple[Latency, ...]]:
    """Time a model and its baselines in turn: A B C A B C ...

    Args:
        models: the tested one, then the baselines.
        inputs: from `example`.
        rounds, warmup: counted and uncounted forward passes of each.

    Returns:
        Against the first baseline (or alone), and against each further one.
    """
    from aicompress.pipeline.step.models.running_model import forward_call

    calls = [forward_call(each.module, inputs[0]) for each in models]  # type: ignore[arg-type]
    tested, *bases = interleaved(calls, rounds, warmup)
    what = f"whole model, {inputs[1]}"
    first = latency_of(what, bases[0] if bases else None, tested)
    return first, tuple(latency_of(what, base, tested) for base in bases[1:])


def rounds_within(calls: Sequence[Callable[[], object]], seconds: float) -> int:
    """Rounds that fit a time, from one timed call of each; between 6 and 30."""
    once = sum(timing.median for timing in interleaved(calls, rounds=1, warmup=1))
    return max(6, min(30, int(seconds / max(once, 1e-9))))


def latency_of(what: str, before: WallTimes | None, after: WallTimes) -> Latency:
    """Medians and 95th percentiles in milliseconds, and the ratio of times in the same round."""
    paired, low, high = (None, None, None) if before is None else paired_ratio(before, after)
    return Latency(
        what=f"{what}, {threads()}",
        before_ms=None if before is None else 1e3 * before.median,
        after_ms=1e3 * after.median,
        before_p95_ms=None if before is None else 1e3 * before.p95,
        after_p95_ms=1e3 * after.p95,
        rounds=len(after.samples),
        paired=paired,
        low=low,
        high=high,
    )
