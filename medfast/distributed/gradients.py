"""The mean of the gradients over all processes, taken while the backward still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medfast.distributed.ring import Ring

# Large enough for a link to be used well, small enough to start before the backward ends.
_BUCKET_BYTES = 25 * 2**20


class GradientMean:
    """Replaces the gradients of parameters by their means over the ranks.

    Parameters that get no gradient, several backwards to a step and heads beside the towers need no
    special care, as they would with DistributedDataParallel. Gradients are sent in buckets in the
    order in which they are ready, which is the same on every rank since the graph is.

    Args:
        parameters: All that are trained and that every rank has whole.
        ring: The ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ring: Ring) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._ring = ring
        self._done: set[nn.Parameter] = set()
        self._waiting: list[nn.Parameter] = []
        self._sent: list[tuple[Any, Tensor, list[nn.Parameter]]] = []

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Send what becomes ready in the backward within the context: the last one of a step."""
        hooks = [p.register_post_accumulate_grad_hook(self._add) for p in self._parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Send what is left and wait for all; then every gradient is the mean."""
        for parameter in self._parameters:
            if parameter.grad is not None and parameter not in self._done:
                self._add(parameter)
        self._send()
        for work, flat, parameters in self._sent:
            work.wait()
            flat /= self._ring.world
            parts = flat.split([p.numel() for p in parameters])
            for parameter, mean in zip(parameters, parts, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(mean.view_as(parameter.grad))
        self._sent.clear()
        self._done.clear()

    def _add(self, parameter: nn.Parameter) -> None:
        if self._waiting and self._waiting[0].dtype != parameter.dtype:
            self._send()
        self._waiting.append(parameter)
        self._done.add(parameter)
        if sum(p.nbytes for p in self._waiting) >= _BUCKET_BYTES:
            self._send()

    def _send(self) -> None:
        if self._waiting:
            flat = torch.cat([p.grad.reshape(-1) for p in self._waiting if p.grad is not None])
            work = dist.all_reduce(flat, group=self._ring.group, async_op=True)
            self._sent.append((work, flat, self._waiting))
            self._waiting = []
