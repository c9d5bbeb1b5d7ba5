"""The runs: every shipped recipe on the input that it fits, and combinations of steps that no recipe shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

STEPS = ("factorize", "quantize", "prune", "distill")
LEFT_OUT = {"prune/width-latency": "its widths follow from the measured time of the layers"}

# By patterns of recipe names: what they need on models of this size, and what beside a recipe.
SETTINGS: dict[str, tuple[str, ...]] = {
    "factorize/svd-bytes": ("method.target_bytes=500kB",),
    "factorize/svd-rank": ("method.rank=32",),
    "distill/student-config": ("student.config=inputs/student.json",),
    "distill/student-layers": ("student.layers=2",),
    "prune/depth-half": ("method.keep_layers=2",),
    "prune/width-bytes": ("method.target_bytes=700kB",),
    "prune/wanda-search-bytes": ("method.target_bytes=500kB",),
    "prune/channels-cnn*": ("model.factory=scripts.output_digests.checkpoints:Cnn",),
    "quantize/gptq-auto-bytes": ("method.target_bytes=150kB",),
    "quantize/gptq-auto-groups": ("method.group_sizes=[16, 32, 64]", "method.target_bpw=2.5"),
    "quantize/qera-w3": ("method.rank=8",),
    "quantize/rtn-w4": ("method.group_size=64",),
}
SOURCES = {
    "factorize/spatial-*": "cnn.safetensors",
    "factorize/tucker-*": "cnn.safetensors",
    "prune/channels-mlp*": "mlp.safetensors",
    "prune/channels-cnn*": "cnn.safetensors",
    "prune/channels-resnet": "resnet",
    "prune/experts-*": "mixtral",
    "quantize/watersic-encoder*": "bert",
    "prune/movement-50": "distill/kl",
    "distill/kl": "prune/width-20",
    "distill/kl-hidden": "prune/depth-2",
    "distill/scales": "quantize/gptq-w2",
    "distill/masked": "prune/magnitude-50",
    "distill/norms": "quantize/rtn-w3",
    "distill/blocks": "quantize/rtn-w3",
    "distill/factors": "factorize/svd-keep",
    "distill/codes": "quantize/gptq-w2",
    "distill/mse": "classifier/width",
    "distill/mlp-labels": "prune/channels-mlp",
    "distill/dkd": "prune/channels-mlp",
    "distill/epr": "mlp.safetensors",
    "distill/mean-teacher": "mlp.safetensors",
    "distill/embedding": "bert/width",
    "distill/embedding-relation": "bert/hidden",
}
TEACHERS: dict[str, str | None] = {
    "distill/mse": "classifier",
    "distill/mlp-labels": "mlp.safetensors",
    "distill/dkd": "mlp.safetensors",
    "distill/epr": "mlp.safetensors",
    "distill/mean-teacher": None,
    "distill/embedding*": "bert",
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "prune/channels-cnn*": ("--allow-code",),
    "prune/movement-50": ("--stats", "distill/kl/stats.safetensors"),
    "distill/kl": ("--stats", "distill/kl/stats.safetensors"),
    "distill/kl-stored": ("--cache-teacher", "distill/kl-stored/signals"),
}
DATA = {
    "calibration": {"text": ("samples=8", "length=32"), "arrays": ("samples=32",)},
    "data": {"text": ("length=32",), "arrays": ()},
}
INPUTS = "inputs"  # folder of the checkpoints and the data
FILES = {"text": f"{INPUTS}/text.txt", "arrays": f"{INPUTS}/arrays.npz"}
TRAINING = ("training.steps=4", "training.batch=4", "training.evaluate_every=2")
NARROW = ("method.group_size=32",)  # for layers that 64 does not divide


@dataclass(frozen=True)
class Run:
    """One call of the command line.

    Attributes:
        name: of the run, and of the folder that it writes into.
        recipe: a shipped recipe.
        source: an input, or an earlier run.
        reference: the checkpoint that a distillation learns from and an evaluation compares with, or None.
        settings: edits of the recipe, KEY=VALUE.
        options: further arguments.
    """

    name: str
    recipe: str
    source: str
    reference: str | None = None
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return self.recipe.split("/")[0]


def shipped(configs: Path) -> list[Run]:
    """A run of every recipe that compresses or trains."""
    paths = [path for step in STEPS for path in sorted((configs / step).glob("*.yaml"))]
    names = [path.relative_to(configs).with_suffix("").as_posix() for path in paths]
    return [_of_recipe(configs, name) for name in names if name not in LEFT_OUT]


def _of_recipe(configs: Path, recipe: str, name: str = "", source: str = "", settings: Iterable[str] = ()) -> Run:
    """A run of a recipe on its own input or a given one; its data is short, and its settings are added to."""
    plain = yaml.safe_load((configs / f"{recipe}.yaml").read_text(encoding="utf-8"))
    training = recipe.startswith("distill/")
    return Run(
        name or recipe,
        recipe,
        source or _matching(SOURCES, recipe, "llama"),
        _matching(TEACHERS, recipe, "llama") if training else None,
        (*_data(plain), *_matching(SETTINGS, recipe, ()), *(TRAINING if training else ()), *settings),
        _matching(OPTIONS, recipe, ()) if not name else (),
    )


def _matching(table: Mapping[str, Any], recipe: str, otherwise: Any) -> Any:
    """The value of the first pattern that a recipe's name matches."""
    return next((value for pattern, value in table.items() if fnmatch(recipe, pattern)), otherwise)


