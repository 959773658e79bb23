"""The phases of a training step: one is on at any moment, so that they add up to the step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from medfast.device import forget_peak_memory, peak_memory
from medfast.step import Step

DATA = "data wait"
IMAGE_FORWARD, IMAGE_BACKWARD = "image tower, forward", "image tower, backward"
TEXT_FORWARD, TEXT_BACKWARD = "text tower, forward", "text tower, backward"
LOSS_FORWARD, LOSS_BACKWARD = "loss forward", "loss backward"
COMMUNICATION = "communication"
OPTIMISER = "optimiser"
OTHER = "other"
# In the order of tables and pictures.
PHASES = (
    *(DATA, IMAGE_FORWARD, IMAGE_BACKWARD, TEXT_FORWARD, TEXT_BACKWARD),
    *(LOSS_FORWARD, LOSS_BACKWARD, COMMUNICATION, OPTIMISER, OTHER),
)

# What a step calls of torch.distributed.
_EXCHANGES = ("all_reduce", "all_gather", "reduce_scatter", "batch_isend_irecv")


class Meter(Protocol):
    """What is read where one phase ends and the next begins."""

    def read(self, phase: str | None) -> Any:
        """Return the reading as `phase` begins; None: nothing more is measured."""

    def total(self, spans: Sequence[tuple[Any, Any]]) -> float:
        """Return what a phase took, from the readings at both ends of its parts."""


class Stopwatch:
    """Seconds, as this process sees them."""

    def read(self, phase: str | None) -> float:
        """Return the time."""
        return time.perf_counter()

    def total(self, spans: Sequence[tuple[float, float]]) -> float:
        """Return the sum of the seconds."""
        return sum(end - begin for begin, end in spans)


class GpuStopwatch:
    """Seconds, as a GPU sees them: events in the stream of the steps, which nothing waits for.

    A phase in which the GPU has nothing to do, as it waits for data or for Python, is as long as
    that takes; one that the host only waits in, while the GPU is still busy, takes no time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        # The exchange of sharded weights has streams of its own.
        self._stream = torch.cuda.current_stream(device)

    def read(self, phase: str | None) -> torch.cuda.Event:
        """Return an event that comes once all is done that was asked for before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def total(self, spans: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        """Return the sum of the seconds."""
        for _, end in spans:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3


class PeakMemory:
    """The most bytes in use: the GPU's allocated, else the process's resident ones.

    Args:
        device: Of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self, phase: str | None) -> int:
        """Return the peak since the last reading, and forget it."""
        peak = peak_memory(self._device)
        forget_peak_memory(self._device)
        return peak

    def total(self, spans: Sequence[tuple[int, int]]) -> float:
        """Return the highest peak."""
        return float(max((peak for _, peak in spans), default=0))


