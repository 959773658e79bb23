"""Losses over several processes: the values and gradients of one process on the whole batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from launch import run

from medfast import ClipLoss, SigLipLoss, distributed, ops
from medfast.distributed import Ring

D = 16
SCALE, BIAS = 14.3, -10.0
# Equal batches, and such as one process with fewer pairs leaves; a single pair is the least, and a
# ring of one rank has no neighbour.
BATCHES = [(5,), (4, 4), (5, 3), (4, 7, 1), (3, 3, 3, 3)]


def features(pairs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(pairs, D, generator=generator) for _ in range(2))
    return [F.normalize(x, dim=-1).to(dtype) for x in both]


def leaves(rank, sizes, dtype=torch.float32):
    """Return this rank's features and the scalars, as leaves."""
    start = sum(sizes[:rank])
    own = [x[start : start + sizes[rank]].clone() for x in features(sum(sizes), dtype)]
    return [x.requires_grad_() for x in (*own, torch.tensor(SCALE), torch.tensor(BIAS))]


def parts_of_pairs(rank, sizes):
    """Return this rank's patches, words, their mask, and the scalars, as leaves.

    Captions are cut to the longest of a rank, which differ.
    """
    generator = torch.Generator().manual_seed(1)
    pairs, start = sum(sizes), sum(sizes[:rank])
    patches = torch.randn(pairs, 4, D, generator=generator)
    tokens = torch.randn(pairs, 7, D, generator=generator)
    lengths = torch.randint(1, 8, (pairs,), generator=generator)
    rows = slice(start, start + sizes[rank])
    longest = lengths[rows].max()
    mask = torch.arange(longest) < lengths[rows].unsqueeze(1)
    scalars = (torch.tensor(x) for x in (4.0, 5.0, 10.0))
    inputs = (patches[rows].clone(), tokens[rows, :longest].clone(), *scalars)
    return [x.requires_grad_() for x in inputs], mask


def value_and_grads(loss, inputs):
    grads = torch.autograd.grad(loss, inputs)
    return [x.detach().double().numpy() for x in (loss, *grads)]


def groups(rank, sizes):
    """Return ids of this rank's pairs, of which some are alone and most groups are of all ranks."""
    ids = torch.arange(sum(sizes)) ** 2 % 5 - 2
    ids[1] = 10**12
    return ids.split(sizes)[rank]


def losses(module, rank, sizes, impl, comm=None, dtype=torch.float32):
    """Return values and gradients of each loss of `ops` or, over ranks, of `distributed`."""
    more = {"impl": impl} | ({"ring": Ring(comm=comm)} if module is distributed else {})
    found = {}
    x = leaves(rank, sizes, dtype)[:3]
    found["clip"] = value_and_grads(module.clip_loss(*x, **more), x)
    x = leaves(rank, sizes, dtype)[:3]
    loss = module.clip_loss(*x, positives=groups(rank, sizes), **more)
    found["positives"] = value_and_grads(loss, x)
    x = leaves(rank, sizes, dtype)
    found["siglip"] = value_and_grads(module.siglip_loss(*x, **more), x)
    x = leaves(rank, sizes, dtype)[:3]
    found["simclr"] = value_and_grads(module.simclr_loss(*x, **more), x)
    if impl != "cpu":
        for place, name in enumerate(("cross-modal", "in-modal")):
            x = leaves(rank, sizes, dtype)[:2]
            found[name] = value_and_grads(module.cyclip_loss(*x, **more)[place], x)
    (*x, attention, words, pairs), mask = parts_of_pairs(rank, sizes)
    temps = {"temp_attention": attention, "temp_words": words, "temp_pairs": pairs}
    loss = module.local_alignment_loss(*x, mask, **temps, **more)
    found["local"] = value_and_grads(loss, [*x, attention, words, pairs])
    (*x, scale, _, _), mask = parts_of_pairs(rank, sizes)
    found["filip"] = value_and_grads(module.filip_loss(*x, mask, scale, **more), [*x, scale])
    (*x, scale, _, _), mask = parts_of_pairs(rank, sizes)
    found["sparc"] = value_and_grads(module.sparc_loss(*x, mask, scale, **more), [*x, scale])
    return found


def _of_all_ranks(rank, sizes, dtype=torch.float32):
    ways = [("cpu", "ring"), ("cpu", "gather"), ("torch", "ring"), ("reference", "auto")]
    return {way: losses(distributed, rank, sizes, *way, dtype) for way in ways}


def assert_like_one_process(parts, expected, rtol=2e-6):
    """The mean over ranks of values and scalars' gradients; the features' for the sum of losses."""
    world = len(parts)
    for place, want in enumerate(map(torch.from_numpy, expected)):
        found = [torch.from_numpy(part[place]) for part in parts]
        if place in (1, 2):
            if want.ndim == 3:  # the captions of a rank may all be short
                found = [F.pad(x, (0, 0, 0, want.shape[1] - x.shape[1])) for x in found]
            # DistributedDataParallel takes the mean of what features' gradients lead to.
            got = torch.cat(found) / world
        else:
            got = torch.stack(found).mean(0)
        assert (got - want).norm() <= rtol * want.norm() + 1e-6


