"""Run the chain of Deep Compression on LeNet-300-100 and LeNet-5, and print the paper's table beside what it gave.

    python -m scripts.reproduce_deep_compression --data mnist.npz --folder build/lenet

Han, Mao and Dally, "Deep Compression", ICLR 2016, arXiv:1510.00149, tables 1 to 3: a network is pruned and retrained,
its weights share a few values that are trained on, and what is left is entropy-coded. Here every stage is a command of
`aicompress` with a recipe of configs/deep-compression, and retraining learns the answers of the dense network, which
was trained on deformed images. Everything is chosen and trained on the training images; test images are looked at once,
for the table. A step whose output is there is not run again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from aicompress.checkpoint import Checkpoint
from scripts.lenet.commands import Chain


@dataclass(frozen=True)
class Reported:
    """What the paper reports of a layer: share of weights kept, bits of a kept weight with its index, bytes."""

    kept: float
    bits: float
    bytes: float


@dataclass(frozen=True)
class Paper:
    """What the paper reports of a network: of each layer, errors of the dense and the compressed one, bytes of all."""

    layers: dict[str, Reported]
    errors: tuple[float, float]
    bytes: int


PAPERS = {
    "lenet-300-100": Paper(
        {
            "fc1": Reported(0.08, 4.4 + 3.7, 0.0232 * 4 * 235_200),
            "fc2": Reported(0.09, 4.4 + 4.3, 0.0304 * 4 * 30_000),
            "fc3": Reported(0.26, 4.3 + 3.2, 0.1270 * 4 * 1_000),
        },
        (1.64, 1.58),
        27_000,
    ),
    "lenet-5": Paper(
        {
            "conv1": Reported(0.66, 7.2 + 1.5, 0.6745 * 4 * 500),
            "conv2": Reported(0.12, 7.2 + 3.9, 0.0528 * 4 * 25_000),
            "fc1": Reported(0.08, 4.5 + 4.5, 0.0245 * 4 * 400_000),
            "fc2": Reported(0.19, 5.2 + 3.7, 0.0613 * 4 * 5_000),
        },
        (0.80, 0.74),
        44_000,
    ),
}
# Share of zeros after each round; steps of a retraining, of the last one, and of the centroids: chosen on validation.
ROUNDS = {"lenet-300-100": (0.7, 0.88, 0.94), "lenet-5": (0.7, 0.9, 0.96)}
STEPS = {"lenet-300-100": (1200, 2400, 1000), "lenet-5": (300, 900, 300)}


def retrained(chain: Chain, rounds: int) -> Path:
    """Prune and retrain the dense network so many times."""
    first, last, _ = STEPS[chain.network]
    sparsities = ROUNDS[chain.network]
    dense = current = chain.dense()
    for number, sparsity in enumerate(sparsities[:rounds], start=1):
        pruned = chain.step("prune", current, f"pruned-{number}", "prune.yaml", "--set", f"method.sparsity={sparsity}")
        steps = last if number == len(sparsities) else first
        current = chain.distilled(pruned, dense, f"retrained-{number}", "retrain.yaml", f"training.steps={steps}")
    return current


def compressed(chain: Chain) -> Path:
    """Run the chain; returns the smallest file."""
    pruned = retrained(chain, len(ROUNDS[chain.network]))
    shared = chain.step("quantize", pruned, "shared", "share.yaml")
    steps = f"training.steps={STEPS[chain.network][-1]}"
    return chain.compact(chain.distilled(shared, chain.dense(), "centroids", "centroids.yaml", steps))


@dataclass(frozen=True)
class Layer:
    """A layer as it is stored: its weights, how many do not have the most frequent value, and its bytes."""

    weights: int
    kept: int
    bytes: int


def layers(path: Path) -> dict[str, Layer]:
    """Every layer of a file, without its bias."""
    checkpoint = Checkpoint.open(path)
    sizes: dict[str, Layer] = {}
    for name in checkpoint.parameters():
        if name.endswith(".weight"):
            counts = checkpoint.dense(name).unique(return_counts=True)[1]
            kept = int(counts.sum() - counts.max())  # k-means moves what was zero to the mean of its cluster
            sizes[name.removesuffix(".weight")] = Layer(int(counts.sum()), kept, checkpoint.nbytes(name))
    return sizes


def table(network: str, files: list[Path], errors: list[tuple[float, float]]) -> list[str]:
    """The paper's table of a network beside the means over files."""
    paper, runs = PAPERS[network], [layers(file) for file in files]
    whole = mean(file.stat().st_size for file in files)
    lines = [
        f"| {network} | weights | kept %: paper | ours | bits of a kept weight: paper | ours | bytes: paper | ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, theirs in paper.layers.items():
        own = [run[name] for run in runs]
        kept, size = mean(each.kept for each in own), mean(each.bytes for each in own)
        lines.append(
            f"| {name} | {own[0].weights:,} | {100 * theirs.kept:.0f} | {100 * kept / own[0].weights:.1f} "
            f"| {theirs.bits:.1f} | {8 * size / max(1, kept):.1f} | {theirs.bytes:,.0f} | {size:,.0f} |"
        )
    rest = whole - mean(sum(layer.bytes for layer in run.values()) for run in runs)
    lines.append(f"| biases, names, header | | | | | | | {rest:,.0f} |")
    lines.append(f"| the whole file | | | | | | {paper.bytes:,} | {whole:,.0f} |")
    before, after = (mean(pair[place] for pair in errors) for place in (0, 1))
    theirs = f"{paper.errors[0]:.2f} → {paper.errors[1]:.2f}"
    lines.append(f"| error %, dense → compressed | | | | | | {theirs} | {before:.2f} → {after:.2f} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run the chains and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MNIST: train_images, train_labels, test_images, ...")
    parser.add_argument("--folder", type=Path, default=Path("build/lenet"))
    parser.add_argument("--network", action="append", choices=PAPERS, default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validation", action="store_true", help="measure on the validation images, not the test images"
    )
    options = parser.parse_args(arguments)
    images = "validation" if options.validation else "test"
    for network in options.network or PAPERS:
        files: list[Path] = []
        errors: list[tuple[float, float]] = []
        for seed in range(options.seeds):
            chain = Chain(network, options.data.absolute(), options.folder / network / f"seed-{seed}", seed)
            files.append(compressed(chain))
            errors.append((chain.error(chain.dense(), images), chain.error(files[-1], images)))
        print("\n".join(table(network, files, errors)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
