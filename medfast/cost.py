"""What a run will cost, before it begins: parameters, FLOPs per pair, memory of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from medfast.config import TrainConfig
from medfast.data.loader import Batch
from medfast.data.tokens import NOT_PREDICTED, Masked, Tokens
from medfast.device import autocast
from medfast.methods.base import Method
from medfast.models.pair import Features, ImageTextModel
from medfast.ops.workspace import workspace_bytes
from medfast.step import Step

# Of which activations are measured; batch norm needs two.
_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class Cost:
    """The cost of a training step.

    Attributes:
        flops_per_pair: Of towers and heads, forward and backward; a second forward where features
            are cached.
        memory: Bytes by what they are for: weights, gradients, optimiser, activations, features
            of the whole batch, input, and the most that a loss takes beside its inputs.
    """

    flops_per_pair: float
    memory: dict[str, float]

    @property
    def total_memory(self) -> float:
        """All bytes of `memory` together."""
        return sum(self.memory.values())


def estimate(config: TrainConfig, model: ImageTextModel, method: Method) -> Cost:
    """Return the cost of a step, from small batches that pass through the model on a CPU.

    A CPU keeps about what a GPU keeps; libraries' own buffers come on top.

    Args:
        config: The settings.
        model: The model that is trained, on the CPU; its gradients are removed.
        method: The method with its heads.
    """
    model.train()
    method.train()
    size = config.batch_size * config.accum_freq
    is_cached = config.accum_freq > 1
    flops, kept, features = _passed(config, model, method, _FEW)
    flops_of_more, kept_of_more, _ = _passed(config, model, method, _MORE, backward=False)
    per_pair = (kept_of_more - kept) / (_MORE - _FEW)
    if is_cached:
        flops += round(flops_of_more * _FEW / _MORE)
    modules = nn.ModuleList([model, method])
    trained = sum(p.nbytes for p in modules.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in (*modules.parameters(), *modules.buffers()))
    feature_bytes = sum(x.nbytes for x in features.parts().values()) / _FEW
    image = 3 * config.preset.image_size**2
    memory = {
        "weights": float(weights),
        "gradients": float(trained),
        "optimiser": 2.0 * trained,
        "activations": (kept - _FEW * per_pair) + config.batch_size * per_pair,
        # The features, their gradients and, where they are cached, the parts they are joined from.
        "features": size * feature_bytes * (3 if is_cached else 1),
        "input": float(size * image * (1 + method.extra.images)),
        "loss, at most": float(workspace_bytes()),
    }
    return Cost(flops / _FEW, memory)


@dataclass(frozen=True)
class ModelFlops:
    """What a step has to compute, in FLOPs: `constant + per_pair * B + per_two_pairs * B * N`.

    B are the pairs of a process and N those of all.
    """

    constant: float
    per_pair: float
    per_two_pairs: float

    def of_step(self, pairs: float, of_all: float) -> float:
        """Return the FLOPs of a process in a step: of B, `pairs`, among N, `of_all`."""
        return self.constant + self.per_pair * pairs + self.per_two_pairs * pairs * of_all


def model_flops(
    config: TrainConfig, model: ImageTextModel, method: Method, tokens: int, words: int
) -> ModelFlops:
    """Return the FLOPs of towers, heads and losses, from steps of a few pairs on a CPU.

    They are the matrix products, convolutions and attention of a forward and a backward. What is
    computed again to save memory does not count: by attention in its backward, and by caching or
    checkpointing, of which there must be none here. A fused loss may do with fewer than its
    definition, or need more.

    Args:
        config: The settings.
        model: The model that is trained, on the CPU; its gradients are removed.
        method: The method with its heads, with the implementation "reference".
        tokens: Length of the captions.
        words: How many of their tokens are words.
    """
    step = Step(model.train(), method.train(), torch.device("cpu"), "fp32")
    state = torch.get_rng_state()
    counts = []
    for pairs in (2, 3, 4):
        batch = _batch(config, model, method, pairs, tokens, words)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ONCE) as counter:
            step.backward([batch])
        counts.append(counter.get_total_flops())
        for module in (model, method):
            module.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    # The parabola through the three.
    two, three, four = counts
    square = (four - 2 * three + two) / 2
    line = three - two - 5 * square
    return ModelFlops(two - 2 * line - 4 * square, line, square)


def _passed(
    config: TrainConfig,
    model: ImageTextModel,
    method: Method,
    pairs: int,
    backward: bool = True,
) -> tuple[int, float, Features]:
    """Pass `pairs` through towers and heads.

    Returns:
        FLOPs, without those of the backward if it is not asked for, bytes kept for it beside the
        weights, and the features.
    """
    device = torch.device("cpu")
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *method.parameters())}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    batch = _batch(config, model, method, pairs)
    state = torch.get_rng_state()
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, autocast(config.precision, device):
            features = method.encode(model, batch)
            after = method.heads(features)
        outputs = [x for x in after.parts().values() if x.requires_grad]
        if backward and outputs:
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    torch.set_rng_state(state)
    for module in (model, method):
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops(), float(sum(kept.values())), features


# The counter knows a GPU's fused attention only. It passes shapes in place of tensors.


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    d_out: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return sdpa_backward_flop_count(d_out, query, key, value)


def _attention_backward_once(d_out: Sequence[int], *inputs: Any, **keywords: Any) -> int:
    """Return the FLOPs of the gradients alone, without the scores that are computed again."""
    return 2 * _attention(*inputs, **keywords)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_ATTENTION_ONCE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_once,
}


def _batch(
    config: TrainConfig,
    model: ImageTextModel,
    method: Method,
    pairs: int,
    tokens: int | None = None,
    words: int | None = None,
) -> Batch:
    """Return pairs of black images and captions of one length, if not given the greatest."""
    size, length = config.preset.image_size, tokens or config.preset.context_length
    images = torch.zeros(pairs, 3, size, size, dtype=torch.uint8)
    ids = torch.ones(pairs, length, dtype=torch.int64)
    mask = torch.ones(pairs, length, dtype=torch.bool)
    word_mask = mask & (torch.arange(length) < (words or length))
    labels = torch.full_like(ids, NOT_PREDICTED)
    labels[:, : max(1, round(0.15 * length))] = 1
    number = torch.arange(pairs)
    return Batch(
        *(images, ids, mask, word_mask, number, number),
        views=(images,) * method.extra.images,
        texts=(Tokens(ids, mask, word_mask),) * method.extra.texts,
        masked=Masked(ids, labels) if method.extra.masked else None,
    )
