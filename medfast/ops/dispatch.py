"""Argument checks and the choice of implementation, shared by every op."""

from __future__ import annotations

import importlib.util
import logging
import numbers
import os

import torch
from torch import Tensor

from medfast.errors import unknown_name

# What can run each op, best first. "reference" always can: what stands behind it, since it was not
# yet run on a GPU, has to be asked for.
IMPLEMENTATIONS = {
    "clip_loss": ("triton", "cpu", "torch", "reference", "cuda"),
    "siglip_loss": ("triton", "cpu", "torch", "reference"),
    "cyclip_loss": ("torch", "reference"),
    "simclr_loss": ("triton", "cpu", "torch", "reference"),
    "local_alignment_loss": ("triton", "cpu", "torch", "reference"),
    "filip_loss": ("triton", "cpu", "torch", "reference"),
    "sparc_loss": ("triton", "cpu", "torch", "reference"),
    "retrieval_rank": ("triton", "cpu", "torch", "reference"),
    "normalize_crops": ("torch", "reference", "cuda"),
}
NAMES = ("cuda", "triton", "cpu", "torch", "reference")

try:
    # After torch, so that both share its OpenMP threads.
    import medfast._C
except ImportError as error:
    _CSRC_ERROR: str | None = str(error)
else:
    _CSRC_ERROR = None

try:
    import medfast._CUDA  # noqa: F401
except ImportError as error:
    _CUDA_ERROR: str | None = str(error)
else:
    _CUDA_ERROR = None

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_logger = logging.getLogger("medfast")
_logged: set[tuple[str, str]] = set()


def why_not(op: str, impl: str, features: Tensor | None = None) -> str | None:
    """Return why `impl` cannot run `op` on `features` (None: on this machine), or None."""
    if impl not in IMPLEMENTATIONS[op]:
        return f"{op} has no such implementation yet"
    if impl == "triton":
        return _why_not_triton(features)
    if impl == "cuda":
        return _why_not_cuda(op, features)
    if impl == "cpu":
        if _CSRC_ERROR:
            return f"the C++ kernels are not there ({_CSRC_ERROR}); reinstall with a compiler"
        if features is not None and features.device.type != "cpu":
            return f"the features are on {features.device}"
        if features is not None and features.dtype == torch.float64:
            return "its sums are in fp32, the features in fp64"
    return None


def _why_not_triton(features: Tensor | None) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if features is not None and features.dtype == torch.float64:
        return "its sums are in fp32, the features in fp64"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _why_not_gpu(features)


def _why_not_cuda(op: str, features: Tensor | None) -> str | None:
    if _CUDA_ERROR:
        return f"the CUDA kernels are not there ({_CUDA_ERROR}); reinstall where nvcc is"
    if op == "clip_loss":
        if not _HAS_TRITON:
            return "triton is not installed, whose chunks it shares"
        if features is not None and features.dtype not in (torch.bfloat16, torch.float16):
            return f"it multiplies bf16 and fp16 alone, the features are {features.dtype}"
    return _why_not_gpu(features)


def _why_not_gpu(features: Tensor | None) -> str | None:
    if features is not None and features.device.type != "cuda":
        return f"the features are on {features.device}, its kernels run on a GPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    # A graph is compiled after the first eager call or for a GPU that the user knows.
    if not torch.compiler.is_compiling():
        device = None if features is None else features.device
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than sm_80"
    return None


def choose(op: str, impl: str, features: Tensor) -> str:
    """Return the implementation to run: the one asked for or, for "auto", the best that can.

    Raises:
        ValueError: No implementation is called `impl`.
        RuntimeError: The one asked for cannot run; the sentence says why and what to ask for.
    """
    runnable = [name for name in IMPLEMENTATIONS[op] if why_not(op, name, features) is None]
    if impl == "auto":
        # The interpreter is for tests, thousands of times slower than what it stands for.
        interprets = features.device.type == "cpu"
        impl = next(name for name in runnable if not (interprets and name == "triton"))
        if not torch.compiler.is_compiling() and (op, impl) not in _logged:
            _logged.add((op, impl))
            _logger.info("%s: impl='auto' runs %r", op, impl)
        return impl
    if impl not in NAMES:
        raise ValueError(f"{op}: " + unknown_name("impl", impl, ("auto", *NAMES)))
    if impl not in runnable:
        raise RuntimeError(
            f"{op}: impl={impl!r} cannot run here: {why_not(op, impl, features)}. "
            f"Use impl={runnable[0]!r} or impl='auto'."
        )
    return impl


def argument_error(op: str, argument: str, must: str, got: object, remedy: str) -> ValueError:
    """Return the error for one argument, in the words that every op uses."""
    return ValueError(f"{op}: {argument} must be {must}; got {got}. {remedy}")