class Ranges:
    """Names in the trace of torch's profiler, which has the times."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def read(self, phase: str | None) -> None:
        """End the range before and begin that of `phase`."""
        self._open.close()
        if phase is not None:
            self._open.enter_context(torch.profiler.record_function(phase))

    def total(self, spans: Sequence[tuple[None, None]]) -> float:
        """Return nothing."""
        return 0.0


class Phases:
    """Divides steps into phases.

    Args:
        meter: What to read where one ends and the next begins.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        # The one that is on, and the reading at its begin.
        self.on: str | None = None
        self._since: Any = None
        self._steps: list[dict[str, list[tuple[Any, Any]]]] = []

    def step(self) -> None:
        """Begin a step, which ends the one before: first it waits for its data."""
        self._begin(DATA)
        self._steps.append({phase: [] for phase in PHASES})

    def stop(self) -> None:
        """End the last step."""
        self._begin(None)

    def switch(self, phase: str) -> None:
        """Begin `phase`, which ends the one that is on; before the first step there is none."""
        if self.on not in (None, phase):
            self._begin(phase)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Within the context `phase` is on, but for others within it; then the one before."""
        before = self.on
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before or OTHER)

    def totals(self) -> list[dict[str, float]]:
        """Return what each phase of each step took."""
        return [
            {phase: self._meter.total(spans) for phase, spans in step.items()}
            for step in self._steps
        ]

    def _begin(self, phase: str | None) -> None:
        now = self._meter.read(phase)
        if self.on is not None:
            self._steps[-1][self.on].append((self._since, now))
        self.on, self._since = phase, now


@contextlib.contextmanager
def watched(step: Step, phases: Phases) -> Iterator[None]:
    """Within the context, tell `phases` what `step` is at.

    Hooks of modules tell the forward. Hooks of gradients tell the backward: that of a module has
    begun when the gradient of what it returned is there, and goes on until another one begins, as
    autograd takes last what the forward took first. Projections belong to their tower, the heads of
    a method to its loss; what is computed again for checkpointing belongs to the backward.
    Communication is what torch.distributed is waited for, wherever that happens; what FSDP
    exchanges, on streams of its own, counts to the tower that waits for it, and what kernels
    exchange through symmetric memory to the loss. Once the gradients are there, all that is left of
    a step is the optimiser's.

    Args:
        step: With what the steps of the trainer get their gradients.
        phases: Divides these steps.
    """
    model: Any = step.model
    towers = (
        ("image_tower", "image_projection", "patch_projection"),
        ("text_tower", "text_projection", "token_projection"),
    )
    image, text = ([getattr(model, name) for name in names] for names in towers)
    # A method's heads are called beside its forward.
    loss = [step.method, *step.method.children()]
    backward = _Backward(phases)
    with contextlib.ExitStack() as stack:
        for modules, there, back in (
            (image, IMAGE_FORWARD, IMAGE_BACKWARD),
            (text, TEXT_FORWARD, TEXT_BACKWARD),
            (loss, LOSS_FORWARD, LOSS_BACKWARD),
        ):
            for module in modules:
                # Some methods do without projections of patches and tokens.
                if module is not None:
                    begin_back = partial(backward.comes_to, back)
                    stack.enter_context(_watched_module(module, phases, there, begin_back))
        stack.enter_context(_replaced(step, "backward", partial(_then_optimiser, phases)))
        for name in _EXCHANGES if dist.is_initialized() else ():
            stack.enter_context(_replaced(dist, name, partial(_exchange, phases)))
        yield


class _Backward:
    """Tells `phases` what a backward has come to, and when it is over."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._is_on = False

    def comes_to(self, phase: str, gradient: Tensor) -> None:
        if not self._is_on:
            self._is_on = True
            over = partial(self._over, self._phases.on or OTHER)
            Variable._execution_engine.queue_callback(over)
        self._phases.switch(phase)

    def _over(self, before: str) -> None:
        self._is_on = False
        self._phases.switch(before)


@contextlib.contextmanager
def _watched_module(
    module: nn.Module, phases: Phases, forward: str, begin_backward: Callable[[Tensor], None]
) -> Iterator[None]:
    """Within the context, `forward` is on while the module runs."""
    running = contextlib.ExitStack()

    def enter(*_: Any) -> None:
        running.enter_context(phases.within(forward))

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        running.close()
        for x in _tensors(outputs):
            if x.requires_grad:
                x.register_hook(begin_backward)

    hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors that a tower, a projection, a head or a method returns."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict | tuple):
        for x in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(x)


def _then_optimiser(phases: Phases, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `backward`, of a whole step, after which the optimiser's phase begins."""

    def backward_and_tell(*arguments: Any) -> Any:
        found = backward(*arguments)
        phases.switch(OPTIMISER)
        return found

    return backward_and_tell


def _exchange(phases: Phases, exchange: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch.distributed that counts as communication, as does its wait."""

    def exchange_and_tell(*arguments: Any, **keywords: Any) -> Any:
        with phases.within(COMMUNICATION):
            works = exchange(*arguments, **keywords)
        if isinstance(works, list):
            return [_Work(work, phases) for work in works]
        return None if works is None else _Work(works, phases)

    return exchange_and_tell


class _Work:
    """An exchange that goes on, for which to wait is communication."""

    def __init__(self, work: Any, phases: Phases) -> None:
        self._work, self._phases = work, phases

    def wait(self) -> Any:
        with self._phases.within(COMMUNICATION):
            return self._work.wait()


@contextlib.contextmanager
def _replaced(
    owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the context, a function of `owner` is what `wrap` makes of it."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
