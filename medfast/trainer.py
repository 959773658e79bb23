"""The training loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from medfast import checkpoint
from medfast.config import TrainConfig
from medfast.data.loader import Batch, Loader
from medfast.data.skipped import SkippedSamples
from medfast.device import autocast, peak_memory_mb
from medfast.errors import UsageError
from medfast.methods.base import Method
from medfast.models.pair import ImageTextModel
from medfast.run_folder import RunFolder

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
    ) -> None:
        self.config = config
        self.model = model
        self.method = method
        self.loader = loader
        self.run = run
        self.skipped = skipped
        self.device = device
        self.validate = validate
        self.optimizer = build_optimizer(config, nn.ModuleList([model, method]))
        self.total_steps = config.epochs * len(loader)
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
            while self.epoch < epochs:
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

    def _train_epoch(self, bar: tqdm) -> None:
        self.model.train()
        self.method.train()
        before, begun = self.step, self.batch
        waiting = time.perf_counter()
        for batch in self.loader.epoch(self.epoch, begun):
            self.skipped.add(batch.skipped)
            self.batch += 1
            if len(batch) < 2:  # nothing to contrast
                waiting = time.perf_counter()
                continue
            started = time.perf_counter()
            lr = learning_rate(self.config, self.step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses, norm = self.train_step(batch.to(self.device))
            self.step += 1
            self.samples += len(batch)
            bar.update()
            last = self.step % len(self.loader) == 0
            if self.step == 1 or self.step % self.config.log_every == 0 or last:
                row = self._describe(losses, norm, lr, len(batch), waiting, started)
                self.run.append_metrics(row)
                log.info("%s", _line(row, self.total_steps), extra={"progress": True})
            every = self.config.save_steps
            if every and self.step % every == 0 and self.batch < len(self.loader):
                self.save()
            waiting = time.perf_counter()
        if self.step == before and begun == 0:
            raise UsageError(
                "no batch held two usable training pairs, so nothing was trained; see "
                f"{self.run.skipped}."
            )

    def train_step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Take one step on a batch; return its loss terms and the norm of its gradient."""
        with autocast(self.config.precision, self.device):
            features = self.model(batch.images, batch.ids, batch.mask)
        losses = self.method(features, batch)
        total = sum(self.method.weights[name] * loss for name, loss in losses.items())
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip_norm or math.inf)
        self.optimizer.step()
        self.model.clamp_logit_scale()
        return {name: loss.detach() for name, loss in losses.items()}, norm

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
            "epoch": self.step / len(self.loader),
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
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "samples": self.samples,
            "name": self.run.path.name,
            "config": dataclasses.asdict(self.config),
            "state_dict": self.model.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save(self.run.checkpoints, state, self.config.keep_checkpoints)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `save` wrote.

        Raises:
            UsageError: it belongs to another model.
        """
        try:
            self.model.load_state_dict(state["state_dict"])
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
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


def build_optimizer(config: TrainConfig, modules: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with no weight decay on vectors and scalars."""
    parameters = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.wd},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _line(row: dict[str, Any], total_steps: int) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in row["losses"].items())
    return (
        f"step {row['step']}/{total_steps} epoch {row['epoch']:.2f}: loss {row['loss']:.3f} "
        f"({losses}), {row['samples_per_s']:.0f} samples/s, data {row['data_s']:.3f} s, "
        f"step {row['step_s']:.3f} s, lr {row['lr']:.2e}, scale {row['logit_scale']:.1f}, "
        f"grad norm {row['grad_norm']:.2f}, peak memory {row['memory_mb']:.0f} MB"
    )
