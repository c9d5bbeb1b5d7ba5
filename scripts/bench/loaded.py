"""Time of a compressed model as `aicompress.load` runs it, against the dense one, by number of tokens.

    python -m scripts.bench.loaded --folder build/bench

Random Llamas of 7, 22 and 135 million parameters, in float32 and bfloat16, with weights of 4 and 8 bits, of 8 bits with
rounded inputs, and as factors that keep four fifths and half of the parameters; passes of both are timed in turn, on as
many threads as OMP_NUM_THREADS says. Prints a Markdown table: the kernels that `load` chose, and the median of the
ratios with its 95 % interval.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aicompress.measure import interleaved, paired_ratio
from aicompress.model.loading.load import load
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.steps import make_plan, run
from aicompress.recipe import load as load_recipe

SIZES = {"7M": (256, 6), "22M": (384, 10), "135M": (576, 30)}  # hidden width, layers
VOCABULARY = 4096
RECIPES = {
    "rtn-w4": ("quantize/rtn-w4", ["method.group_size=32"]),
    "rtn-w8": ("quantize/rtn-w8", []),
    "w8a8": ("quantize/w8a8", []),
    "keep-0.8": ("factorize/svd-keep", ["method.keep=0.8"]),
    "keep-0.5": ("factorize/svd-keep", ["method.keep=0.5"]),
}
TOKENS = ((1, 1), (1, 16), (1, 64), (8, 64))  # batch, length


def write(folder: Path, hidden: int, layers: int) -> None:
    """Write a random Llama in float32."""
    shape = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 32 * 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, **heads, vocab_size=VOCABULARY)).save_pretrained(folder)


def rows(name: str, dense: Path, compressed: Path, rounds: int) -> list[str]:
    """Lines of the table for one model."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        models = [load(path, dtype=dtype) for path in (dense, compressed)]
        kernels = ", ".join(kernel for kernel, _ in Counter(models[1].aicompress_kernels.values()).most_common(2))
        ratios = []
        for batch, length in TOKENS:
            ids = torch.randint(VOCABULARY, (batch, length))
            with torch.inference_mode():
                timings = interleaved([lambda model=model, ids=ids: model(ids) for model in models], rounds)
            middle, low, high = paired_ratio(*timings)
            ratios.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {kernels} | {' | '.join(ratios)} |")
    return lines


def main() -> None:
    """Write the models, quantize them, time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    options = parser.parse_args()
    shown = " | ".join(f"{batch} x {length} tokens" for batch, length in TOKENS)
    print(f"{torch.get_num_threads()} threads\n")
    print(f"| parameters, recipe | dtype | kernels | {shown} |\n|---|---|---|{'---|' * len(TOKENS)}")
    for name, recipe in product(options.sizes, options.recipes):
        dense, compressed = options.folder / "loaded" / name, options.folder / "loaded" / f"{name}-{recipe}"
        if not dense.exists():
            write(dense, *SIZES[name])
        if not compressed.exists():
            name_of_recipe, overrides = RECIPES[recipe]
            command = name_of_recipe.partition("/")[0]
            read = load_recipe(name_of_recipe, command, overrides)
            run(make_plan(dense, Destination(compressed), read, command), Options(latency="off"))
        print("\n".join(rows(f"{name}, {recipe}", dense, compressed, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
