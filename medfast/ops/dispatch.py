"""Argument checks and the choice of implementation, shared by every op."""

from __future__ import annotations

import logging
import numbers

import torch
from torch import Tensor

from medfast.errors import unknown_name

try:
    # After torch, so that both share its OpenMP threads.
    from medfast import _C  # noqa: F401
except ImportError as error:
    _CSRC_ERROR: str | None = str(error)
else:
    _CSRC_ERROR = None

NAMES = ("cuda", "triton", "cpu", "torch", "reference")
# What each op has, the fastest first.
IMPLEMENTATIONS = {
    "clip_loss": ("cpu", "torch", "reference"),
    "local_alignment_loss": ("torch", "reference"),
}

_logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def why_not(op: str, impl: str, features: Tensor | None = None) -> str | None:
    """Return why `impl` cannot run `op` on `features` (None: on any here); None where it can."""
    if impl not in IMPLEMENTATIONS[op]:
        return f"{op} has no {impl!r} implementation yet"
    if impl == "cpu":
        if _CSRC_ERROR is not None:
            return f"the C++ kernels are not built ({_CSRC_ERROR}); reinstall with a C++ compiler"
        if features is not None and features.device.type != "cpu":
            return f"it takes tensors on the CPU, these are on {features.device}"
        if features is not None and features.dtype == torch.float64:
            return "it sums in fp32, these features are fp64"
    return None


def choose(op: str, impl: str, features: Tensor) -> str:
    """Return the implementation to run: the one asked for or, for "auto", the fastest that can.

    Raises:
        ValueError: No implementation has that name.
        RuntimeError: The one asked for cannot run; the sentence says why and what can.
    """
    if impl not in ("auto", *NAMES):
        raise ValueError(f"{op}: " + unknown_name("impl", impl, ("auto", *NAMES)))
    fastest = next(name for name in IMPLEMENTATIONS[op] if why_not(op, name, features) is None)
    if impl == "auto":
        if not torch.compiler.is_compiling() and (op, fastest) not in _logged:
            _logged.add((op, fastest))
            _logger.info("%s: impl='auto' runs %r", op, fastest)
        return fastest
    reason = why_not(op, impl, features)
    if reason is not None:
        raise RuntimeError(
            f"{op}: impl={impl!r} cannot run: {reason}. Use impl={fastest!r} or impl='auto'."
        )
    return impl


def argument_error(op: str, argument: str, must: str, got: object, remedy: str) -> ValueError:
    """Return the error for one argument, in the words that every op uses."""
    return ValueError(f"{op}: {argument} must be {must}; got {got}. {remedy}")


def check_features(op: str, **features: tuple[Tensor, str]) -> None:
    """Refuse features of a wrong shape or dtype, or such as do not belong together.

    Args:
        op: The op that asks.
        features: By argument name, a tensor and its layout, as in "B, P, D". A letter stands for
            one size wherever it appears.
    """
    first, _ = next(iter(features.values()))
    sizes: dict[str, int] = {}
    for name, (value, layout) in features.items():
        letters = layout.split(", ")
        if value.dim() != len(letters) or 0 in value.shape:
            must = f"[{layout}], each 1 or more"
            raise argument_error(op, name, must, list(value.shape), "Reshape it.")
        if not value.is_floating_point():
            remedy = f"Pass {name}.float()."
            raise argument_error(op, name, "of a floating-point dtype", value.dtype, remedy)
        if value.dtype != first.dtype:
            must = f"of one dtype with the other features, {first.dtype}"
            raise argument_error(op, name, must, value.dtype, "Convert one of them.")
        check_device(op, name, value, first)
        for letter, size in zip(letters, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise argument_error(
                    op,
                    " and ".join(features),
                    " and ".join(f"[{other}]" for _, other in features.values())
                    + f" with one {letter}",
                    " and ".join(str(list(other.shape)) for other, _ in features.values()),
                    "Pass one text per image, both projected to one width.",
                )


def check_device(op: str, name: str, value: Tensor, features: Tensor) -> None:
    """Refuse a tensor that is not where the features are."""
    if value.device != features.device:
        must = f"on {features.device}, where the features are"
        raise argument_error(op, name, must, f"one on {value.device}", "Move it there.")


def check_mask(op: str, name: str, mask: Tensor, features: Tensor) -> None:
    """Refuse a mask that is not boolean with one entry per feature vector."""
    shape = list(features.shape[:-1])
    if mask.dtype != torch.bool or list(mask.shape) != shape:
        got = f"{mask.dtype} {list(mask.shape)}"
        remedy = "Pass True for what counts, False for padding."
        raise argument_error(op, name, f"torch.bool {shape}", got, remedy)
    check_device(op, name, mask, features)


def check_some_valid(op: str, token_mask: Tensor, patch_mask: Tensor | None) -> None:
    """Refuse a caption without a word and an image without a patch. Waits for the device."""
    masks = [("caption", "word", "token_mask", token_mask)]
    if patch_mask is not None:
        masks.append(("image", "patch", "patch_mask", patch_mask))
    for row, item, name, mask in masks:
        empty = (~mask.any(1)).nonzero()
        if len(empty):
            raise ValueError(
                f"{op}: {row} {empty[0].item()} has no valid {item}: its row of {name} is all "
                "False. Leave such pairs out of the batch."
            )


def as_scalar(op: str, name: str, value: float | Tensor, features: Tensor) -> Tensor:
    """Return a number, or a tensor of one element, as a 0-d tensor in the dtype of the sums."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    if isinstance(value, numbers.Real):
        return torch.full((), float(value), dtype=dtype, device=features.device)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        must = "a number or a floating-point tensor of one element"
        raise argument_error(op, name, must, got, "Pass one value.")
    check_device(op, name, value, features)
    return value.reshape(()).to(dtype)
