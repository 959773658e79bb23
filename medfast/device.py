"""Where to compute and in which number format."""

from __future__ import annotations

import contextlib
import resource
import sys

import torch

from medfast.errors import UsageError


def pick_device(name: str) -> torch.device:
    """Return the device that `name` ("auto", "cpu" or "cuda") asks for.

    Raises:
        UsageError: "cuda" without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which the towers run, for a value of --precision."""
    wanted = precision == "amp_bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_bf16(device: torch.device) -> bool:
    """Return whether `device` multiplies bf16 matrices in hardware; elsewhere bf16 only slows."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch 2.11 has no list of the processor's capabilities yet.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory used so far, in MB: the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
