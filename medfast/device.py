"""Where to compute and in which number format."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from medfast.errors import UsageError


def pick_device(name: str, number: int | None = None) -> torch.device:
    """Return the device that `name` ("auto", "cpu" or "cuda") asks for.

    Args:
        name: What is asked for.
        number: Of the GPU, where every process of a machine has its own.

    Raises:
        UsageError: "cuda" without a usable GPU, or there are fewer GPUs than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or number is None:
        return torch.device(name)
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"--device cuda: there is no GPU for process {number} of this machine, which has "
            f"{torch.cuda.device_count()}; lower torchrun's --nproc-per-node."
        )
    torch.cuda.set_device(number)
    return torch.device(name, number)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which the towers run, for a value of --precision."""
    if precision == "amp":
        return torch.autocast(device.type, torch.float16)
    wanted = number_format(precision, device) == "amp_bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def number_format(precision: str, device: torch.device) -> str:
    """Return the value of --precision that "auto" stands for on a device; others stay."""
    if precision != "auto":
        return precision
    return "amp_bf16" if has_bf16(device) else "fp32"


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


def forget_peak_memory(device: torch.device) -> int:
    """Forget the peak so far; return the bytes in use: the GPU's allocated, else resident ones.

    On a CPU it needs Linux, whose kernel keeps the highest value, to a fraction of a MiB; writing 5
    to clear_refs sets it back to the present one. Allocators, libraries and threads all count, as
    they do when a machine runs out of memory.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use since `forget_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
