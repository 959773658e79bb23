"""Whether an implementation is right on the device at hand: what `benchmarks.gpu` asks of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import OPS, TOLERANCES, Op, Shape, evaluate

# 1 = no negatives, then 127 and 129 beside a tile's 128, and no powers of two.
SHAPES: tuple[Shape, ...] = ((1, 64), (2, 3), (127, 64), (129, 512), (1000, 384), (4097, 256))
# As in 4-byte sums of logits of 100, each rounded by a few 1e-6.
_HOT = {torch.float32: 2e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}
_HOT_SCALE = 100.0


@dataclass(frozen=True)
class Subject:
    """One implementation of one op for one dtype of features."""

    name: str
    impl: str
    dtype: torch.dtype
    device: str

    @property
    def op(self) -> Op:
        """The op's entry in the table."""
        return OPS[self.name]

    def __call__(self, *arguments: Tensor) -> Any:
        """Call medfast's function."""
        return self.op.call(*arguments, impl=self.impl)

    def arguments(self, shape: Shape, seed: int = 0) -> tuple[Tensor, ...]:
        """Return arguments for [B, D], the same numbers on every device."""
        made = self.op.inputs(self.op.sizes(*shape), torch.Generator().manual_seed(seed))
        return tuple(
            x.to(self.device, self.dtype if x.is_floating_point() and x.dim() else x.dtype)
            for x in made
        )


def value(subject: Subject, shape: Shape) -> None:
    """Results equal the truth."""
    arguments = subject.arguments(shape)
    _assert_right(subject, arguments, TOLERANCES[subject.dtype])


def saturated(subject: Subject, shape: Shape) -> None:
    """At a scale of 100 every pair wins by far, or loses by far."""
    image, _, *scalars = subject.arguments(shape)
    scalars = [torch.full_like(scalars[0], _HOT_SCALE), *scalars[1:]] if scalars else []
    for text in (image, -image, torch.cat([image[:1], -image[1:]])):
        _assert_right(subject, (image, text, *scalars), _HOT[subject.dtype])


def nan(subject: Subject, shape: Shape) -> None:
    """A feature that is NaN makes the loss NaN."""
    image, *others = subject.arguments(shape)
    image[-1, -1] = torch.nan
    loss = evaluate(subject, (image, *others))[0]
    assert loss.isnan(), f"the loss is {loss.item()}"


def twice(subject: Subject, shape: Shape) -> None:
    """Two runs are equal bit by bit."""
    arguments = subject.arguments(shape)
    _assert_equal(evaluate(subject, arguments), evaluate(subject, arguments))


def compiled(subject: Subject, shape: Shape) -> None:
    """`torch.compile` makes one graph of it."""
    arguments = subject.arguments(shape)
    torch.compiler.reset()
    function = torch.compile(subject, fullgraph=True, backend="aot_eager")
    _assert_near(evaluate(function, arguments), evaluate(subject, arguments))


def stream(subject: Subject, shape: Shape) -> None:
    """It runs on the current stream, not on the default one."""
    arguments = subject.arguments(shape)
    want = evaluate(subject, arguments)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Long enough that work on any other stream would read zeros.
        late = [torch.zeros_like(x) for x in arguments]
        torch.cuda._sleep(20_000_000)
        for x, y in zip(late, arguments, strict=True):
            x.copy_(y)
        found = evaluate(subject, tuple(late))
    side.synchronize()
    _assert_equal(found, want)


def graph(subject: Subject, shape: Shape) -> None:
    """A CUDA graph captures forward and backward, and replays them on new numbers."""
    static = subject.arguments(shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            evaluate(subject, static)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = evaluate(subject, static)
    fresh = subject.arguments(shape, seed=1)
    for x, y in zip(static, fresh, strict=True):
        x.copy_(y)
    captured.replay()
    torch.cuda.synchronize()
    _assert_equal(found, evaluate(subject, fresh))


@dataclass(frozen=True)
class Check:
    """One question, and of what it is asked."""

    ask: Callable[[Subject, Shape], None]
    shapes: tuple[Shape, ...] = ((129, 64),)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    needs_cuda: bool = False
    needs_gradient: bool = False
    needs_pairs: bool = False


CHECKS = (
    Check(value, SHAPES, (torch.float32, torch.bfloat16, torch.float16)),
    Check(saturated, needs_pairs=True),
    Check(nan, needs_gradient=True),
    Check(twice),
    Check(stream, needs_cuda=True),
    # Ranks are no part of a training step.
    Check(graph, needs_cuda=True, needs_gradient=True),
    Check(compiled, dtypes=(torch.float32,), needs_gradient=True),
)


def _assert_right(subject: Subject, arguments: tuple[Tensor, ...], tolerance: float) -> None:
    """Compare with the truth: relative in norm, beside the least step that the dtype has."""
    op = subject.op
    found, truth = evaluate(subject, arguments), op.truth(*arguments)
    for name, got, want in zip(op.results, found, truth, strict=True):
        if not op.has_gradient:
            least, most = want
            got = got[: len(least)]
            outside = ((got < least) | (got > most)).sum().item()
            assert not outside, f"{name}: {outside} of {len(got)} are wrong"
            continue
        error = (got.double() - want).norm().item()
        branches = op.branches if name != "loss" else 0.0
        step = op.noise + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        allowed = (tolerance + branches) * want.norm().item() + step * got.numel() ** 0.5
        # Written so that NaN fails.
        assert error <= allowed, f"{name}: error {error:.1e} > {allowed:.1e}"


def _assert_equal(found: list[Tensor], want: list[Tensor]) -> None:
    for number, (got, wanted) in enumerate(zip(found, want, strict=True)):
        assert torch.equal(got, wanted), f"result {number} differs"


def _assert_near(found: list[Tensor], want: list[Tensor]) -> None:
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
