"""Losses over several processes: the values and gradients of one process on the whole batch."""

import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from medfast import ClipLoss, SigLipLoss
from medfast.distributed import Ring, clip_loss, siglip_loss
from medfast.ops import clip_loss as whole_clip_loss
from medfast.ops import siglip_loss as whole_siglip_loss

D = 16
SCALE, BIAS = 14.3, -10.0
# Equal batches, and such as one process with fewer pairs leaves; a single pair is the least.
BATCHES = [(4, 4), (5, 3), (4, 7, 1), (3, 3, 3, 3)]


def run(world, function, tmp_path, *arguments):
    """Return what `function(rank, *arguments)` returns in each of `world` processes."""
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    store = f"file://{tmp_path}/store"
    jobs = [
        context.Process(target=_process, args=(rank, world, store, answers, function, arguments))
        for rank in range(world)
    ]
    for job in jobs:
        job.start()
    found = dict(answers.get() for _ in jobs)
    for job in jobs:
        job.join(30)
    failures = [answer for answer in found.values() if isinstance(answer, str)]
    assert not failures, failures[0]
    return [found[rank] for rank in range(world)]


def _process(rank, world, store, answers, function, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        answer = function(rank, *arguments)
        dist.barrier()
    except Exception:
        answer = traceback.format_exc()
    answers.put((rank, answer))
    if dist.is_initialized():
        dist.destroy_process_group()


def features(pairs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(pairs, D, generator=generator) for _ in range(2))
    return [F.normalize(x, dim=-1).to(dtype) for x in both]


def leaves(rank, sizes, dtype=torch.float32):
    """Return this rank's features and the scalars, as leaves."""
    start = sum(sizes[:rank])
    own = [x[start : start + sizes[rank]].clone() for x in features(sum(sizes), dtype)]
    return [x.requires_grad_() for x in (*own, torch.tensor(SCALE), torch.tensor(BIAS))]


def value_and_grads(loss, inputs):
    grads = torch.autograd.grad(loss, inputs)
    return [x.detach().double().numpy() for x in (loss, *grads)]


def _both_losses(rank, sizes, impl, dtype=torch.float32):
    ring = Ring()
    clip, siglip = leaves(rank, sizes, dtype), leaves(rank, sizes, dtype)
    return (
        value_and_grads(clip_loss(*clip[:3], ring, impl=impl), clip[:3]),
        value_and_grads(siglip_loss(*siglip, ring, impl=impl), siglip),
    )


def _by_each_implementation(rank, sizes):
    return {impl: _both_losses(rank, sizes, impl) for impl in ("cpu", "torch", "reference")}


def assert_like_one_process(parts, expected, rtol=2e-6):
    """The mean over ranks of values and scalars' gradients; the features' for the sum of losses."""
    world = len(parts)
    whole = [torch.from_numpy(x) for x in expected]
    for place, want in enumerate(whole):
        found = [torch.from_numpy(part[place]) for part in parts]
        # DistributedDataParallel takes the mean of what features' gradients lead to.
        got = torch.cat(found) / world if place in (1, 2) else torch.stack(found).mean(0)
        assert (got - want).norm() <= rtol * want.norm() + 1e-7


@pytest.mark.parametrize("sizes", BATCHES)
def test_parts_are_those_of_the_whole_batch(tmp_path, sizes):
    parts = run(len(sizes), _by_each_implementation, tmp_path, sizes)
    inputs = leaves(0, (sum(sizes),))
    clip = value_and_grads(whole_clip_loss(*inputs[:3], impl="reference"), inputs[:3])
    siglip = value_and_grads(whole_siglip_loss(*inputs, impl="reference"), inputs)
    for impl in parts[0]:
        assert_like_one_process([part[impl][0] for part in parts], clip)
        assert_like_one_process([part[impl][1] for part in parts], siglip)


def test_bf16_features_have_sums_in_fp32(tmp_path):
    sizes = (6, 6)
    parts = run(2, _both_losses, tmp_path, sizes, "torch", torch.bfloat16)
    inputs = leaves(0, (12,), torch.bfloat16)
    clip = value_and_grads(whole_clip_loss(*inputs[:3], impl="torch"), inputs[:3])
    assert_like_one_process([p[0] for p in parts], clip, rtol=1e-2)
    # The loss itself is not rounded to bf16.
    assert sum(p[0][0] for p in parts) / 2 == pytest.approx(clip[0].item(), rel=1e-6)


def _beside_open_clip(rank, sizes):
    import open_clip
    from open_clip.loss import SigLipLoss as OpenSigLipLoss

    world = len(sizes)
    found = []
    for local in (True, False):
        options = {"rank": rank, "world_size": world, "gather_with_grad": True, "local_loss": local}
        for make in (ClipLoss, open_clip.ClipLoss):
            inputs = leaves(rank, sizes)[:3]
            found.append(value_and_grads(make(**options)(*inputs), inputs))
    for make in (SigLipLoss, OpenSigLipLoss):
        inputs = leaves(rank, sizes)
        found.append(value_and_grads(make(rank=rank, world_size=world)(*inputs), inputs))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_the_drop_in_losses_are_open_clips(tmp_path, world):
    pytest.importorskip("open_clip")
    parts = run(world, _beside_open_clip, tmp_path, (4,) * world)
    for found in parts:
        for ours, theirs in zip(found[::2], found[1::2], strict=True):
            # A scalar's gradient is shared out among ranks in another way.
            for got, want in zip(ours[:3], theirs[:3], strict=True):
                got, want = torch.from_numpy(got), torch.from_numpy(want)
                torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    # Their mean over ranks, which DistributedDataParallel takes, is the same.
    for ours, theirs in ((0, 1), (2, 3), (4, 5)):
        for place in range(3, len(parts[0][ours])):
            got = sum(part[ours][place] for part in parts)
            assert got == pytest.approx(sum(part[theirs][place] for part in parts), rel=1e-4)


def _is_the_same_twice(rank, sizes):
    first, second = (_both_losses(rank, sizes, "cpu") for _ in range(2))
    return all(
        (a == b).all()
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_the_ring_is_deterministic(tmp_path):
    assert all(run(3, _is_the_same_twice, tmp_path, (3, 4, 5)))


def _positives(rank):
    try:
        ClipLoss(rank=rank, world_size=2)(*features(4), SCALE, positives=torch.arange(4))
    except ValueError as error:
        return str(error), None
    return None


def test_positives_across_processes_are_refused(tmp_path):
    said, _ = run(2, _positives, tmp_path)[0]
    assert "positives must be None with several processes" in said
