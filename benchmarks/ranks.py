"""`torchrun -m benchmarks.ranks`: are the losses over ranks right on these links, and how fast?

Every loss over the ranks that torchrun starts, one GPU each with NCCL or on CPUs with gloo, first
against the definition on gathered features, then clip_loss on the ring, gathered, and open_clip's,
and log-sum-exps merged by all-reduces. Between GPUs that NVLink joins all of it is also done with
symmetric memory. The first rank prints three tables and writes one JSON. It fails where a loss is
wrong, or where ranks have merged to different bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# open_clip's loss imports it. Were it imported while there is a process group, its functions would
# keep that alive to the end, when a thread of the group may no longer let go of a tensor.
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from benchmarks.conditions import conditions
from medfast import distributed
from medfast.device import forget_peak_memory, peak_memory, pick_device
from medfast.distributed import Ring
from medfast.distributed.cost import open_clip_bytes
from medfast.distributed.processes import Processes, join

# Relative in norm, fp32 against the definition in fp32; tf32 is off.
TOLERANCE = 1e-4
# Of merged log-sum-exps, which are of up to 100, absolute: some roundings in fp32.
MERGE_TOLERANCE = 5e-5
COMMS = ("ring", "gather")
REPEATS = 7

Loss = Callable[..., Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("benchmarks.ranks", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[1024, 8192], help="pairs of each rank"
    )
    parser.add_argument("--features", type=int, default=512, help="width of a feature")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the JSON")
    asked = parser.parse_args(argv)
    processes = join(timeout=300)
    if processes.ring is None:
        sys.exit("benchmarks.ranks: start it with torchrun --nproc-per-node 2 or more.")
    device = pick_device(asked.device, processes.local_rank)
    left_out = _why_not_symmetric(processes, device)
    comms = COMMS if left_out else (*COMMS, "symmetric")
    checks = check(processes, device, comms)
    timings = [
        timing
        for pairs in asked.pairs
        for timing in measure(processes, device, pairs, asked.features, comms)
    ]
    merges = [
        row
        for pairs in asked.pairs
        for row in merge(processes, device, pairs * processes.world, comms)
    ]
    if processes.is_first:
        print(f"{processes.world} ranks on {device.type}; errors relative to the definition")
        for row in checks:
            print(f"{row['loss']:<22}{row['comm']:<8}{row['error']:.1e}")
        print(f"clip_loss in bf16, D {asked.features}, forward and backward, the slowest rank")
        print(f"{'pairs':>8}  {'variant':<12}{'median':>12}{'sent':>12}{'peak memory':>14}")
        for row in timings:
            print(
                f"{row['pairs']:>8}  {row['variant']:<12}{row['seconds'] * 1e3:>9,.2f} ms"
                f"{row['sent_bytes'] / 1e6:>9,.2f} MB{row['peak_bytes'] / 1e6:>11,.1f} MB"
            )
        print("log-sum-exps of all ranks merged, fp32; errors absolute, the slowest rank")
        print(f"{'entries':>10}  {'comm':<12}{'median':>12}{'error':>10}  bits")
        for row in merges:
            print(
                f"{row['entries']:>10}  {row['comm']:<12}{row['seconds'] * 1e3:>9,.3f} ms"
                f"{row['error']:>10.1e}  {'alike' if row['is_alike'] else 'DIFFER'}"
            )
        if left_out:
            print(f"symmetric left out: {left_out}")
        found = conditions(device.type)
        path = results.write(
            f"ranks_{processes.world}",
            found,
            asked.out,
            checks=checks,
            timings=timings,
            merges=merges,
            symmetric_left_out=left_out,
        )
        print(f"wrote {path}")
    processes.part()
    if any(row["error"] > TOLERANCE for row in checks) or any(
        row["error"] > MERGE_TOLERANCE or not row["is_alike"] for row in merges
    ):
        sys.exit(1)


def _inputs(rank: int, pairs: int, device: torch.device) -> dict[str, Any]:
    """Return features, patches, words and their mask of this rank; the last has a pair less."""
    generator = torch.Generator().manual_seed(rank)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device)

    words = torch.randint(1, 12, (pairs, 1), generator=generator)
    return {
        "global": (unit(pairs, 64), unit(pairs, 64)),
        "local": (unit(pairs, 49, 64), unit(pairs, 11, 64)),
        "mask": (torch.arange(11) < words).to(device),
    }


def losses(given: dict[str, Any], ring: Ring, impl: str) -> dict[str, tuple[Loss, list[Tensor]]]:
    """Return each loss, with the leaves that it is a function of."""
    scale = torch.tensor(14.3, device=given["mask"].device)
    bias = torch.full_like(scale, -10.0)
    mask = given["mask"]
    more: dict[str, Any] = {"ring": ring, "impl": impl}
    ids = torch.arange(len(mask), device=mask.device) % 5
    x, local = given["global"], given["local"]
    found: dict[str, tuple[Loss, tuple[Tensor, ...]]] = {
        "clip": (lambda a, b, s: distributed.clip_loss(a, b, s, **more), (*x, scale)),
        "clip, positives": (
            lambda a, b, s: distributed.clip_loss(a, b, s, positives=ids, **more),
            (*x, scale),
        ),
        "siglip": (lambda *a: distributed.siglip_loss(*a, **more), (*x, scale, bias)),
        "simclr": (lambda a, b, s: distributed.simclr_loss(a, b, s, **more), (*x, scale)),
        "local_alignment": (
            lambda v, w: distributed.local_alignment_loss(v, w, mask, **more),
            local,
        ),
        "filip": (
            lambda v, w, s: distributed.filip_loss(v, w, mask, s, **more),
            (*local, scale),
        ),
        "sparc": (
            lambda v, w, s: distributed.sparc_loss(v, w, mask, s, **more),
            (*local, scale),
        ),
    }
    for place, name in enumerate(("cyclip, cross-modal", "cyclip, in-modal")):
        found[name] = (
            lambda a, b, place=place: distributed.cyclip_loss(a, b, **more)[place],
            x,
        )
    return {
        name: (loss, [t.clone().requires_grad_() for t in leaves])
        for name, (loss, leaves) in found.items()
    }


def check(processes: Processes, device: torch.device, comms: Sequence[str]) -> list[dict[str, Any]]:
    """Return the largest error of any rank's value and gradients, by loss and comm."""
    pairs = 33 - (processes.rank + 1 == processes.world)
    given = _inputs(processes.rank, pairs, device)
    expected = {
        name: _value_and_gradients(*case)
        for name, case in losses(given, Ring(comm="gather"), "reference").items()
    }
    rows = []
    for comm in comms:
        for name, case in losses(given, Ring(comm=comm), "auto").items():
            found = _value_and_gradients(*case)
            error = max(
                ((a - b).norm() / b.norm().clamp(min=1e-6)).item()
                for a, b in zip(found, expected[name], strict=True)
            )
            rows.append({"loss": name, "comm": comm, "error": max(processes.objects(error))})
    return rows


