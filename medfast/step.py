"""The gradient of one step: the loss of the whole batch, however many parts it is encoded in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfast.data.loader import Batch
from medfast.data.tokens import NOT_PREDICTED, Masked
from medfast.device import autocast
from medfast.distributed.batch_norm import SyncBatchNorm
from medfast.distributed.gradients import GradientMean
from medfast.distributed.sharding import is_sharded
from medfast.methods.base import Method
from medfast.models.pair import Features, ImageTextModel


class Step:
    """Losses and gradients of a model and a method.

    Contrast needs the features of all pairs at once, the towers those of one part of the batch at
    a time. With several parts the features are cached (Gao 2021, arXiv 2101.06983): the towers
    encode every part without keeping activations, heads and losses take the features of the whole
    batch, and the towers encode every part again, now with the gradient of its features. The
    gradient is that of the whole batch; towers with batch norm alone see the statistics of a part.

    Where several ranks train, each with batches of its own, losses and gradients are those of the
    pairs of all of them.

    Attributes:
        unsound: Of each rank, whether it had features that are not finite in the first step in
            which any had, bool [W]: a step later all have. None for one rank.

    Args:
        model: The towers.
        method: What turns their features into losses.
        device: Where they are.
        precision: Of towers and heads, a value of --precision.
        compiled: Train the towers compiled; elsewhere the model is as it was.
    """

    def __init__(
        self,
        model: ImageTextModel,
        method: Method,
        device: torch.device,
        precision: str,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.method = method
        self.device = device
        self.precision = precision
        # fp16 has too little range for small gradients; without it this does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")
        self.unsound: Tensor | None = None
        towers = (model.image_tower, model.text_tower) if compiled else ()
        self._compiled: dict[nn.Module, Callable[..., Any]] = {
            tower: torch.compile(tower.forward) for tower in towers
        }
        # What waits for other ranks is left out of the graphs.
        norms = (m for tower in towers for m in tower.modules() if isinstance(m, SyncBatchNorm))
        self._compiled |= {norm: torch.compiler.disable(norm.forward) for norm in norms}
        parameters = nn.ModuleList([model, method]).parameters()
        # Those of parts come as means already.
        own = [p for p in parameters if not is_sharded(p)]
        self._gradients = None if method.ring is None else GradientMean(own, method.ring)

    def backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Add the gradient of the batch that the parts `batches` make up; return its loss terms."""
        if len(batches) == 1:
            batch = batches[0].to(self.device)
            features = self._encode(batch)
            losses = self._losses(features, batch)
            with self._averaging():
                self._backward([self.scaler.scale(self._total(losses))])
            return self._of_all_ranks(losses, features)
        cached, states = [], []
        with torch.no_grad(), _batch_statistics_left_alone(self.model):
            for batch in batches:
                states.append(self._random_state())
                cached.append(self._encode(batch.to(self.device)))
        after = self._random_state()
        whole = _leaves(cached)
        losses = self._losses(whole, _joined_batch(batches).to(self.device))
        self._backward([self.scaler.scale(self._total(losses))])
        leaves = whole.parts()
        starts = dict.fromkeys(leaves, 0)
        for number, (batch, state, before) in enumerate(zip(batches, states, cached, strict=True)):
            # The same dropout as in the first pass.
            self._set_random_state(state)
            again = self._encode(batch.to(self.device)).parts()
            trained, gradients = [], []
            for name, part in before.parts().items():
                rows = slice(starts[name], starts[name] + len(part))
                starts[name] = rows.stop
                gradient = leaves[name].grad
                if gradient is not None and again[name].requires_grad:
                    trained.append(again[name])
                    # Captions of this part may all be shorter than the longest of the batch.
                    gradients.append(gradient[rows, : part.shape[1]])
            is_last = number + 1 == len(batches)
            with self._averaging() if is_last else contextlib.nullcontext():
                if trained:
                    self._backward(trained, gradients)
        self._set_random_state(after)
        return self._of_all_ranks(losses, whole)

    def _encode(self, batch: Batch) -> Features:
        with autocast(self.precision, self.device), _in_place(self._compiled):
            return self.method.encode(self.model, batch)

    def _losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.precision, self.device):
            features = self.method.heads(features)
        return self.method(replace(features, logit_scale=self.model.logit_scale.exp()), batch)

    def _backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None
    ) -> None:
        # Checkpointed activations are computed again: not to be noticed twice.
        with _batch_statistics_left_alone(self.model):
            torch.autograd.backward(outputs, gradients)

    @contextlib.contextmanager
    def _averaging(self) -> Iterator[None]:
        """Within the context, the last backward of a step, take the means over the ranks."""
        if self._gradients is None:
            yield
            return
        with self._gradients.in_backward():
            yield
        self._gradients.finish()

    def _of_all_ranks(self, losses: Mapping[str, Tensor], features: Features) -> dict[str, Tensor]:
        """Return the losses of the pairs of all ranks, and note whose features are not finite."""
        own = {name: loss.detach() for name, loss in losses.items()}
        ring = self.method.ring
        if ring is None:
            return own
        sums = torch.stack([x.detach().float().sum() for x in features.parts().values()])
        unsound = torch.zeros(ring.world, device=sums.device)
        unsound[ring.rank] = (~sums.isfinite()).any()
        terms = torch.stack(list(own.values())).float()
        means = ring.mean(torch.cat([terms, unsound]))
        found = means[len(own) :] > 0
        # Without a look at the values, for which a GPU would have to be waited for.
        was = found if self.unsound is None else self.unsound
        self.unsound = torch.where(was.any(), was, found)
        return dict(zip(own, means[: len(own)], strict=True))

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        terms = [self.method.weights[name] * loss for name, loss in losses.items()]
        return torch.stack(terms).sum()

    def _random_state(self) -> tuple[Tensor, ...]:
        on_device = self.device.type == "cuda"
        here = torch.get_rng_state()
        return (here, torch.cuda.get_rng_state(self.device)) if on_device else (here,)

    def _set_random_state(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.device)


def _leaves(parts: Sequence[Features]) -> Features:
    """Return the features of the whole batch, as leaves that take its gradient."""
    names = parts[0].parts()
    joined = {name: _joined([part.parts()[name] for part in parts]) for name in names}
    return parts[0].with_parts({name: x.requires_grad_() for name, x in joined.items()})


def _joined_batch(batches: Sequence[Batch]) -> Batch:
    """Return the batch that the parts make up, but for its pixels, which only towers need."""
    parts = [batch.masked for batch in batches if batch.masked is not None]
    masked = None
    if parts:
        labels = _joined([part.labels for part in parts], NOT_PREDICTED)
        masked = Masked(_joined([part.ids for part in parts]), labels)
    return Batch(
        images=batches[0].images.new_empty(0),
        ids=_joined([batch.ids for batch in batches]),
        mask=_joined([batch.mask for batch in batches]),
        word_mask=_joined([batch.word_mask for batch in batches]),
        group=_joined([batch.group for batch in batches]),
        index=_joined([batch.index for batch in batches]),
        masked=masked,
    )


def _joined(parts: Sequence[Tensor], padding: int = 0) -> Tensor:
    """Return rows under one another, the second of several sizes padded to the longest."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    sides = (0,) * (2 * parts[0].ndim - 4)
    return torch.cat([F.pad(x, (*sides, 0, longest - x.shape[1]), value=padding) for x in parts])


@contextlib.contextmanager
def _in_place(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within the context, modules have other forwards than those of their classes."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


@contextlib.contextmanager
def _batch_statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Within the context, batch norm does not take notice of what it sees."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        # A copy is counted up. Without statistics it would save other tensors for the backward.
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
