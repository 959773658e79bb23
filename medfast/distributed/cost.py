"""A model of what clip_loss over ranks costs: bytes, seconds and memory of a step.

Letters: B pairs of a rank, D features, W ranks, N = B W pairs; S bytes of a block of features and
G of its gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a GPU and its links do.

    Attributes:
        name: What tables call it.
        flops: FLOP/s that the loss and the towers reach.
        link: Bytes/s that a GPU sends to another node, while it receives as many.
        node_link: The same within a node.
        node: GPUs of a node.
        latency: Seconds of an empty message.
    """

    name: str
    flops: float
    link: float
    node_link: float
    node: int
    latency: float


# Half the dense bf16 peak of 312 and 989 TFLOP/s, and NVLink one way, 600 / 2 and 900 / 2 GB/s:
# NVIDIA A100 and H100 Tensor Core GPU data sheets, SXM. Nodes of eight GPUs, each with a network
# adapter of 200 and 400 Gbit/s: DGX A100 and DGX H100 user guides. The latency is assumed.
A100 = Machine("A100", 312e12 / 2, 25e9, 300e9, 8, 20e-6)
H100 = Machine("H100", 989e12 / 2, 50e9, 450e9, 8, 20e-6)


@dataclass(frozen=True)
class Prediction:
    """What a step takes on a rank.

    Attributes:
        seconds: The whole step: towers, if they were given, loss and exchange.
        exposed: Seconds of it in which the exchange of the loss keeps the GPU waiting.
        sent: Bytes that the loss sends, as `Ring.sent` counts them.
        memory: Most bytes of loss and exchange beside the features and the workspace.
    """

    seconds: float
    exposed: float
    sent: int
    memory: int


def clip_bytes(
    pairs: int, features: int, world: int, element_size: int = 2, comm: str = "ring"
) -> int:
    """Return the bytes that a rank sends for one forward and backward of `clip_loss`.

    Args:
        pairs: B, on every rank.
        features: D.
        world: W.
        element_size: Bytes of a number of the features; gradients and sums have at least 4.
        comm: "ring" or "gather".
    """
    block, d_block, vector = _sizes(pairs, features, element_size)
    others = world - 1
    # Both passes of the log-sum-exps, the gradient of the columns', and the ranks' sizes.
    vectors = others * (2 * 2 * vector + vector + 2 * 8)
    # Backwards the first block is still there.
    blocks = others + (max(0, world - 2) if comm == "ring" else 0)
    return blocks * block + others * d_block + vectors


def open_clip_bytes(pairs: int, features: int, world: int, element_size: int = 2) -> int:
    """Return the bytes that a rank sends for a step with open_clip's `gather_with_grad=True`.

    Features of both sides are all-gathered in the forward, and their gradients summed to where they
    belong in the backward: each is W - 1 blocks, however the backend moves them.

    Args:
        pairs: B, on every rank.
        features: D.
        world: W.
        element_size: Bytes of a number of the features.
    """
    return 2 * 2 * (world - 1) * pairs * features * element_size


