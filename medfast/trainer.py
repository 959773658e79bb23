"""The training loop."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from medfast import checkpoint
from medfast.config import TrainConfig
from medfast.data.loader import Batch, Loader
from medfast.data.skipped import SkippedSamples
from medfast.device import peak_memory_mb
from medfast.distributed import sharding
from medfast.distributed.processes import Processes
from medfast.errors import SharedError, StoppedError, UsageError
from medfast.methods.base import Method
from medfast.models.pair import ImageTextModel
from medfast.optimizers import build_optimizer, learning_rate
from medfast.run_folder import RunFolder
from medfast.step import Step

log = logging.getLogger(__name__)


class Work(NamedTuple):
    """What one step takes.

    Attributes:
        batches: Those of this process.
        pairs: Of all processes.
    """

    batches: Sequence[Batch]
    pairs: int


class Trainer:
    """Trains one model with one method, epoch by epoch.

    With several processes each has batches of its own, and all take the same steps: before each
    they agree on what they found, so that none waits for another that has nothing to do.

    Args:
        config: The run's settings.
        model: The two towers, on `device`.
        method: What turns their features into losses, on `device`.
        loader: Batches of the training split.
        run: Where checkpoints and metrics go.
        skipped: Takes the samples that could not be used.
        device: Where to train.
        validate: Called after each epoch; returns what `metrics.jsonl` keeps of it.
        origin: What checkpoints keep of the run beside its state: its settings as it was begun,
            `config`, for how many processes, `world`, and the fingerprint of its pairs, `data`.
        processes: Those that train together; this one alone by default.
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
        origin: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.method = method
        self.loader = loader
        self.run = run
        self.skipped = skipped
        self.device = device
        self.validate = validate
        self.origin = origin or {}
        self.processes = processes or Processes()
        # That the process was asked to end, by SIGTERM.
        self.is_asked_to_stop = False
        modules = nn.ModuleList([model, method])
        self.optimizer = build_optimizer(config, modules.parameters())
        self.one_step = Step(model, method, device, config.precision, config.torchcompile)
        # Batches that a step takes.
        self.parts = min(config.accum_freq, len(loader))
        # What is left over at the end of an epoch is no whole step.
        self.steps_per_epoch = len(loader) // self.parts
        self.total_steps = config.epochs * self.steps_per_epoch
        self.epoch = 0
        # Of the present epoch, steps that are done, those with nothing to contrast included.
        self.epoch_step = 0
        self.step = 0
        self.samples = 0

    def fit(self) -> None:
        """Train the epochs that are left; checkpoint and validate after each.

        Raises:
            StoppedError: a process was asked to end by SIGTERM; a checkpoint was written.
        """
        before = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            self._fit()
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask_to_stop(self, *_: Any) -> None:
        self.is_asked_to_stop = True

    def _fit(self) -> None:
        epochs = self.config.epochs
        is_shown = sys.stderr.isatty() and self.processes.is_first
        with tqdm(
            total=self.total_steps, initial=self.step, unit="step", disable=not is_shown
        ) as bar:
            while self.epoch < epochs and not self.processes.by_first(self._is_stalled):
                self._train_epoch(bar)
                self.epoch, self.epoch_step = self.epoch + 1, 0
                if self.epoch % self.config.save_frequency == 0 or self.epoch == epochs:
                    self.save()
                # All of them, as parts of sharded weights are with all; one figure counts.
                found = self.processes.from_first(self.validate())
                self.run.append_metrics(
                    {"kind": "validation", "step": self.step, "epoch": self.epoch, **found}
                )
                shown = ", ".join(f"{name} {value:.1%}" for name, value in found["metrics"].items())
                log.info("epoch %d/%d: validation %s", self.epoch, epochs, shown)
                if self.config.early_stop and self.processes.by_first(self._is_best):
                    self._save_best()
        # Since the last step; what is left to do, evaluation, may take longer than there is time.
        if any(stop for (stop,) in self.processes.numbers(self.is_asked_to_stop)):
            self._stop()
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
            self._load_weights(best)

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        weights = sharding.like(state["state_dict"], self.model.state_dict())
        self.model.load_state_dict(weights)
        self.method.load_state_dict(state["method"])

    def _train_epoch(self, bar: tqdm) -> None:
        self.model.train()
        self.method.train()
        before, begun = self.step, self.epoch_step
        waiting = time.perf_counter()
        for batches, pairs in self.steps():
            started = time.perf_counter()
            lr = learning_rate(self.config, self.step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses, norm = self.train_step(batches)
            self.step += 1
            self.samples += pairs
            bar.update()
            last = self.step % self.steps_per_epoch == 0
            every = self.config.save_steps
            saves = every > 0 and self.step % every == 0 and not last
            # No checkpoint is written of a step whose loss nobody looked at.
            if self.step == 1 or self.step % self.config.log_every == 0 or last or saves:
                row = self._describe(losses, norm, lr, pairs, waiting, started)
                self.run.append_metrics(row)
                log.info("%s", _line(row, self.total_steps), extra={"progress": True})
            if saves:
                self.save()
            waiting = time.perf_counter()
        if self.step == before and begun == 0:
            raise SharedError(
                "no batch held two usable training pairs, so nothing was trained; see "
                f"{self.run.skipped}."
            )

    def steps(self) -> Iterator[Work]:
        """Yield what each step takes that is left of the epoch and has pairs to contrast.

        Raises:
            StoppedError: a process was asked to end; a checkpoint was written.
            UsageError: too many samples cannot be used, or a process has no more data.
        """
        batches = self.loader.epoch(self.epoch, self.epoch_step * self.parts)
        while self.epoch_step < self.steps_per_epoch:
            step = list(itertools.islice(batches, self.parts))
            pairs = self._agree(step)
            self.epoch_step += 1
            if pairs:
                yield Work([batch for batch in step if len(batch)], pairs)

    def _agree(self, step: Sequence[Batch]) -> int:
        """Return the pairs of all processes in a step, or 0 if it is to be left out."""
        skipped = [sample for batch in step for sample in batch.skipped]
        sizes = [len(batch) for batch in step]
        of_all = self.processes.numbers(
            sum(sizes), len(sizes), min(sizes, default=0), len(skipped), self.is_asked_to_stop
        )
        pairs, present, smallest, unusable, stops = zip(*of_all, strict=True)
        if any(stops):
            self._stop()
        if min(present) < self.parts:
            raise SharedError(
                f"the data of rank {present.index(min(present))} ended within epoch "
                f"{self.epoch + 1}, before those of the others; are its files the same?"
            )
        if any(unusable):
            try:
                for samples in self.processes.objects(skipped):
                    self.skipped.add(samples)
            except UsageError as error:
                raise SharedError(str(error)) from None
        if self.processes.world > 1 and min(smallest) == 0:
            # Without a pair a process has no gradient to add, but the others would wait for it.
            rank = smallest.index(0)
            log.warning("a batch of rank %d holds no usable pair: the step is left out", rank)
            return 0
        return sum(pairs) if sum(pairs) >= 2 else 0

    def _stop(self) -> None:
        self.save()
        raise StoppedError(
            f"asked to stop (SIGTERM) and saved at step {self.step}; go on with --resume latest, "
            "or the same command with --resume auto."
        )

    def train_step(self, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """Take one step on the pairs of `batches`; return its loss terms and the gradient's norm.

        The terms and the norm are those before the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.one_step.backward(batches)
        scaler = self.one_step.scaler
        scaler.unscale_(self.optimizer)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        norm = sharding.clip_gradients(parameters, self.config.grad_clip_norm)
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
            SharedError: the loss is not finite.
        """
        values = {name: loss.item() for name, loss in losses.items()}
        total = sum(self.method.weights[name] * value for name, value in values.items())
        if not math.isfinite(total):
            raise SharedError(
                f"the loss is {total} at step {self.step} ({values}){self._whose_fault()}: lower "
                "--lr, or train with --precision fp32."
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
        """Write a checkpoint from which `restore` goes on bitwise.

        Raises:
            UsageError: it cannot be written.
        """
        state, keep = self._state(), self.config.keep_checkpoints
        self.processes.by_first(lambda: checkpoint.save(self.run.checkpoints, state, keep))

    def _save_best(self) -> None:
        state = self._state()
        self.processes.by_first(lambda: checkpoint.save_best(self.run.checkpoints, state))

    def _whose_fault(self) -> str:
        """Return which ranks alone had features that were not finite, for a message."""
        unsound = self.one_step.unsound
        if unsound is None or not unsound.any() or unsound.all():
            return ""
        ranks = ", ".join(str(rank) for rank in unsound.nonzero().flatten().tolist())
        return f"; first the features of rank {ranks} alone were not finite"

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds; all processes must ask."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "step": self.step,
            "samples": self.samples,
            "name": self.run.path.name,
            **self.origin,
            "state_dict": sharding.whole(self.model.state_dict()),
            "method": self.method.state_dict(),
            "optimizer": sharding.whole(self.optimizer.state_dict()),
            "scaler": self.one_step.scaler.state_dict(),
            # Of every process.
            "random": self.processes.objects(random),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `save` wrote.

        Raises:
            UsageError: it belongs to another model.
        """
        try:
            self._load_weights(state)
            moments = sharding.optimizer_state_like(state["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(moments)
            self.one_step.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                "--resume: the checkpoint does not fit the run's model "
                f"({str(error).strip().splitlines()[-1].strip()}); was its tokenizer replaced?"
            ) from None
        # A process more than there were has its own already, by the seed.
        if self.processes.rank < len(state["random"]):
            random = state["random"][self.processes.rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self.device)
        self.epoch, self.epoch_step = state["epoch"], state["epoch_step"]
        self.step, self.samples = state["step"], state["samples"]


def _line(row: dict[str, Any], total_steps: int) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in row["losses"].items())
    return (
        f"step {row['step']}/{total_steps} epoch {row['epoch']:.2f}: loss {row['loss']:.3f} "
        f"({losses}), {row['samples_per_s']:.0f} samples/s, data {row['data_s']:.3f} s, "
        f"step {row['step_s']:.3f} s, lr {row['lr']:.2e}, scale {row['logit_scale']:.1f}, "
        f"grad norm {row['grad_norm']:.2f}, peak memory {row['memory_mb']:.0f} MB"
    )
