"""What this machine has and what can run on it: the report that goes with every question."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from medfast import __version__, cli
from medfast.device import has_bf16
from medfast.ops.dispatch import IMPLEMENTATIONS, NAMES, choose, why_not

PACKAGES = (
    *("torch", "torchvision", "triton", "timm", "transformers", "tokenizers"),
    *("numpy", "pillow", "matplotlib", "scikit-learn"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `medfast env`."""

    def command() -> None:
        parser = cli.Parser(prog="medfast env", description=cli.COMMANDS["env"])
        parser.parse_args(argv)
        print(describe())

    cli.run(command, "medfast env")


def describe() -> str:
    """Return versions, devices and, per op, which implementations can run here and why others not.

    Nothing is imported but torch.
    """
    lines = [f"medfast {__version__}", "", "versions"]
    lines += [f"  {'python':<14} {platform.python_version()}"]
    lines += [f"  {name:<14} {_version(name)}" for name in PACKAGES]
    lines += ["", "devices", f"  {'system':<14} {platform.platform()}"]
    lines += [f"  {'cpu':<14} {_cpu()}"]
    lines += [f"  {'gpu':<14} {_gpu()}; csrc: {_cuda_kernels()}"]
    for op in IMPLEMENTATIONS:
        lines += ["", op]
        chosen = choose(op, "auto", torch.empty(0))
        for name in NAMES:
            reason = why_not(op, name)
            runs = "runs here" + (", chosen by auto on a CPU" if name == chosen else "")
            lines.append(f"  {name:<14} {runs if reason is None else 'no: ' + reason}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    bf16 = "bf16 in hardware" if has_bf16(torch.device("cpu")) else "no bf16 in hardware"
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {bf16}; csrc: {_csrc()}"
    )


def _csrc() -> str:
    try:
        from medfast import _C
    except ImportError:
        return "not built"
    return f"{_C.instruction_set()}, {'OpenMP' if _C.openmp else 'one thread'}"


def _cuda_kernels() -> str:
    built = "not built" if importlib.util.find_spec("medfast._CUDA") is None else "built"
    return f"CUDA kernels {built}; they were not yet run on a GPU, so auto does not choose them"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


if __name__ == "__main__":
    main()
