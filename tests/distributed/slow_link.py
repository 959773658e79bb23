"""A ring over a slow link, and steps of clip_loss whose kernels take a set time."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from medfast import distributed
from medfast.distributed import Ring, global_losses
from medfast.distributed.ring import Transfer

PAIRS, FEATURES = 8, 256
BLOCK = PAIRS * FEATURES * 4
# Seconds of a block's way over the link, which carries one message after the other.
BLOCK_S, LATENCY = 0.15, 0.001
LINK = BLOCK / (BLOCK_S - LATENCY)


class SlowRing(Ring):
    """Messages leave only when they have taken their time; `busy` is the sum of all."""

    def __init__(self, comm, waits_at_once):
        super().__init__(comm=comm)
        self.waits_at_once = waits_at_once
        self.busy = 0.0
        self._link = ThreadPoolExecutor(1)

    def pass_on(self, block, size, step=1):
        carried = self._link.submit(self._carry, block, size, step)
        if self.waits_at_once:
            carried.result()
        return _Late(carried)

    def gather(self, own, sizes):
        self._take((self.world - 1) * own.nbytes, math.ceil(math.log2(self.world)))
        return super().gather(own, sizes)

    def sum_home(self, parts, sizes):
        others = parts.nbytes * (self.world - 1) // self.world
        self._take(others, math.ceil(math.log2(self.world)))
        return super().sum_home(parts, sizes)

    def all_reduce(self, values, op=dist.ReduceOp.SUM):
        others = 2 * values.nbytes * (self.world - 1) // self.world
        self._take(others, math.ceil(math.log2(self.world)))
        return super().all_reduce(values, op)

    def _carry(self, block, size, step):
        self._take(block.nbytes, 1)
        return super().pass_on(block, size, step).wait()

    def _take(self, size, messages):
        seconds = messages * LATENCY + size / LINK
        self.busy += seconds
        time.sleep(seconds)


class _Late(Transfer):
    def __init__(self, carried):
        self._carried = carried

    def wait(self):
        return self._carried.result()


def step(rank, comm, block_s, waits_at_once=False):
    """Return the seconds of a step, of its kernels and of the link.

    A block takes `block_s` in the forward, and three times that in the backward, as its FLOPs are.
    """
    kernels_s = 0.0

    def slowed(kernel, times, rows, columns):
        def call(*arguments):
            nonlocal kernels_s
            shapes = len(arguments[rows]) * len(arguments[columns])
            seconds = times * block_s * shapes / PAIRS**2
            kernels_s += seconds
            time.sleep(seconds)
            return kernel(*arguments)

        return call

    real = global_losses.clip_loss_fwd, global_losses.clip_loss_bwd
    global_losses.clip_loss_fwd = slowed(real[0], 1, 0, 1)
    global_losses.clip_loss_bwd = slowed(real[1], 3, 3, 4)
    try:
        ring = SlowRing(comm, waits_at_once)
        inputs = [torch.randn(PAIRS, FEATURES, requires_grad=True) for _ in range(2)]
        dist.barrier()
        started = time.perf_counter()
        distributed.clip_loss(*inputs, 1.0, ring, impl="torch").backward()
        return time.perf_counter() - started, kernels_s, ring.busy
    finally:
        global_losses.clip_loss_fwd, global_losses.clip_loss_bwd = real