def check_features(op: str, **features: tuple[Tensor, str]) -> None:
    """Refuse features of the wrong shape, and such as differ in a size, a dtype or a device.

    Args:
        op: The op that asks.
        features: By argument name, each tensor and one letter per dimension, as in "B P D"; a
            letter stands for one size wherever it appears.
    """
    first, _ = next(iter(features.values()))
    sizes: dict[str, int] = {}
    for name, (value, letters) in features.items():
        layout = f"[{letters.replace(' ', ', ')}]"
        if not isinstance(value, Tensor):
            raise argument_error(op, name, f"a tensor {layout}", type(value), "Convert it.")
        if value.dim() != len(letters.split()) or 0 in value.shape:
            must = f"{layout} with no size of 0"
            raise argument_error(op, name, must, list(value.shape), "Reshape it.")
        if not value.is_floating_point():
            raise argument_error(op, name, "floating point", value.dtype, f"Use {name}.float().")
        if value.dtype != first.dtype:
            must = f"{first.dtype} like the other features"
            raise argument_error(op, name, must, value.dtype, "Convert one of them.")
        check_device(op, name, value, first)
        for letter, size in zip(letters.split(), value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                shapes = " and ".join(str(list(other.shape)) for other, _ in features.values())
                layouts = " and ".join(other.replace(" ", ", ") for _, other in features.values())
                raise argument_error(
                    op,
                    " and ".join(features),
                    f"[{layouts.replace(' and ', '] and [')}] with one {letter}",
                    shapes,
                    "Pass one text per image, projected to the width of the image features.",
                )


def check_patches_and_tokens(
    op: str,
    patches: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    paired: bool = True,
) -> None:
    """Refuse patches [M, P, D], tokens [N, T, D] and masks [M, P], [N, T] that do not fit.

    `paired` says that M and N must be the same.
    """
    images, captions = ("B", "B") if paired else ("M", "N")
    check_features(op, patches=(patches, f"{images} P D"), tokens=(tokens, f"{captions} T D"))
    check_mask(op, "token_mask", token_mask, tokens, "caption", "word")
    if patch_mask is not None:
        check_mask(op, "patch_mask", patch_mask, patches, "image", "patch")


def check_device(op: str, name: str, value: Tensor, features: Tensor) -> None:
    """Refuse a tensor that is not where the features are."""
    if value.device != features.device:
        raise argument_error(
            op, name, f"on {features.device}, as the features", value.device, "Move it there."
        )


def check_ids(op: str, name: str, ids: Tensor, features: Tensor, row: str) -> None:
    """Refuse ids that are not one int64 for each row of the features [N, D]."""
    _check_labels(op, name, ids, torch.int64, features, f"Pass one id per {row}.")


def check_mask(op: str, name: str, mask: Tensor, features: Tensor, row: str, entry: str) -> None:
    """Refuse a mask that is not boolean, not one entry per feature vector, or empty in a row.

    Args:
        op: The op that asks.
        name: The mask's name.
        mask: The mask, to be [B, N].
        features: What it masks, [B, N, D].
        row: What a row is called.
        entry: What an entry of a row is called.
    """
    _check_labels(op, name, mask, torch.bool, features, "True marks what counts.")
    # Looking at values would make a GPU wait, and cannot be compiled.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = (~mask.any(1)).nonzero()
        if len(empty):
            raise argument_error(
                op,
                name,
                f"true somewhere in every row, since each {row} needs a {entry}",
                f"{row} {empty[0].item()} with no valid {entry}",
                "Leave it out of the batch.",
            )


def _check_labels(
    op: str, name: str, labels: Tensor, dtype: torch.dtype, features: Tensor, remedy: str
) -> None:
    """Refuse labels that are not one of `dtype` for each feature vector, beside the features."""
    shape = list(features.shape[:-1])
    must = f"{dtype} {shape}"
    if not isinstance(labels, Tensor):
        raise argument_error(op, name, must, type(labels), "Pass a tensor.")
    if labels.dtype != dtype or list(labels.shape) != shape:
        raise argument_error(op, name, must, f"{labels.dtype} {list(labels.shape)}", remedy)
    check_device(op, name, labels, features)


def autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Return the features in the dtype of an autocast that is on; fp64 stays."""
    device = features[0].device.type
    if not torch.is_autocast_enabled(device) or features[0].dtype == torch.float64:
        return features
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in features)


def as_scalar(op: str, name: str, value: float | Tensor, features: Tensor) -> Tensor:
    """Return a number, or a tensor of one element, as a 0-d tensor beside the features."""
    if isinstance(value, numbers.Real):
        dtype = torch.promote_types(features.dtype, torch.float32)
        return torch.full((), float(value), dtype=dtype, device=features.device)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise argument_error(
            op, name, "a number or a floating-point tensor of one element", got, "Pass one value."
        )
    check_device(op, name, value, features)
    return value.reshape(())
