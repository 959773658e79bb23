"""Weights of which every rank keeps a part (FSDP2), beside others that every rank has whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(modules: Sequence[nn.Module]) -> None:
    """Leave each rank its part of the weights of `modules`; they meet when a module runs.

    Gradients become the mean over the ranks, and each rank keeps its part of that too.

    Args:
        modules: Inner ones, such as layers, before those that hold them.
    """
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        fully_shard(module)


def is_sharded(x: Tensor) -> bool:
    """Return whether each rank has but a part of `x`."""
    return isinstance(x, DTensor)


def whole(state: Any) -> Any:
    """Return a state dict with whole tensors on the CPU in place of parts; all ranks must ask."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


def like(state: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors as parts, where `present` has parts under the same name."""
    parts = dict(state)
    for name, x in present.items():
        if isinstance(x, DTensor) and name in parts and parts[name].shape == x.shape:
            parts[name] = _part(parts[name], x)
    return parts


def optimizer_state_like(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the state of an optimiser with the moments of parts of parameters as such parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {
            name: _part(x, parameters[number])
            if is_sharded(parameters[number]) and x.shape == parameters[number].shape
            else x
            for name, x in own.items()
        }
        for number, own in state["state"].items()
    }
    return {**state, "state": moments}


def clip_gradients(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """Scale all gradients so that their norm is at most `most`; return the norm before.

    Args:
        parameters: Those that are trained, whole or sharded.
        most: None leaves them as they are.
    """
    both: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in parameters:
        if parameter.grad is not None:
            both[is_sharded(parameter)].append(parameter)
    kinds = [kind for kind in both.values() if kind]
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
        for kind in kinds
    ]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, math.inf if most is None else most, norm)
    return norm


def _part(x: Tensor, other: Tensor) -> Tensor:
    assert isinstance(other, DTensor)
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements)
