"""Who competes: medfast's implementations and, for each op, what people use today.

Peers come from PyPI and are imported where they run; one that is missing is left out with the
reason.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conditions import version
from benchmarks.ops import OPS, Shape
from medfast.device import has_bf16
from medfast.ops import dispatch
from medfast.ops.sparc import reference as sparc

# Packages of peers, and the module that each installs.
PACKAGES = {
    "open_clip_torch": "open_clip",
    "inf-cl": "inf_cl",
    "cut-cross-entropy": "cut_cross_entropy",
    "liger-kernel": "liger_kernel",
    "siglip-kernel": "siglip_kernel",
    "flash-maxsim": "flash_maxsim",
    "late-interaction-kernels": "late_interaction_kernels",
}
_NEED_A_GPU = PACKAGES.keys() - {"open_clip_torch"}

CPU_HAS_BF16 = has_bf16(torch.device("cpu"))
# Peers that a CPU without bf16 takes three times as long for as for fp32: too long at large sizes.
EMULATED = () if CPU_HAS_BF16 else ("*autocast*",)

_TOP = 200
# Queries scored at a time, and, where all would take too long, in all.
_CHUNK = 1024
_SOME_QUERIES = 4096

_DEFAULT_WORKSPACE_MB = 256.0
_SMALL_WORKSPACE_MB = 32.0
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Attributes:
        name: What the tables call it.
        function: Takes the op's arguments.
        dtype: Of the features that it is given.
        own: Whether it is medfast's, which must be right.
        workspace_mb: `MEDFAST_WORKSPACE_MB` for it; None leaves it alone.
        plain: Whether it stands for plain PyTorch, and csrc's products are not for it.
        share: The part of the work that it does; its time is scaled up to all of it.
        compiles: Whether the first call compiles.
        skip: Why it cannot run here, or None.
    """

    name: str
    function: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    own: bool = False
    workspace_mb: float | None = None
    plain: bool = False
    share: float = 1.0
    compiles: bool = False
    skip: str | None = None


def variants(op: str, shape: Shape, device: str) -> list[Variant]:
    """Return all that may compute `op` at this size, medfast's first."""
    return [*_own(op, shape, device), *_PEERS[op](shape, device)]


def installed() -> dict[str, str | None]:
    """Return the version of each peer's package; None where it is missing."""
    return {package: version(package) for package in PACKAGES}


def why_not(package: str, device: str) -> str | None:
    """Return why a peer cannot run here, or None."""
    if package in _NEED_A_GPU and device != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec(PACKAGES[package]) is None:
        return f"not installed; pip install {package}"
    return None


def _own(op: str, shape: Shape, device: str) -> list[Variant]:
    table = OPS[op].table
    found = []
    for impl in dispatch.IMPLEMENTATIONS[table]:
        if impl == "reference":
            continue
        for dtype, short in _SHORT.items():
            probe = torch.empty(1, 1, dtype=dtype, device=device)
            for suffix, workspace_mb in _workspaces(op, shape, impl, dtype):
                found.append(
                    Variant(
                        f"medfast {impl} {short}{suffix}",
                        _with_impl(op, impl),
                        dtype,
                        own=True,
                        workspace_mb=workspace_mb,
                        plain=impl == "torch",
                        skip=dispatch.why_not(table, impl, probe),
                    )
                )
    return found


def _workspaces(
    op: str, shape: Shape, impl: str, dtype: torch.dtype
) -> list[tuple[str, float | None]]:
    """Return names and sizes of the workspaces worth a comparison."""
    if op in ("clip_loss", "siglip_loss") and impl not in ("cpu", "torch"):
        return [("", None), (", small workspace", _SMALL_WORKSPACE_MB)]
    logits_mb = shape[0] ** 2 * 4 / 2**20
    if op == "clip_loss" and dtype == torch.float32 and logits_mb <= _DEFAULT_WORKSPACE_MB:
        # The logits of the forward fit and are kept, unless the workspace is half of them.
        return [("", None), (", recomputing", logits_mb / 2)]
    return [("", None)]