def _data(plain: Mapping[str, Any]) -> list[str]:
    """Settings that lead the data sections of a recipe to the short inputs."""
    settings: list[str] = []
    for section, sizes in DATA.items():
        for kind in (kind for kind in sizes if kind in plain.get(section, {})):
            settings += [f"{section}.{part}" for part in (f"{kind}={FILES[kind]}", *sizes[kind])]
    return settings


def combined(configs: Path) -> list[Run]:
    """Chains, other architectures, several files, reduced precision, kept statistics and evaluations."""
    steps: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "chain/factorize": ("factorize/svd-keep", "prune/width-20", ()),
        "chain/quantize": ("quantize/rtn-w4", "chain/factorize", ("method.granularity=channel",)),
        "low-rank/gptq": ("quantize/gptq-w4", "factorize/svd-rank", NARROW),
        "low-rank/magnitude": ("prune/magnitude-50", "factorize/svd-rank", ()),
        "low-rank/distill": ("distill/kl", "factorize/svd-keep", ()),
        "sparse/rtn": ("quantize/rtn-w4", "prune/magnitude-90-sparse", ()),
        "sparse/gptq": ("quantize/gptq-w4", "prune/sparsegpt-2-4-permuted", ()),
        "sparse/distill": ("distill/kl", "prune/magnitude-90-sparse", ()),
        "codes/distill": ("distill/scales", "sparse/rtn", ()),
        "codes/wanda": ("prune/wanda-50", "quantize/gptq-w4", ()),
        "codes/width": ("prune/width-20", "quantize/rtn-w8", ()),
        "codes/best": ("quantize/gptq-w2-best", "prune/width-50", ()),
        "bits/levels": ("quantize/rtn-w8", "llama", ("levels=[{layers: '0-1', skip: true}]",)),
        "bits/pad": ("quantize/rtn-w4-asymmetric", "llama", ("method.group_size=48", "method.pad=true")),
        "bf16/rtn": ("quantize/rtn-w4", "llama-bf16", ()),
        "bf16/gptq": ("quantize/gptq-w4", "llama-bf16", ()),
        "bf16/svd": ("factorize/svd-keep", "llama-bf16", ()),
        "bf16/sparse": ("prune/magnitude-90-sparse", "llama-bf16", ()),
        "bf16/width": ("prune/width-obs", "llama-bf16", ()),
        "bf16/hadamard": ("quantize/hadamard-w4", "llama-bf16", ()),
        "bf16/distill": ("distill/kl", "bf16/width", ()),
        "bert/width": ("prune/width-20", "bert", ()),
        "bert/hidden": ("prune/hidden-norm", "bert", ()),
        "bert/heads": ("prune/heads-obs", "bert", ()),
        "bert/depth": ("prune/depth-2", "bert", ()),
        "bert/w8a8": ("quantize/w8a8", "bert", ()),
        "bert/embeddings": ("quantize/rtn-w8-embeddings", "bert", ()),
        "bert/smoothquant": ("quantize/smoothquant-w8a8", "bert", ()),
        "bert/gptq": ("quantize/gptq-w4", "bert", ()),
        "classifier/width": ("prune/width-20", "classifier", ()),
        "mixtral/rtn": ("quantize/rtn-w4", "mixtral", ()),
        "mixtral/gptq": ("quantize/gptq-w4", "mixtral", ()),
        "mixtral/wanda": ("prune/wanda-50", "mixtral", ()),
        "mixtral/svd": ("factorize/svd-keep", "mixtral", ()),
        "mlp/rtn": ("quantize/rtn-w4-channel", "mlp.safetensors", ()),
        "mlp/kmeans": ("quantize/kmeans-w4", "mlp.safetensors", ()),
        "mlp/svd": ("factorize/svd-energy", "mlp.safetensors", ()),
        "mlp/sparse": ("prune/magnitude-90-sparse", "mlp.safetensors", ()),
        "mlp/sparse-rtn": ("quantize/rtn-w4-channel", "mlp/sparse", ()),
        "wide/rtn": ("quantize/rtn-w4", "wide.safetensors", ()),
        "wide/sparse": ("prune/magnitude-2-4", "wide.safetensors", ()),
        "cnn/rtn": ("quantize/rtn-w8", "cnn.safetensors", ("select.kinds=[linear, conv]",)),
    }
    runs = [_of_recipe(configs, recipe, name, source, more) for name, (recipe, source, more) in steps.items()]
    return [*runs, *_with_options(configs), *_evaluations()]


