"""Make the smallest LeNets that keep an error, and print what they take beside what is known.

    python -m scripts.lenet.records --data mnist.npz --folder build/lenet
    python -m scripts.lenet.records --encoder all-MiniLM-L6-v2 --pairs stsb-dev.tsv --folder build/lenet

Every network is compressed and measured by commands of `aicompress`; a result is the mean of the seeds, in bytes of the
whole file. Rates are constants, set after one trial on validation images; test images are looked at once for a result.
A step whose output is there is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from scripts import encoder_records
from scripts.lenet.commands import Chain
from scripts.reproduce_deep_compression import compressed, retrained

# Where 98 % of a layer are zeros, steps of a quarter of its deviation are too fine to become coarse in so few steps.
COARSE = ("mode.step=1.0", "training.batch=128", "training.held_out=0.01")


def by_bits(rate: float, steps: int, rounds: int, *settings: str) -> Callable[[Chain], Path]:
    """Entropy-penalised retraining of a network that was pruned and retrained so many times.

    Args:
        settings: of the recipe, beside these.
    """

    def made(chain: Chain) -> Path:
        name = f"epr-{rate:g}-{steps}"
        chosen = (f"mode.rate={rate}", f"training.steps={steps}", f"training.evaluate_every={steps}", *settings)
        coded = chain.distilled(retrained(chain, rounds), chain.dense(), name, "../distill/epr.yaml", *chosen)
        return chain.compact(coded, f"{name}-compact")

    return made


@dataclass(frozen=True)
class Record:
    """A row of the table.

    Attributes:
        network: which.
        way: how the file is made, in words.
        make: makes it.
        most: percent of errors and bytes that it may take.
        known: the best that is known, in words.
    """

    network: str
    way: str
    make: Callable[[Chain], Path]
    most: tuple[float, int]
    known: str


RECORDS = (
    Record("lenet-300-100", "classic chain", compressed, (1.64, 20_000), "27 KB at 1.58 % (Deep Compression)"),
    Record("lenet-300-100", "epr", by_bits(1.2, 2500, 3), (1.64, 9_000), "27 KB at 1.58 % (Deep Compression)"),
    Record("lenet-300-100", "epr, fewer bytes", by_bits(2.0, 2500, 3), (1.90, 8_500), "8.56 KB at 1.9 % (EPR)"),
    Record(
        "lenet-5", "epr", by_bits(1.5, 2500, 2, *COARSE), (0.80, 10_000), "44 KB at 0.74 %; 3.03 KB at 0.69 % (MIRACLE)"
    ),
)


HEAD = "| network | way | bytes | error % | of each seed | to reach | | known |\n|---|---|---:|---:|---|---|---|---|"


def line(record: Record, files: list[Path], errors: list[float]) -> str:
    """One row of the table: met, or missed."""
    size, wrong = mean(file.stat().st_size for file in files), mean(errors)
    met = wrong <= record.most[0] and size <= record.most[1]
    each = ", ".join(f"{file.stat().st_size:,} at {error:.2f}" for file, error in zip(files, errors, strict=True))
    return (
        f"| {record.network} | {record.way} | {size:,.0f} | {wrong:.2f} | {each} "
        f"| {record.most[1]:,} at {record.most[0]:.2f} | {'met' if met else 'missed'} | {record.known} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Make every record and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="MNIST: train_images, train_labels, test_images, ...: for LeNets")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2: for the rows of encoder_records")
    parser.add_argument("--pairs", type=Path, help="sentence pairs with scores that it is judged on: stsb-dev.tsv")
    parser.add_argument("--folder", type=Path, default=Path("build/lenet"))
    parser.add_argument("--network", action="append", default=[], help="this one alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--validation", action="store_true", help="measure on the validation images, not the test images"
    )
    options = parser.parse_args(arguments)
    if (options.encoder is None) != (options.pairs is None) or (options.encoder is None and options.data is None):
        parser.error("give --data, or --encoder with --pairs, or all three")
    images = "validation" if options.validation else "test"
    if options.data is not None:
        print(HEAD, flush=True)
    for record in RECORDS if options.data is not None else ():
        if options.network and record.network not in options.network:
            continue
        folder = options.folder / record.network
        chains = [Chain(record.network, options.data.absolute(), folder / f"seed-{s}", s) for s in range(options.seeds)]
        files = [record.make(chain) for chain in chains]
        errors = [chain.error(file, images) for chain, file in zip(chains, files, strict=True)]
        print(line(record, files, errors), flush=True)
    if options.encoder is not None:
        for text in encoder_records.table(options.encoder, options.pairs, options.folder / "encoder"):
            print(text, flush=True)


if __name__ == "__main__":
    main()