def _value_and_gradients(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    value = loss(*leaves)
    found = [x.double() for x in (value.detach(), *torch.autograd.grad(value, leaves))]
    for x in found:
        if x.ndim == 0:  # ranks may share it out in another way
            dist.all_reduce(x)
    return found


def measure(
    processes: Processes, device: torch.device, pairs: int, features: int, comms: Sequence[str]
) -> list[dict[str, Any]]:
    """Return time, bytes and memory of clip_loss by each way of exchange."""
    generator = torch.Generator().manual_seed(processes.rank)
    image, text = (
        F.normalize(torch.randn(pairs, features, generator=generator), dim=-1)
        .to(device, torch.bfloat16)
        .requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(100.0, device=device, requires_grad=True)
    rings = {comm: Ring(comm=comm) for comm in comms}
    variants: dict[str, Callable[[], Tensor]] = {
        comm: partial(distributed.clip_loss, image, text, scale, ring)
        for comm, ring in rings.items()
    }
    theirs = _open_clip(processes)
    if theirs is not None:
        variants["open_clip"] = partial(theirs, image, text, scale)
    rows = []
    for name, variant in variants.items():
        variant().backward()
        sent = rings[name].sent if name in rings else 0
        before = forget_peak_memory(device)

        def step(variant: Callable[[], Tensor] = variant) -> None:
            for leaf in (image, text, scale):
                leaf.grad = None
            variant().backward()

        seconds = _slowest(processes, device, step)
        peak = peak_memory(device) - before
        if name in rings:
            sent = (rings[name].sent - sent) // REPEATS
        else:
            sent = open_clip_bytes(pairs, features, processes.world)
        rows.append(
            {
                "pairs": pairs,
                "variant": name,
                "seconds": seconds,
                "sent_bytes": sent,
                "peak_bytes": max(processes.objects(peak)),
            }
        )
    return rows


def _open_clip(processes: Processes) -> Any:
    """Return open_clip's loss over the ranks, or None where it is not installed."""
    try:
        from open_clip import ClipLoss
    except ImportError:
        return None
    return ClipLoss(
        local_loss=True, gather_with_grad=True, rank=processes.rank, world_size=processes.world
    )


def merge(
    processes: Processes, device: torch.device, entries: int, comms: Sequence[str]
) -> list[dict[str, Any]]:
    """Return time, error and agreement of log-sum-exps merged by each way."""
    generator = torch.Generator().manual_seed(processes.rank)
    partial_sums = (30 * torch.randn(entries, generator=generator)).to(device)
    rows = []
    # Those of "gather" are all-reduced as those of "ring".
    for comm in (comm for comm in comms if comm != "gather"):
        ring = Ring(comm=comm)
        a_row = [1] * processes.world
        truth = ring.gather(partial_sums.double()[None], a_row).logsumexp(0)
        found = ring.merged(partial_sums)
        error = (found - truth).abs().max().item()
        is_alike = all(torch.equal(other, found) for other in ring.gather(found[None], a_row))
        seconds = _slowest(processes, device, partial(ring.merged, partial_sums))
        rows.append(
            {
                "entries": entries,
                "comm": comm,
                "seconds": seconds,
                "error": max(processes.objects(error)),
                "is_alike": all(processes.objects(is_alike)),
            }
        )
    return rows


def _why_not_symmetric(processes: Processes, device: torch.device) -> str | None:
    """Return why the ranks cannot merge through symmetric memory, or None."""
    if device.type != "cuda":
        return "it is for GPUs"
    reason = None
    try:
        Ring(comm="symmetric").merged(torch.zeros(1, device=device))
    except RuntimeError as error:
        reason = str(error)
    return next(filter(None, processes.objects(reason)), None)


def _slowest(processes: Processes, device: torch.device, work: Callable[[], object]) -> float:
    """Return the median of the seconds that the slowest rank takes."""
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    of_ranks = zip(*processes.objects(seconds), strict=True)
    return statistics.median(max(times) for times in of_ranks)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
