"""`python -m benchmarks.errors`: how far clip_loss and its gradients are from fp64.

Features are drawn in fp32; a variant that multiplies in bf16 gets them rounded and is compared with
the truth for the rounded ones, so that its error is the loss's own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import results
from benchmarks.conditions import conditions
from benchmarks.ops import OPS, Shape, errors, evaluate, pairs
from benchmarks.peers import Variant, variants

# A trained model's scale is clamped to 100; 14.3 is the scale at the start.
SCALES = (14.3, 100.0)
# From unrelated pairs to pairs that agree to 0.99, where the diagonal wins by far.
CORRELATIONS = (0.0, 0.1, 0.3, 0.45, 0.9)


def table(
    shape: Shape,
    device: str,
    scales: tuple[float, ...] = SCALES,
    correlations: tuple[float, ...] = CORRELATIONS,
) -> list[dict[str, Any]]:
    """Return one row per scale, correlation and variant, with the error of each result."""
    rows = []
    for scale in scales:
        for correlation in correlations:
            generator = torch.Generator(device).manual_seed(0)
            image, text = pairs(shape, generator, correlation)
            for variant in _compared(shape, device):
                rounding = torch.bfloat16 if "bf16" in variant.name else torch.float32
                features = (x.to(rounding).to(variant.dtype) for x in (image, text))
                arguments = (*features, torch.tensor(scale, device=device))
                found = evaluate(variant.function, arguments)
                op = OPS["clip_loss"]
                rows.append(
                    {
                        "scale": scale,
                        "correlation": correlation,
                        "variant": variant.name,
                        "errors": errors(op, found, op.truth(*arguments)),
                    }
                )
    return rows


def _compared(shape: Shape, device: str) -> list[Variant]:
    """Return the eager variants and medfast's default, fastest implementation."""
    able = [v for v in variants("clip_loss", shape, device) if v.skip is None and not v.compiles]
    own = [variant for variant in able if variant.own and variant.workspace_mb is None]
    impl = own[0].name.split()[1]
    return [v for v in able if v.name.startswith("open_clip")] + [
        variant for variant in own if variant.name.split()[1] == impl
    ]


def main() -> None:
    """Write the table as JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.errors", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 512), metavar=("B", "D"))
    given = parser.parse_args()
    shape = tuple(given.shape)
    rows = table(shape, given.device)
    where = conditions(given.device)
    print(f"wrote {results.write('errors', where, shape=list(shape), rows=rows)}")


if __name__ == "__main__":
    main()
