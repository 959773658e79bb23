"""One comparison: every variant of an op at one size, its result checked and then timed.

`python -m benchmarks.compare clip_loss 8192 512 --only open_clip 'medfast cpu*'` prints one as
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.conditions import allocator
from benchmarks.measure import Run, interleave, mm_rates
from benchmarks.ops import OPS, TOLERANCES, Op, Shape, errors, evaluate, with_gradient
from benchmarks.peers import Variant, variants
from medfast.ops.matmul import multiplies_bf16

# No power of two, and past the tiles of 128: the most of any size but the first and the last.
_SMALL = 129
# Products are timed in row chunks of this size, as a fused loss would compute them.
_CHUNK = {"cpu": 1024, "cuda": 8448}


def compare(
    name: str,
    shape: Shape,
    *,
    device: str = "cpu",
    passes: str = "both",
    only: Sequence[str] = ("*",),
    without: Sequence[str] = (),
    seconds: float = 20.0,
    clock: str = "device",
    least: int = 3,
    with_memory: bool = True,
) -> dict[str, Any]:
    """Check all variants of an op at one size, time those that are right, and return the figures.

    A variant of medfast's that is wrong or raises has its row say so under "failed"; a peer that
    cannot run has the reason under "skipped", and its errors are noted, whatever they are.

    Args:
        name: The op.
        shape: Its sizes, as `OPS[name].inputs` takes them.
        device: "cpu" or "cuda".
        passes: "forward", "backward" or "both".
        only: Patterns of names of the variants to take.
        without: Patterns of those to leave out of these.
        seconds: About how long to time.
        clock: As in `measure.interleave`.
        least: As in `measure.interleave`.
        with_memory: Whether to measure peak memory too.
    """
    op = OPS[name]
    passes = passes if op.has_gradient else "forward"
    chosen = {
        variant.name: variant
        for variant in variants(name, shape, device)
        if _matches(variant.name, only) and not _matches(variant.name, without)
    }
    rows = {title: _row(variant) for title, variant in chosen.items()}
    runs = {}
    for title, variant in chosen.items():
        if variant.skip is None:
            rows[title].update(_check(name, shape, device, variant))
        if not rows[title].keys() & {"skipped", "failed"}:
            runs[title] = bind(op, variant, _case(name, shape, device, variant.dtype)[0], passes)
    products = [product for part in _parts(passes) for product in op.products(shape).get(part, [])]
    flops = sum(2 * m * k * n for m, k, n in products)
    timings = (
        interleave(runs, seconds=seconds, device=device, clock=clock, least=least) if runs else {}
    )
    mm: dict[str, dict[str, float]] = {}
    for title, timing in timings.items():
        variant, row = chosen[title], rows[title]
        ceiling, mm[row["dtype"]] = _ceiling(tuple(products), variant.dtype, device)
        share = variant.share
        row |= {
            **timing.row(share),
            "tflops": flops * share / timing.median / 1e12,
            "percent_of_mm": 100 * ceiling * share / timing.median,
        }
        if with_memory:
            row["peak_bytes"] = _peak(name, shape, device, passes, variant, runs[title])
    return comparison(name, shape, rows.values(), device, passes, clock) | {"mm_tflops": mm}


def comparison(
    op: str,
    shape: Sequence[int],
    rows: Iterable[dict[str, Any]],
    device: str = "cpu",
    passes: str = "both",
    clock: str = "wall",
) -> dict[str, Any]:
    """Return rows, however they were measured, with what reports and targets must know of them."""
    return {
        "op": op,
        "shape": list(shape),
        "device": device,
        "passes": passes,
        "clock": clock if device == "cuda" else "wall",
        "allocator": allocator() if device == "cpu" else "torch",
        "rows": list(rows),
    }


def failures(comparison: dict[str, Any]) -> list[str]:
    """Return what went wrong with medfast's variants, one sentence each."""
    return [
        f"{comparison['op']} {comparison['shape']}, {row['variant']}: {row['failed']}"
        for row in comparison["rows"]
        if "failed" in row
    ]


def fastest(comparison: dict[str, Any]) -> Run | None:
    """Return the fastest of medfast's variants, ready to run again; None if none has run."""
    rows = [row for row in comparison["rows"] if row["own"] and "median_s" in row]
    if not rows:
        return None
    best = min(rows, key=lambda row: row["median_s"])["variant"]
    name, shape, device = comparison["op"], tuple(comparison["shape"]), comparison["device"]
    variant = next(v for v in variants(name, shape, device) if v.name == best)
    arguments = _case(name, shape, device, variant.dtype)[0]
    return bind(OPS[name], variant, arguments, comparison["passes"])


def bind(op: Op, variant: Variant, arguments: tuple[Tensor, ...], passes: str) -> Run:
    """Return what to time: a variant on these arguments, forward, backward or both."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]

    def forward() -> Any:
        with _settings(variant):
            return variant.function(*leaves)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        with _settings(variant):
            return torch.autograd.grad(loss, with_gradient(leaves))

    if passes == "forward":
        return Run(forward)
    if passes == "backward":
        return Run(backward, setup=lambda: (forward(),))
    return Run(lambda: backward(forward()))


@functools.lru_cache(maxsize=2)
def _case(
    name: str, shape: Shape, device: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return an op's arguments, the features in `dtype`, and the truth for just these."""
    arguments = _arguments(name, shape, device, dtype)
    return arguments, OPS[name].truth(*arguments)


