"""The training loop: AdamW on the student's stored tensors, the best held-out weights kept, resumable to the bit.

What is drawn is a function of seed and step: the order of samples, and the noise of a mean teacher. Otherwise both
models run without dropout, and always with fixed batch statistics. So a resumed run needs weights, averages, moments
and counters only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aicompress.errors import CompressError, OutOfSpace, listed
from aicompress.pipeline.distillation.data.samples import Batch
from aicompress.pipeline.distillation.loop.log import TrainingLog
from aicompress.pipeline.distillation.loop.setup import TrainingSetup
from aicompress.pipeline.distillation.loop.state import UNSHARED, Point, StateFile, TrainingHistory, TrainingTensors
from aicompress.pipeline.distillation.teachers.mean_teacher import READS, judged
from aicompress.pipeline.distillation.teachers.teacher import are_numbers
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters, optimizer, rate
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe.distillation import Training

SHOWN = 8  # samples that an error names


class Trainer:
    """One training run.

    Args:
        setup: models, loss and data.
        trained: the parameters.
        settings: the recipe's training section, its precision resolved.
        state: where the first process saves the run, and all resume it.
        team: the processes that train together.
        watched: names of parameters whose movement, -Σ w g over the steps, is added up.

    Attributes:
        log: what is told every step's numbers; None tells nobody.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        trained: TrainedParameters,
        settings: Training,
        state: StateFile,
        team: Processes,
        watched: Sequence[str] = (),
    ) -> None:
        self.setup, self.trained, self.settings, self.state, self.team = setup, trained, settings, state, team
        self.device = next(iter(trained.parameters.values())).device
        self.optimizer = optimizer(trained, settings)
        self.history = TrainingHistory()
        self.log: TrainingLog | None = None
        self.unsaved = 0  # states that a full disk did not take
        average = {n: p.detach().clone() for n, p in trained.parameters.items()} if settings.ema else {}
        if setup.averaged is not None:
            average = setup.averaged.parameters
        movement = {name: torch.zeros_like(trained.parameters[name], requires_grad=False) for name in watched}
        self.tensors = TrainingTensors(trained.parameters, self.optimizer, average, movement, setup.shards)

    def run(self, progress: Progress, save_seconds: float) -> None:
        """Train to the last step, or as long as patience lasts, then restore the best weights.

        Raises:
            CompressError: a loss or gradient is not a number.
        """
        settings, history = self.settings, self.history
        if not history.curve:
            self.measure()
        saved = time.perf_counter()
        while history.step < settings.steps and not self.lost_patience:
            start = time.perf_counter()
            told = self._step()
            history.seconds += time.perf_counter() - start
            self._tell(told)
            if history.step % settings.evaluate_every == 0 or history.step == settings.steps:
                self.measure()
            if self._is_due(time.perf_counter() - saved >= save_seconds):
                self._save()
                saved = time.perf_counter()
            progress(self._line(told), history.step, settings.steps)
        if history.best_step:
            self.tensors.put(self.tensors.best)

    @property
    def lost_patience(self) -> bool:
        """Whether too many measurements in a row were no better than the best one."""
        patience = self.settings.patience
        return patience is not None and self.history.since_best >= patience

    def _tell(self, values: Mapping[str, float]) -> None:
        """Log numbers of the step that is done."""
        if self.log is not None:
            self.log.add(self.history.step, values)

    def _line(self, told: Mapping[str, float]) -> str:
        """What a user sees while it trains."""
        history = self.history
        number, unit = (history.tokens, "tokens") if history.tokens else (history.samples, "samples")
        speed = f"{number / max(history.seconds, 1e-9):,.0f} {unit}/s"
        rate = f"rate {told['learning_rate']:.2g}"
        return f"loss {told['loss']:.4g}, held out {history.curve[-1].held_out:.4g}, {rate}, {speed}"

    def _is_due(self, now: bool) -> bool:
        """Whether the first process is to save the state; the others help it where the student is divided."""
        if not self.setup.shards.divided:
            return now and self.team.rank == 0
        return bool(self.team.send(torch.tensor(int(now), device=self.device)))

    def _save(self) -> None:
        """Save the state; where the disk is full the one before stays, and training goes on."""
        tensors = self.tensors.saved()
        try:
            if self.team.rank == 0:
                self.state.save(self.history, tensors)
        except OutOfSpace:
            self.unsaved += 1

    def resume(self) -> None:
        """Restore the saved state; do nothing where there is none.

        Raises:
            CompressError: not every process sees the same state.
        """
        saved = self.state.load()
        step = torch.tensor(0 if saved is None else saved[0].step, device=self.device)
        if int(self.team.total(step.clone())) != int(step) * self.team.size:
            raise CompressError(*UNSHARED)
        if saved is None:
            return
        self.history, tensors = saved
        self.tensors.restore({name: tensor.to(self.device) for name, tensor in tensors.items()})

    def _step(self) -> dict[str, float]:
        """Take one optimizer step; its numbers by name."""
        settings, history, start = self.settings, self.history, time.perf_counter()
        whole = self.setup.split.at(history.step)
        mine = whole[self.team.rank :: self.team.size]
        loss = torch.zeros((), device=self.device)
        for number, (part, counted) in enumerate(self._parts(whole, mine)):
            batch = self.setup.samples.batch(part).to(self.device)
            draw = (history.step * settings.accumulate + number) * self.team.size + self.team.rank
            share = self._loss(batch, draw) * (counted * self.team.size / len(whole))
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
            history.tokens += _tokens(batch) * self.team.size
        shards = self.setup.shards
        gradients = shards.gradients(self.trained.parameters)
        self.team.average([*shards.own(gradients), loss])
        self._mask_gradients()
        for name, total in self.tensors.movement.items():
            parameter = self.trained.parameters[name]
            if parameter.grad is not None:
                total.addcmul_(parameter.detach(), parameter.grad, value=-1)
        norm = shards.norm(gradients, self.team)
        self._require_finite(float(loss), float(norm), mine if len(mine) else whole[:1])
        if settings.clip is not None:
            nn.utils.clip_grads_with_norm_(self.trained.parameters.values(), settings.clip, norm)
        factor = rate(history.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.setup.averaged is not None:
            self.setup.averaged.follow(self.trained.parameters, history.step)
        else:
            for name, tensor in self.tensors.average.items():
                tensor.lerp_(self.trained.parameters[name].detach(), 1 - (settings.ema or 0))
        history.step += 1
        history.running += float(loss)
        history.samples += len(whole)
        speed = {"samples_per_second": len(whole) / (time.perf_counter() - start)}
        return {
            "loss": float(loss),
            "learning_rate": settings.learning_rate * factor,
            "gradient_norm": float(norm),
        } | speed

    def _parts(self, whole: Tensor, mine: Tensor) -> list[tuple[Tensor, int]]:
        """What this process runs in a step, one after the other, and how many of it count.

        All processes run as often, since a divided model runs in all at once: one that has fewer samples runs one of
        which nothing counts.
        """
        most = len(whole[:: self.team.size].chunk(self.settings.accumulate))
        own = [(part, len(part)) for part in mine.chunk(self.settings.accumulate) if len(part)]
        return own + [(whole[:1], 0)] * (most - len(own))

    def _loss(self, batch: Batch, draw: int) -> Tensor:
        """The training loss; `draw` numbers the batches of all steps and processes."""
        setup, precision, done = self.setup, self.settings.precision, self.history.step / self.settings.steps
        if setup.averaged is not None:
            return setup.averaged.loss(setup.student, setup.loss, batch, (precision, draw, done))
        loss = setup.loss(setup.student(batch, setup.loss.reads, precision), setup.teacher(batch, precision), done)
        return loss if setup.recoding is None else loss + setup.recoding.cost(done, draw)

    def _judged(self, batch: Batch) -> Tensor:
        """The held-out loss, in float32: of a student with its average for a teacher, cross-entropy with the labels."""
        if self.setup.averaged is not None:
            return judged(self.setup.student(batch, READS, "fp32"))
        return self.setup.loss(
            self.setup.student(batch, self.setup.loss.reads, "fp32"), self.setup.teacher(batch, "fp32")
        )

    def _mask_gradients(self) -> None:
        """Zero the gradients of zeros that stay: without moments AdamW leaves them exactly zero."""
        for name, zero in self.trained.zeros.items():
            gradient = self.trained.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(zero, 0)

    def _require_finite(self, loss: float, norm: float, index: Tensor) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self._require_teacher(index)
        shown = listed(index.tolist(), SHOWN)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise CompressError(
            f"{what} at step {self.history.step + 1}, on samples {shown}: nothing is written",
            "lower training.learning_rate, lengthen training.warmup, or set training.precision: fp32",
        )

    @torch.no_grad()
    def _require_teacher(self, index: Tensor) -> None:
        """Refuse a teacher that gives no numbers for one of some samples.

        Raises:
            CompressError: it does.
        """
        for sample in torch.split(index, 1):
            if not are_numbers(self.setup.teacher(self.setup.samples.batch(sample).to(self.device), "fp32")):
                raise CompressError(
                    f"the teacher gives NaN or infinite outputs for sample {int(sample)}: nothing is written",
                    "`aicompress verify` checks a checkpoint, and `aicompress eval` what it gives for the data",
                )

    @torch.no_grad()
    def measure(self) -> None:
        """Measure the held-out loss of the weights as they would be stored, and keep the best."""
        history = self.history
        since = history.step - (history.curve[-1].step if history.curve else 0)
        with self._as_stored() as candidate:
            loss = self._held_out()
            if not math.isfinite(loss):
                self._require_teacher(self.setup.split.held_out)
                raise CompressError(f"the held-out loss is {loss} at step {history.step}", "check teacher and data")
            # Codes take fewer bits with every step, for which the loss may rise: the last ones are kept.
            better = bool(history.curve) and (self.setup.recoding is not None or loss < history.best)
            if better:
                self.tensors.best = {name: tensor.clone() for name, tensor in candidate.items()}
        history.curve.append(Point(history.step, history.running / since if since else None, loss))
        self._tell({"held_out": loss})
        history.running = 0.0
        if better:
            history.best_step = history.step

    @contextmanager
    def _as_stored(self) -> Iterator[dict[str, Tensor]]:
        """Put in the averaged weights where there are some, rounded to their stored dtypes, while the context lasts."""
        own = {name: parameter.detach().clone() for name, parameter in self.trained.parameters.items()}
        source = self.tensors.average or own
        candidate = {name: tensor.to(self.trained.dtypes[name]).float() for name, tensor in source.items()}
        self.tensors.put(candidate)
        try:
            yield candidate
        finally:
            self.tensors.put(own)

    def _held_out(self) -> float:
        """Mean loss of the held-out samples, in float32."""
        split, team, total = self.setup.split, self.team, torch.zeros(2, dtype=torch.float64)
        batches = list(split.in_order(split.held_out, split.batch))
        for number in range(team.rank, -(-len(batches) // team.size) * team.size, team.size):
            index = batches[min(number, len(batches) - 1)]  # all run as often: a divided model runs in all at once
            loss = float(self._judged(self.setup.samples.batch(index).to(self.device)))
            if number < len(batches):
                total += torch.tensor([loss * len(index), len(index)], dtype=torch.float64)
        total = team.total(total)
        return float(total[0] / total[1])


def _tokens(batch: Batch) -> int:
    mask = batch.inputs.get("attention_mask", batch.inputs.get("input_ids"))
    if mask is None:
        return 0
    return int(mask.sum()) if "attention_mask" in batch.inputs else mask.numel()
