"""What the ring hides of a slow exchange, and the cost model that says so beforehand."""

import pytest
import slow_link
from launch import run

from medfast.distributed import cost

# Kernels that take a little longer than a block's way; and such as the link keeps waiting.
LONG, SHORT = 1.2 * slow_link.BLOCK_S, 0.2 * slow_link.BLOCK_S
STEPS = {
    "hidden": ("ring", LONG),
    "at once": ("ring", LONG, True),
    "exposed": ("ring", SHORT),
    "gathered": ("gather", SHORT),
}


def _steps(rank):
    slow_link.step(rank, "ring", 0.0)  # the first one imports
    # The faster of two tries: a busy machine only ever adds.
    return {
        name: min(slow_link.step(rank, *arguments) for _ in range(2))
        for name, arguments in STEPS.items()
    }


@pytest.fixture(scope="module", params=[2, 4])
def steps(request, tmp_path_factory):
    """The number of ranks, and of each kind of step the times of rank 0."""
    return request.param, run(request.param, _steps, tmp_path_factory.mktemp("steps"))[0]


def hidden(seconds, kernels, link):
    """The share of the exchange that lies under the kernels, forward and backward."""
    return 1 - (seconds - kernels) / link


def test_the_ring_hides_the_exchange_under_compute(steps):
    _, times = steps
    assert hidden(*times["hidden"]) >= 0.7
    assert hidden(*times["at once"]) <= 0.1


@pytest.mark.parametrize("name", ["hidden", "exposed", "gathered"])
def test_the_cost_model_foresees_the_time_of_a_step(steps, name):
    world, times = steps
    comm, block_s = STEPS[name]
    flops = 2 * slow_link.PAIRS**2 * slow_link.FEATURES / block_s
    machine = cost.Machine("slow", flops, slow_link.LINK, slow_link.LINK, 1, slow_link.LATENCY)
    sizes = (slow_link.PAIRS, slow_link.FEATURES, world)
    found = cost.predict(machine, *sizes, element_size=4, comm=comm)
    seconds, kernels, _ = times[name]
    assert found.seconds == pytest.approx(seconds, rel=0.2)
    assert found.seconds - found.exposed == pytest.approx(kernels, rel=1e-6)
