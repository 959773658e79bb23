"""Vectors of all ranks merged through shared memory: when, in which order, and to which bits.

The kernel runs on a GPU alone, and its peers are reached on several. Here its place is taken by the
same reduction on the CPU, in memory that processes share as the GPUs would.
"""

import contextlib
import ctypes
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from launch import run

from medfast import distributed
from medfast.distributed import Ring, symmetric
from medfast.distributed.symmetric import PeerMerging, Peers

LENGTHS = (1, 5, 4096, 37, 5000)


class HostPeers(Peers):
    """Peers whose memory is that of files which all processes map."""

    def __init__(self, folder):
        super().__init__()
        self._folder, self._made, self.events = folder, 0, []

    def takes(self, values):
        return values.dtype == torch.float32 and self.world > 1

    def reserve(self, length, device):
        part = super().reserve(length, device)
        # What is read before it is written, or after another call has begun, shows.
        self._memory[0].fill_(torch.nan)
        return part

    def _make(self, capacity, device):
        self._made += 1
        size = 2 * capacity
        self._mapped = [
            torch.from_file(f"{self._folder}/{rank} {self._made}", shared=True, size=size)
            for rank in range(self.world)
        ]
        self._memory = self._mapped[self.rank].view(2, -1).fill_(torch.nan)
        self._parts = [x.data_ptr() for x in self._mapped]
        self._results = [address + 4 * capacity for address in self._parts]
        dist.barrier()

    def _meet(self):
        self.events.append("meet")
        dist.barrier()

    def _merge(self, sources, targets, length, is_log_sum_exp):
        self.events.append(f"merge {len(sources)} of {length} to {len(targets)}")
        if length == 0:
            return
        parts = torch.stack([_at(address, length) for address in sources])
        whole = parts.logsumexp(0) if is_log_sum_exp else parts.sum(0)
        for address in targets:
            _at(address, length).copy_(whole)

    @contextlib.contextmanager
    def _aside(self):
        self.events.append("aside")
        yield

    def _rejoin(self):
        self.events.append("rejoin")


def _at(address, length):
    return torch.frombuffer((ctypes.c_float * length).from_address(address), dtype=torch.float32)


def _parts(world, length):
    """Return what each of the ranks has; in some places one, or all, have nothing."""
    generator = torch.Generator().manual_seed(length)
    parts = 40 * torch.randn(world, length, generator=generator)
    parts[0, ::3] = -torch.inf
    parts[:, ::7] = -torch.inf
    return parts


def _reduced(rank, folder):
    peers, found = HostPeers(folder), []
    for length in LENGTHS:
        for is_log_sum_exp in (True, False):
            parts = _parts(dist.get_world_size(), length)
            if not is_log_sum_exp:
                parts = parts.nan_to_num(neginf=0)
            got = peers.all_reduce(parts[rank].view(1, -1), is_log_sum_exp)
            want = parts.logsumexp(0) if is_log_sum_exp else parts.double().sum(0).float()
            torch.testing.assert_close(got, want.view(1, -1), rtol=1e-5, atol=1e-4)
            found.append(got.numpy().tobytes())
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_have_the_same_bits_of_the_whole(tmp_path, world):
    first, *others = run(world, _reduced, tmp_path, tmp_path)
    assert all(other == first for other in others)


def _with_peers(folder):
    ring = Ring(comm="ring")
    ring._peers = HostPeers(folder)
    return ring


def _values(rank, folder, sizes):
    generator = torch.Generator().manual_seed(0)
    shapes = {"global": (2, sum(sizes), 16), "local": (2, sum(sizes), 3, 16)}
    image, text, patches, tokens = (
        x.split(sizes)[rank].clone().requires_grad_()
        for shape in shapes.values()
        for x in torch.randn(shape, generator=generator) / 4
    )
    scale = torch.tensor(14.3, requires_grad=True)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    found = []
    for ring in (Ring(comm="ring"), _with_peers(folder)):
        values = (
            distributed.clip_loss(image, text, scale, ring, impl="torch"),
            distributed.filip_loss(patches, tokens, mask, scale, ring, impl="torch"),
            *distributed.cyclip_loss(image, text, ring, impl="torch"),
        )
        grads = torch.autograd.grad(sum(values), (image, text, patches, tokens, scale))
        found.append(([x.detach().numpy() for x in (*values, *grads)], ring.sent))
    return found


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (4, 7, 1)])
def test_losses_are_those_of_the_ring_for_fewer_bytes(tmp_path, sizes):
    for (plain, all_reduced), (merged, sent) in run(len(sizes), _values, tmp_path, tmp_path, sizes):
        for want, got in zip(plain, merged, strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-6)
        # One exchange of N log-sum-exps in place of their maxima and their sums, in two losses.
        world, pairs = len(sizes), sum(sizes)
        assert all_reduced - sent == 2 * (2 * (world - 1) * 4 * pairs // world)


def _events(rank, folder):
    peers, spans = HostPeers(folder), [slice(0, 4), slice(4, 7), slice(7, 8)]
    merging = PeerMerging(peers, spans, torch.device("cpu"))
    parts = _parts(3, 8)[rank]
    # As on the ring: own span first, then those of the ranks before.
    for step in range(3):
        span = spans[rank - step]
        peers.events.append(f"span {step}")
        merging.put(span, parts[span])
    whole = merging.result().numpy().tobytes()
    return peers.events, whole


def test_what_is_there_is_merged_before_the_last_span(tmp_path):
    found = run(3, _events, tmp_path, tmp_path)
    for (events, whole), length in zip(found, (3, 1, 4), strict=True):
        assert whole == found[0][1]
        assert events == [
            *("span 0", "span 1", "aside", "meet", f"merge 2 of {length} to 1"),
            *("span 2", "rejoin", f"merge 2 of {length} to 3", "meet"),
        ]
    torch.testing.assert_close(
        torch.frombuffer(bytearray(found[0][1]), dtype=torch.float32), _parts(3, 8).logsumexp(0)
    )


def _refused(rank):
    reasons = []
    with pytest.raises(RuntimeError, match="Use comm='ring'") as refused:
        Ring(comm="symmetric")
    reasons.append(str(refused.value))
    with mock.patch("torch.cuda.is_available", return_value=True):
        reasons.append(symmetric.why_not(None))
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.distributed.get_backend_config", return_value="cpu:gloo,cuda:nccl"),
        mock.patch("torch.distributed.get_world_size", return_value=129),
    ):
        reasons.append(symmetric.why_not(None))
    return reasons


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_it_is_refused_with_the_reason_and_never_replaced(tmp_path):
    for of_gpu, of_backend, of_world in run(2, _refused, tmp_path):
        assert of_gpu.startswith("Ring: comm='symmetric' cannot run here: torch finds no GPU.")
        assert "gloo" in of_backend
        assert "it needs NCCL" in of_backend
        assert of_world == "there are 129 ranks, its kernel takes 128"


def _plain(rank):
    return [Ring(comm=comm)._peers is None for comm in ("auto", "ring", "gather")]


def test_it_is_not_chosen_unless_asked_for(tmp_path):
    assert all(run(1, _plain, tmp_path)[0])


def test_other_tensors_are_left_to_the_backend():
    peers = object.__new__(Peers)
    peers.world = 2
    assert not peers.takes(torch.zeros(3))
    assert not peers.takes(torch.zeros(3, dtype=torch.float64))
