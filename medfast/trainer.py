"""The training loop."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from medfast import checkpoint
from medfast.config import TrainConfig
from medfast.data.loader import Batch, Loader
from medfast.data.skipped import SkippedSamples
from medfast.device import peak_memory_mb
from medfast.errors import UsageError
from medfast.methods.base import Method
from medfast.models.pair import ImageTextModel
from medfast.optimizers import build_optimizer, learning_rate
from medfast.run_folder import RunFolder
from medfast.step import Step

log = logging.getLogger(__name__)


class Trainer:
    """Trains one model with one method, epoch by epoch.

    Args:
        config: The run's settings.
        model: The two towers, on `device`.
        method: What turns their features into losses, on `device`.
        loader: Batches of the training split.
        run: Where checkpoints and metrics go.
        skipped: Takes the samples that could not be used.
        device: Where to train.
        validate: Called after each epoch; returns what `metrics.jsonl` keeps of it.
        data: The fingerprint of the training pairs, which checkpoints keep.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ImageTextModel,
        method: Method,
        loader: Loader,
        run: RunFolder,
        skipped: SkippedSamples,
        device: torch.device,
        validate: Callable[[], dict[str, Any]],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.method = method
        self.loader = loader
        self.run = run
        self.skipped = skipped
        self.device = device
        self.validate = validate
        self.data = data
        modules = nn.ModuleList([model, method])
        self.optimizer = build_optimizer(config, modules.parameters())
        self.one_step = Step(model, method, device, config.precision)
        # What is left over at the end of an epoch is no whole step.
        self.steps_per_epoch = max(1, len(loader) // config.accum_freq)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.epoch = 0
        # Of the present epoch, batches that are done, those with nothing to contrast included.
        self.batch = 0
        self.step = 0
        self.samples = 0

    def fit(self) -> None:
        """Train the epochs that are left; checkpoint and validate after each."""
        epochs = self.config.epochs
        with tqdm(
            total=self.total_steps, initial=self.step, unit="step", disable=not sys.stderr.isatty()
        ) as bar:
            while self.epoch < epochs and not self._is_stalled():
                self._train_epoch(bar)
                self.epoch, self.batch = self.epoch + 1, 0
                if self.epoch % self.config.save_frequency == 0 or self.epoch == epochs:
                    self.save()
                found = self.validate()
                self.run.append_metrics(
                    {"kind": "validation", "step": self.step, "epoch": self.epoch, **found}
                )
                shown = ", ".join(f"{name} {value:.1%}" for name, value in found["metrics"].items())
                log.info("epoch %d/%d: validation %s", self.epoch, epochs, shown)
                if self.config.early_stop and self._is_best():
                    checkpoint.save_best(self.run.checkpoints, self._state())
        if self.config.early_stop:
            self._take_best()

    def _validation_losses(self) -> list[float]:
        """Return the loss of each validation so far; one that is not finite counts as infinite."""
        rows = (row for row in self.run.read_metrics() if row["kind"] == "validation")
        return [math.inf if row["loss"] is None else row["loss"] for row in rows]

    def _is_best(self) -> bool:
        """Return whether no epoch had a lower validation loss than the last."""
        losses = self._validation_losses()
        return losses[-1] <= min(losses)

    def _is_stalled(self) -> bool:
        """Return whether the last epochs brought no lower validation loss."""
        wait = self.config.early_stop
        if wait == 0:
            return False
        losses = self._validation_losses()
        return wait < len(losses) and min(losses[:-wait]) <= min(losses[-wait:])

    def _take_best(self) -> None:
        """Go back to the weights of the epoch with the lowest validation loss."""
        best = checkpoint.load(checkpoint.best(self.run.checkpoints))
        if best["epoch"] != self.epoch:
            log.info("the weights of epoch %d had the lowest validation loss", best["epoch"])
            self.model.load_state_dict(best["state_dict"])
            self.method.load_state_dict(best["method"])

    def _train_epoch(self, bar: tqdm) -> None:
        self.model.train()
        self.method.train()
        before, begun = self.step, self.batch
        waiting = time.perf_counter()
        for batches in self.steps():
            pairs = sum(map(len, batches))
            if pairs < 2:  # nothing to contrast
                waiting = time.perf_counter()
                continue
            started = time.perf_counter()
            lr = learning_rate(self.config, self.step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses, norm = self.train_step(batches)
            self.step += 1
            self.samples += pairs
            bar.update()
            last = self.step % self.steps_per_epoch == 0
            if self.step == 1 or self.step % self.config.log_every == 0 or last:
                row = self._describe(losses, norm, lr, pairs, waiting, started)
                self.run.append_metrics(row)
                log.info("%s", _line(row, self.total_steps), extra={"progress": True})
            every = self.config.save_steps
            if every and self.step % every == 0 and not last:
                self.save()
            waiting = time.perf_counter()
        if self.step == before and begun == 0:
            raise UsageError(
                "no batch held two usable training pairs, so nothing was trained; see "
                f"{self.run.skipped}."
            )

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step that is left of the epoch, without empty ones."""
        batches = self.loader.epoch(self.epoch, self.batch)
        parts = min(self.config.accum_freq, len(self.loader))
        for _ in range(self.batch, self.steps_per_epoch * parts, parts):
            step = list(itertools.islice(batches, parts))
            for batch in step:
                self.skipped.add(batch.skipped)
            self.batch += parts
            yield [batch for batch in step if len(batch)]

    def train_step(self, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """Take one step on the pairs of `batches`; return its loss terms and the gradient's norm.

        The terms and the norm are those before the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.one_step.backward(batches)
        scaler = self.one_step.scaler
        scaler.unscale_(self.optimizer)
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip_norm or math.inf)
        scaler.step(self.optimizer)
        scaler.update()
        self.model.clamp_logit_scale()
        return losses, norm

    def _describe(
        self,
        losses: dict[str, Tensor],
        norm: Tensor,
        lr: float,
        pairs: int,
        waiting: float,
        started: float,
    ) -> dict[str, Any]:
        """Return the row of `metrics.jsonl` for the step that has just ended.

        Raises:
            UsageError: the loss is not finite.
        """
        values = {name: loss.item() for name, loss in losses.items()}
        total = sum(self.method.weights[name] * value for name, value in values.items())
        if not math.isfinite(total):
            raise UsageError(
                f"the loss is {total} at step {self.step} ({values}): lower --lr, or train with "
                "--precision fp32."
            )
        done = time.perf_counter()
        return {
            "kind": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "samples": self.samples,
            "samples_per_s": pairs / (done - waiting),
            "lr": lr,
            "logit_scale": self.model.logit_scale.exp().item(),
            "loss": total,
            "losses": values,
            "grad_norm": norm.item(),
            "data_s": started - waiting,
            "step_s": done - started,
            "memory_mb": peak_memory_mb(self.device),
        }

    def save(self) -> None:
        """Write a checkpoint from which `restore` goes on bitwise."""
        checkpoint.save(self.run.checkpoints, self._state(), self.config.keep_checkpoints)

    def _state(self) -> dict[str, Any]:
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "samples": self.samples,
            "name": self.run.path.name,
            "config": dataclasses.asdict(self.config),
            "data": self.data,
            "state_dict": self.model.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.one_step.scaler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `save` wrote.

        Raises:
            UsageError: it belongs to another model.
        """
        try:
            self.model.load_state_dict(state["state_dict"])
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.one_step.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                "--resume: the checkpoint does not fit the run's model "
                f"({str(error).strip().splitlines()[-1].strip()}); was its tokenizer replaced?"
            ) from None
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.step, self.samples = state["step"], state["samples"]


def _line(row: dict[str, Any], total_steps: int) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in row["losses"].items())
    return (
        f"step {row['step']}/{total_steps} epoch {row['epoch']:.2f}: loss {row['loss']:.3f} "
        f"({losses}), {row['samples_per_s']:.0f} samples/s, data {row['data_s']:.3f} s, "
        f"step {row['step_s']:.3f} s, lr {row['lr']:.2e}, scale {row['logit_scale']:.1f}, "
        f"grad norm {row['grad_norm']:.2f}, peak memory {row['memory_mb']:.0f} MB"
    )