def predict(
    machine: Machine,
    pairs: int,
    features: int,
    world: int,
    element_size: int = 2,
    comm: str = "ring",
    parameters: int = 0,
    tower_flops: float = 0.0,
) -> Prediction:
    """Return what a step with `clip_loss` takes.

    A message of x bytes takes `latency + x / link`; one after the other leaves a rank. With f the
    time of a tile of B x B, `2 B B D / flops`, the ring takes

        forward   W f + (W - 1) max(0, t(S) - f)
        backward  3 W f, and for each of the W steps what is longer on its way than 3 f: the next
                  block, but in the last two, and the gradient of the step before, but in the first.

    A collective takes `latency * log2 W` and its bytes' time, and nothing hides it: those of the
    vectors of N, and with "gather" both of all blocks. The towers' gradients, in fp32, are
    all-reduced under the two thirds of their FLOPs that are the backward.

    Args:
        machine: GPU and links.
        pairs: B, on every rank.
        features: D.
        world: W.
        element_size: Bytes of a number of the features.
        comm: "ring" or "gather".
        parameters: Trained parameters of the towers.
        tower_flops: FLOPs of the towers per pair, forward and backward.
    """
    block, d_block, vector = _sizes(pairs, features, element_size)
    link = machine.node_link if world <= machine.node else machine.link
    tile = 2 * pairs * pairs * features / machine.flops

    def message(size: int) -> float:
        return machine.latency + size / link

    def collective(size: float) -> float:
        return machine.latency * math.ceil(math.log2(world)) + size / link

    others = world - 1
    vectors = (16, 2 * vector, 2 * vector, vector)
    exposed = sum(collective(others * size) for size in vectors)
    if comm == "ring":
        exposed += others * max(0.0, message(block) - tile)
        for step in range(1, world + 1):
            has_block, has_gradient = step < others, step > 1
            on_its_way = has_block * message(block) + has_gradient * message(d_block)
            exposed += max(0.0, on_its_way - 3 * tile)
        memory = 3 * block + 5 * d_block
    else:
        exposed += collective(others * block) + collective(others * d_block)
        # The collective that brings gradients home copies them.
        memory = world * (block + 2 * d_block) + 2 * d_block
    towers = pairs * tower_flops / machine.flops
    all_reduce = collective(2 * others * 4 * parameters / world) if parameters else 0.0
    waits = max(0.0, all_reduce - 2 / 3 * towers)
    return Prediction(
        towers + waits + 4 * world * tile + exposed,
        exposed,
        clip_bytes(pairs, features, world, element_size, comm),
        memory + 4 * world * vector,
    )


# Of ViT-B-16 and its text tower in open_clip's docs/model_profile.csv. A pair takes 41.09 GFLOP in
# the forward and twice that in the backward.
VIT_B16_PARAMETERS = 149_620_000
VIT_B16_FLOPS = 3 * 41.09e9


def table(
    machines: Sequence[Machine] = (A100, H100),
    pairs_of_ranks: Sequence[int] = (1024, 16384),
    worlds: Sequence[int] = (8, 32, 128, 512, 1024),
    features: int = 512,
    element_size: int = 2,
    parameters: int = VIT_B16_PARAMETERS,
    tower_flops: float = VIT_B16_FLOPS,
) -> str:
    """Return predictions as a Markdown table.

    Args:
        machines: GPUs and their links.
        pairs_of_ranks: Values of B.
        worlds: Values of W.
        features: D.
        element_size: Bytes of a number of the features.
        parameters: As in `predict`.
        tower_flops: As in `predict`.
    """
    lines = [
        "| GPU | B | W | step, ring | waits | step, gather | waits "
        "| MB sent, ring | gather | open_clip | MB held, ring | gather |",
        "|" + " --- |" * 12,
    ]
    for machine, pairs, world in itertools.product(machines, pairs_of_ranks, worlds):
        sizes = (pairs, features, world, element_size)
        ring, gather = (
            predict(machine, *sizes, comm, parameters, tower_flops) for comm in ("ring", "gather")
        )
        times = (x * 1e3 for way in (ring, gather) for x in (way.seconds, way.exposed))
        sent = (ring.sent, gather.sent, open_clip_bytes(*sizes))
        megabytes = (x / 1e6 for x in (*sent, ring.memory, gather.memory))
        cells = [machine.name, f"{pairs:,}", f"{world:,}"]
        cells += [f"{x:,.1f} ms" for x in times] + [f"{x:,.0f}" for x in megabytes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sizes(pairs: int, features: int, element_size: int) -> tuple[int, int, int]:
    """Return the bytes of a block, of its gradient and of B sums."""
    summable = max(4, element_size)
    return pairs * features * element_size, pairs * features * summable, pairs * summable