def _arguments(name: str, shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = OPS[name].inputs(shape, torch.Generator(device).manual_seed(0))
    return tuple(x.to(dtype) if x.is_floating_point() and x.dim() else x for x in made)


def _check(name: str, shape: Shape, device: str, variant: Variant) -> dict[str, Any]:
    """Return a row's "errors", and "failed" or "skipped" where the variant must not be timed."""
    small = _small(name, shape)
    try:
        # A peer may refuse odd sizes.
        for size in [small, shape] if variant.own else [shape]:
            arguments, truth = _case(name, size, device, variant.dtype)
            with _settings(variant):
                found = evaluate(variant.function, arguments)
            if variant.share < 1:
                return {}
            if not variant.own:  # it may have no backward
                truth = truth[: len(found)]
            off = errors(OPS[name], found, truth)
            allowed = TOLERANCES[variant.dtype] if OPS[name].has_gradient else 0.0
            # Written so that NaN fails.
            wrong = {
                key: error
                for key, error in off.items()
                if not error <= allowed + (key != "loss") * OPS[name].branches
            }
            if variant.own and wrong:
                return {"errors": off, "failed": f"errors at {list(size)} of {wrong} > {allowed}"}
    except Exception as error:
        # Peers fail in their own ways: out of memory, no compiler, an unsupported GPU.
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return {"failed" if variant.own else "skipped": reason}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"errors": off}


def _small(name: str, shape: Shape) -> Shape:
    first, *middle, last = shape
    return (min(first, OPS[name].few), *(min(size, _SMALL) for size in middle), last)


def _row(variant: Variant) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variant": variant.name,
        "own": variant.own,
        "dtype": str(variant.dtype).removeprefix("torch."),
    }
    if variant.share < 1:
        row["share"] = variant.share
    if variant.skip is not None:
        row["skipped"] = variant.skip
    return row


@functools.lru_cache(maxsize=8)
def _ceiling(
    products: tuple[tuple[int, int, int], ...], dtype: torch.dtype, device: str
) -> tuple[float, dict[str, float]]:
    """Return the seconds that `torch.mm` takes for the products, and its TFLOP/s for each."""
    chunks = [(min(m, _CHUNK[device]), k, n) for m, k, n in products]
    rates = mm_rates(chunks, dtype, device)
    seconds = sum(
        2 * m * k * n / rates[chunk] for (m, k, n), chunk in zip(products, chunks, strict=True)
    )
    return seconds, {f"[{m},{k}]x[{k},{n}]": rate / 1e12 for (m, k, n), rate in rates.items()}


def _peak(
    name: str, shape: Shape, device: str, passes: str, variant: Variant, run: Run
) -> int | None:
    if device == "cuda":
        return memory.cuda_growth(run)
    if variant.compiles:
        return None  # the compiler's own memory would count
    return memory.in_fresh_process(_resident_growth, name, shape, passes, variant.name)


def _resident_growth(name: str, shape: Shape, passes: str, title: str) -> int:
    variant = next(v for v in variants(name, shape, "cpu") if v.name == title)
    # Code and threads are there once a small one has run.
    bind(OPS[name], variant, _arguments(name, _small(name, shape), "cpu", variant.dtype), passes)()
    run = bind(OPS[name], variant, _arguments(name, shape, "cpu", variant.dtype), passes)
    return memory.resident_growth(run)


@contextlib.contextmanager
def _settings(variant: Variant) -> Iterator[None]:
    products = _torch_products() if variant.plain else contextlib.nullcontext()
    with _workspace(variant.workspace_mb), products:
        yield


@contextlib.contextmanager
def _torch_products() -> Iterator[None]:
    """Leave all products to torch, as on a processor without AMX."""
    if not multiplies_bf16():
        yield
        return
    from medfast import _C

    before = _C.instruction_set()
    _C.use_instruction_set("avx512")
    try:
        yield
    finally:
        _C.use_instruction_set(before)


@contextlib.contextmanager
def _workspace(megabytes: float | None) -> Iterator[None]:
    before = os.environ.get("MEDFAST_WORKSPACE_MB")
    if megabytes is not None:
        os.environ["MEDFAST_WORKSPACE_MB"] = repr(megabytes)
    try:
        yield
    finally:
        if before is not None:
            os.environ["MEDFAST_WORKSPACE_MB"] = before
        else:
            os.environ.pop("MEDFAST_WORKSPACE_MB", None)


def _parts(passes: str) -> tuple[str, ...]:
    return ("forward", "backward") if passes == "both" else (passes,)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def main() -> None:
    """Print one comparison as JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("shape", type=int, nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--passes", choices=("forward", "backward", "both"), default="both")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--without", nargs="+", default=[], metavar="PATTERN")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--no-memory", dest="with_memory", action="store_false")
    given = vars(parser.parse_args())
    print(json.dumps(compare(given.pop("op"), tuple(given.pop("shape")), **given)))


if __name__ == "__main__":
    main()