@pytest.mark.parametrize("sizes", BATCHES)
def test_parts_are_those_of_the_whole_batch(tmp_path, sizes):
    ranks = run(len(sizes), _of_all_ranks, tmp_path, sizes)
    expected = losses(ops, 0, (sum(sizes),), "reference")
    for way in ranks[0]:
        assert ranks[0][way].keys() == expected.keys() - (
            {"cross-modal", "in-modal"} if "cpu" in way else set()
        )
        for name in ranks[0][way]:
            assert_like_one_process([rank[way][name] for rank in ranks], expected[name])


def test_bf16_features_have_sums_in_fp32(tmp_path):
    sizes = (6, 6)
    ranks = run(2, _of_all_ranks, tmp_path, sizes, torch.bfloat16)
    expected = losses(ops, 0, (12,), "torch", dtype=torch.bfloat16)
    for way in (("torch", "ring"), ("cpu", "gather")):
        for name in ("clip", "positives", "siglip", "simclr"):
            parts = [rank[way][name] for rank in ranks]
            assert_like_one_process(parts, expected[name], rtol=1e-2)
            # The loss itself is not rounded to bf16.
            value = sum(p[0] for p in parts) / 2
            assert value == pytest.approx(expected[name][0].item(), rel=1e-6)


def _without_a_number(rank, way):
    """Return losses where rank 1 alone has an image that is NaN."""
    impl, comm = way
    more = {"ring": Ring(comm=comm), "impl": impl}
    x = leaves(rank, (4, 4))[:3]
    (*parts, _, _, _), mask = parts_of_pairs(rank, (4, 4))
    if rank == 1:
        for images in (x[0], parts[0]):
            images.data[0] = torch.nan
    clip = distributed.clip_loss(*x, **more)
    local = distributed.local_alignment_loss(*parts, mask, **more)
    filip = distributed.filip_loss(*parts, mask, 1.0, **more)
    return [loss.item() for loss in (clip, local, filip)]


@pytest.mark.parametrize("way", [("torch", "ring"), ("cpu", "gather"), ("reference", "auto")])
def test_an_image_without_a_number_is_in_the_loss_of_every_rank(tmp_path, way):
    for losses_of_rank in run(2, _without_a_number, tmp_path, way):
        assert all(map(math.isnan, losses_of_rank)), losses_of_rank


def _weighted(rank, sizes, way):
    """Return a part with an upstream gradient that no other rank has."""
    impl, comm = way
    x = leaves(rank, sizes)[:3]
    positives = groups(rank, sizes)
    part = distributed.clip_loss(*x, Ring(comm=comm), positives=positives, impl=impl)
    return value_and_grads((rank + 1) * part, x)


def weighted_parts(image, text, scale, ids, sizes):
    """Return the sum over ranks of the same, from the logits of all pairs."""
    logits = scale * image @ text.T
    own = logits.diagonal()
    same = (ids[:, None] == ids).float()
    rows, columns = (logits.logsumexp(way) - own for way in (1, 0))
    others = own - (same * logits).sum(1) / same.sum(1)
    of_pairs = (rows + columns) / 2 + others
    whole = len(sizes) / sum(sizes)
    return sum((k + 1) * part.sum() * whole for k, part in enumerate(of_pairs.split(sizes)))


@pytest.mark.parametrize("way", [("torch", "ring"), ("torch", "gather"), ("reference", "auto")])
def test_each_ranks_part_has_a_gradient_of_its_own(tmp_path, way):
    sizes = (4, 7, 1)
    parts = run(3, _weighted, tmp_path, sizes, way)
    ids = torch.cat([groups(rank, sizes) for rank in range(3)])
    x = leaves(0, (12,))[:3]
    value, *grads = value_and_grads(weighted_parts(*x, ids, sizes), x)
    assert sum(part[0] for part in parts) == pytest.approx(value, rel=1e-5)
    for place, want in enumerate(map(torch.from_numpy, grads), start=1):
        found = [torch.from_numpy(part[place]) for part in parts]
        got = torch.stack(found).sum(0) if want.ndim == 0 else torch.cat(found)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


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
    same = []
    for comm in ("ring", "gather"):
        first, second = (losses(distributed, rank, sizes, "cpu", comm) for _ in range(2))
        for name in first:
            same += [(a == b).all() for a, b in zip(first[name], second[name], strict=True)]
    return all(same)


def test_a_loss_over_ranks_is_deterministic(tmp_path):
    assert all(run(3, _is_the_same_twice, tmp_path, (3, 4, 5)))


def _drop_in_positives(rank, sizes):
    x = leaves(rank, sizes)[:3]
    loss = ClipLoss(rank=rank, world_size=2)(*x, positives=groups(rank, sizes))
    return value_and_grads(loss, x)


def test_the_drop_in_loss_takes_positives_of_all_processes(tmp_path):
    sizes = (5, 3)
    parts = run(2, _drop_in_positives, tmp_path, sizes)
    expected = losses(ops, 0, (8,), "reference")["positives"]
    assert_like_one_process(parts, expected)
    # Without local_loss each process has the mean.
    assert all(part[0] == pytest.approx(expected[0], rel=1e-6) for part in parts)


def _wrong_ids(rank):
    image, text = features(4)
    with pytest.raises(ValueError, match=r"positives must be torch\.int64 \[4\]"):
        distributed.clip_loss(image, text, SCALE, Ring(), positives=torch.arange(3))


def test_ids_that_do_not_fit_are_refused(tmp_path):
    run(1, _wrong_ids, tmp_path)