def _with_options(configs: Path) -> list[Run]:
    """Runs with arguments of their own: statistics that are written and read again, output in several files."""
    kept = ("--stats", "stats/written/stats.safetensors")
    small = ("--max-shard-size", "100kB")
    return [
        replace(_of_recipe(configs, recipe, name, source), options=options)
        for name, recipe, source, options in (
            ("stats/written", "quantize/gptq-w4", "llama", kept),
            ("stats/read", "quantize/awq-w4", "llama", kept),
            ("shards/rtn", "quantize/rtn-w8", "llama", small),
            ("shards/width", "prune/width-20", "llama-bf16", small),
            ("effort/gptq", "quantize/gptq-w3", "llama", ("--effort", "balanced")),
        )
    ]


def _evaluations() -> list[Run]:
    """Evaluations of outputs beside their originals; nothing is timed."""
    text = (f"text={FILES['text']}", "samples=16", "length=32")
    language = ("latency=null", *(f"quality.perplexity.{part}" for part in text))
    sentences = ("latency=null", *(f"quality.embedding.{part}" for part in text))
    images = ("latency=null", f"quality.accuracy.arrays={FILES['arrays']}")
    return [
        Run("eval/gptq", "eval/language-model", "quantize/gptq-w4", "llama", language),
        Run("eval/width", "eval/language-model", "prune/width-obs", "llama", language),
        Run("eval/sparse-codes", "eval/language-model", "sparse/rtn", "llama", language),
        Run("eval/w8a8", "eval/sentence-encoder", "bert/w8a8", "bert", sentences),
        Run("eval/mlp", "eval/mnist-mlp", "mlp/rtn", "mlp.safetensors", images),
    ]


def all_runs(configs: Path) -> dict[str, Run]:
    """Every run by name, each after those whose outputs it reads."""
    runs = {run.name: run for run in (*shipped(configs), *combined(configs))}
    return {name: runs[name] for name in TopologicalSorter(needs(runs)).static_order()}


def needs(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """For each run those whose outputs it reads."""
    return {name: [other for other in _read(run) if other in runs and other != name] for name, run in runs.items()}


def _read(run: Run) -> list[str]:
    """What a run reads, run or not: its source, its reference, and the folders of its statistics."""
    files = [str(Path(option).parent) for option in run.options]
    return [part for part in (run.source, run.reference, *files) if part is not None]


def selected(runs: Mapping[str, Run], pattern: str) -> dict[str, Run]:
    """The runs whose names match, with all that they read."""
    before = needs(runs)
    wanted: set[str] = set()
    for name in reversed(runs):  # a run comes after those that it reads
        if fnmatch(name, pattern) or name in wanted:
            wanted |= {name, *before[name]}
    return {name: run for name, run in runs.items() if name in wanted}
