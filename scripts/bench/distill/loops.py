"""What distillation is beside: training on labels alone, and the least loop that does the same work."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

RATE, WARMUP, CLIP, HELD_OUT = 3e-4, 0.1, 1.0, 0.05  # of language models, as the recipes' training has them
MEASURED = 20  # times that the held-out loss is measured, beside that of the weights as they came


@dataclass(frozen=True)
class Settings:
    """How a loop trains.

    Attributes:
        minutes: of training.
        seed: of the order.
        length, batch: tokens in a window, windows in a step.
    """

    minutes: float
    seed: int
    length: int
    batch: int


class Perceptron(nn.Module):
    """Three layers with ReLU over images (batch, 28, 28)."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(images.flatten(1))))))


def windows(model: Path, text: Path, settings: Settings) -> tuple[Iterator[Tensor], Tensor]:
    """Batches of windows of a text without end, (batch, length), and windows that are never among them."""
    from aicompress.data import Data, token_windows
    from aicompress.model.loading.tokenizer import load_tokenizer

    ids, _ = token_windows(Data(text=str(text), length=settings.length), load_tokenizer(model))
    generator = torch.Generator().manual_seed(settings.seed)
    held_out, train = ids[torch.randperm(len(ids), generator=generator)].tensor_split((round(HELD_OUT * len(ids)),))

    def endless() -> Iterator[Tensor]:
        while True:
            for index in torch.randperm(len(train), generator=generator).split(settings.batch):
                if len(index) == settings.batch:
                    yield train[index]

    return endless(), held_out


def step_of(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], None]:
    """A function that takes one step of AdamW on a batch, at a factor of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)

    def step(batch: Tensor, factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        loss(batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cross_entropy(source: Path, text: Path, out: Path, settings: Settings, random: bool) -> None:
    """Train a language model on the next tokens of a text for the minutes; from random weights, or its own.

    The weights with the least loss on held-out windows are saved, those that it came with among them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aicompress.pipeline.distillation.plan import resolved_precision
    from aicompress.pipeline.distillation.teachers.teacher import autocast

    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if random:
        model = type(model)(model.config)
    model.train()
    precision = resolved_precision("auto")  # as in what it is beside

    def loss(batch: Tensor) -> Tensor:
        with autocast("cpu", precision):
            return model(input_ids=batch, labels=batch, use_cache=False).loss

    step, (batches, held_out) = step_of(model, loss), windows(source, text, settings)
    best, kept, marks = math.inf, {}, 0
    seconds, start, done = settings.minutes * 60, time.perf_counter(), 0.0
    while done < 1:
        done = min(1.0, (time.perf_counter() - start) / seconds)
        if done * MEASURED >= marks:
            marks = int(done * MEASURED) + 1
            with torch.no_grad():
                now = fmean(float(loss(part)) for part in held_out.split(settings.batch))
            if now < best:
                best, kept = now, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        falling = 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))
        step(next(batches), done / WARMUP if done < WARMUP else falling)
    model.load_state_dict(kept)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def bare(model: Path, layers: int, text: Path, steps: int, settings: Settings) -> float:
    """Samples a second of a loop that learns the whole model's next-token probabilities with its first layers."""
    from transformers import AutoModelForCausalLM

    teacher, student = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(2))
    del student.model.layers[layers:]

    def loss(batch: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = teacher(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        ours = student(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        logs = (functional.log_softmax(ours, dim=-1), functional.log_softmax(theirs, dim=-1))
        return functional.kl_div(*logs, reduction="batchmean", log_target=True)

    step, (batches, _) = step_of(student, loss), windows(model, text, settings)
    given = [next(batches) for _ in range(steps)]
    start = time.perf_counter()
    for batch in given:
        step(batch, 1.0)
    return steps * settings.batch / (time.perf_counter() - start)


def drawn_perceptron(path: Path, seed: int) -> None:
    """Save a perceptron 784-100-50-10 of random weights."""
    torch.manual_seed(seed)
    save_file(dict(Perceptron(784, 100, 50, 10).state_dict()), path)


def perceptron(data: Path, path: Path, epochs: int) -> None:
    """Train a perceptron 784-300-100-10 on labels and save it.

    Images are shifted by up to two pixels, as those of the teacher in Hinton et al. 2015, arXiv:1503.02531, section 3.
    """
    torch.manual_seed(0)
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["train_images"]).float().div(255)
        labels = torch.from_numpy(arrays["train_labels"]).long()
    model = Perceptron(784, 300, 100, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            down, right = torch.randint(-2, 3, (2,)).tolist()
            shifted = images[index].roll((down, right), (1, 2))  # the margins are empty
            functional.cross_entropy(model(shifted), labels[index]).backward()
            optimizer.step()
    save_file(dict(model.state_dict()), path)