def _with_impl(op: str, impl: str) -> Callable[..., Any]:
    return lambda *arguments: OPS[op].call(*arguments, impl=impl)


def _clip_peers(shape: Shape, device: str) -> list[Variant]:
    def inf_cl(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        from inf_cl import cal_flash_loss

        # It works on heads of at most 256 features.
        head = math.gcd(rows.shape[1], 256)
        return cal_flash_loss(rows, columns, labels, head_dim=head).mean()

    def cut_cross_entropy(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(rows, columns, labels)

    def liger(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(columns, rows, labels)

    half = torch.bfloat16
    return [
        *_eager("open_clip", _open_clip("ClipLoss"), device),
        Variant("inf-cl fp32", _both_ways(inf_cl), skip=why_not("inf-cl", device)),
        Variant(
            "cut-cross-entropy bf16",
            _both_ways(cut_cross_entropy),
            half,
            skip=why_not("cut-cross-entropy", device),
        ),
        Variant("liger-kernel bf16", _both_ways(liger), half, skip=why_not("liger-kernel", device)),
    ]


def _siglip_peers(shape: Shape, device: str) -> list[Variant]:
    def siglip_kernel(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        from siglip_kernel import fused_siglip_loss

        return fused_siglip_loss(image, text, scale.log(), bias)

    return [
        *_eager("open_clip", _open_clip("SigLipLoss"), device),
        Variant(
            "siglip-kernel bf16",
            siglip_kernel,
            torch.bfloat16,
            skip=why_not("siglip-kernel", device),
        ),
    ]


def _cyclip_peers(shape: Shape, device: str) -> list[Variant]:
    def eager(image: Tensor, text: Tensor) -> Tensor:
        across = image @ text.T
        within = image @ image.T - text @ text.T
        B = len(image)
        return B * (across - across.T).square().mean() + 2 * B * within.square().mean()

    return [Variant("eager fp32", eager)]


def _rank_peers(shape: Shape, device: str) -> list[Variant]:
    return [Variant(f"chunked topk({_TOP}) fp32", topk_ranks)]


def _paired_peers(shape: Shape, device: str) -> list[Variant]:
    some = min(_SOME_QUERIES, shape[0])

    def topk_both_ways(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.arange(some, device=query.device)
        return topk_ranks(query[:some], gallery, own), topk_ranks(gallery[:some], query, own)

    return [Variant(f"chunked topk({_TOP}) fp32, twice", topk_both_ways, share=some / shape[0])]


def _local_alignment_peers(shape: Shape, device: str) -> list[Variant]:
    def loop(patches: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """As published: one caption at a time, its own words against all images."""
        scores = []
        for caption, length in enumerate(mask.sum(1).tolist()):
            words = tokens[caption, :length].expand(len(patches), -1, -1)
            attention = (4.0 * torch.bmm(words, patches.mT).softmax(1)).softmax(2)
            contexts = torch.bmm(attention, patches)
            cosines = F.cosine_similarity(words, contexts, dim=2)
            scores.append((5.0 * cosines).exp().sum(1).log())
        logits = 10.0 * torch.stack(scores, 1)
        own = torch.arange(len(patches), device=patches.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return _eager_and_autocast("published loop", loop, device)


def _filip_peers(shape: Shape, device: str) -> list[Variant]:
    def loss(by_patch: Tensor, by_word: Tensor, scale: Tensor) -> Tensor:
        own = torch.arange(len(by_patch), device=by_patch.device)
        return (F.cross_entropy(scale * by_patch, own) + F.cross_entropy(scale * by_word, own)) / 2

    def eager(patches: Tensor, tokens: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        (B, P, D), T = patches.shape, tokens.shape[1]
        products = tokens.reshape(B * T, D) @ patches.reshape(B * P, D).T
        products = products.view(B, T, B, P)
        by_word = (products.max(3).values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if not mask.all():
            products = products.masked_fill(~mask[:, :, None, None], -torch.inf)
        return loss(products.max(1).values.mean(2).T, by_word, scale)

    def flash_maxsim(patches: Tensor, tokens: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        from flash_maxsim import flash_maxsim_batched

        n = mask.sum(1, dtype=torch.int32)
        with torch.no_grad():
            by_patch = flash_maxsim_batched(patches, tokens, doc_lengths=n) / patches.shape[1]
            by_word = flash_maxsim_batched(tokens, patches, query_lengths=n) / n[:, None]
            return loss(by_patch, by_word, scale)

    def late_interaction(patches: Tensor, tokens: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        from late_interaction_kernels import maxsim

        by_patch = maxsim(patches, tokens, d_mask=mask) / patches.shape[1]
        by_word = maxsim(tokens, patches, q_mask=mask) / mask.sum(1, keepdim=True)
        return loss(by_patch, by_word, scale)

    kernels = {"flash-maxsim": flash_maxsim, "late-interaction-kernels": late_interaction}
    return [
        *_eager_and_autocast("eager", eager, device),
        *(
            Variant(f"{package} bf16", function, torch.bfloat16, skip=why_not(package, device))
            for package, function in kernels.items()
        ),
    ]


def _sparc_peers(shape: Shape, device: str) -> list[Variant]:
    return _eager_and_autocast("eager", sparc.sparc_loss, device)


_PEERS: dict[str, Callable[[Shape, str], list[Variant]]] = {
    "clip_loss": _clip_peers,
    "siglip_loss": _siglip_peers,
    "cyclip_loss": _cyclip_peers,
    "local_alignment_loss": _local_alignment_peers,
    "filip_loss": _filip_peers,
    "sparc_loss": _sparc_peers,
    "retrieval_rank": _rank_peers,
    "paired_ranks": _paired_peers,
}


def topk_ranks(query: Tensor, gallery: Tensor, target: Tensor) -> Tensor:
    """Return ranks from the best 200 of the gallery; 200 stands for any later one."""
    top = min(_TOP, len(gallery))
    found = []
    for rows, own in zip(query.split(_CHUNK), target.split(_CHUNK), strict=True):
        best = (rows @ gallery.T).topk(top).indices
        hit = best == own[:, None]
        found.append(torch.where(hit.any(1), hit.int().argmax(1), top))
    return torch.cat(found)


def _eager(name: str, function: Callable[..., Tensor], device: str) -> list[Variant]:
    """Return a function of open_clip's as it is, under autocast, and both compiled."""
    skip = why_not("open_clip_torch", device)
    eager = _eager_and_autocast(name, function, device, skip)
    compiled = (
        Variant(f"{v.name}, compiled", _compiled(v.function), compiles=True, skip=skip)
        for v in eager
    )
    return [*eager, *compiled]


def _eager_and_autocast(
    name: str, function: Callable[..., Tensor], device: str, skip: str | None = None
) -> list[Variant]:
    def autocast(*arguments: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return function(*arguments)

    return [
        Variant(f"{name} fp32", function, skip=skip),
        Variant(f"{name} autocast bf16", autocast, skip=skip),
    ]


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # On the first call: to load the compiler takes longer than many a comparison.
    compiled = functools.cache(lambda: torch.compile(function))
    return lambda *arguments: compiled()(*arguments)


def _open_clip(loss: str) -> Callable[..., Tensor]:
    def function(*arguments: Tensor) -> Tensor:
        import open_clip.loss

        return getattr(open_clip.loss, loss)()(*arguments)

    return function


def _both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return clip_loss from a function (rows, columns, labels) of one direction."""

    def function(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        own = torch.arange(len(image), device=image.device)
        image_to_text = cross_entropy(scale * image, text, own)
        return (image_to_text + cross_entropy(scale * text, image, own)) / 2

    return function
