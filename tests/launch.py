"""Runs a function in several processes that torch.distributed joins, for any test."""

import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A process that waits longer for another gives up.
_PATIENCE = timedelta(seconds=60)
# Processes are forked from one that has imported what takes seconds, and has no threads yet;
# torch._dynamo is what the first call of any custom op imports.
SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed", "torch._dynamo", "medfast.distributed"])


def run(world, function, tmp_path, *arguments):
    """Return what `function(rank, *arguments)` returns in each of `world` processes.

    The first exception of any process is raised here; so is the death of one. Environment
    variables that a test has set do not reach them.
    """
    store = f"file://{tempfile.mkdtemp(dir=tmp_path)}/store"
    with ProcessPoolExecutor(world, SERVER) as pool:
        # Each waits for all others before it begins, so that no process takes two.
        ranks = [
            pool.submit(_process, rank, world, store, function, arguments) for rank in range(world)
        ]
        for rank in as_completed(ranks):
            rank.result()
    return [rank.result() for rank in ranks]


def _process(rank, world, store, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, _PATIENCE, rank=rank, world_size=world)
    try:
        answer = function(rank, *arguments)
        dist.barrier()
        return answer
    finally:
        dist.destroy_process_group()
