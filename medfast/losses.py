"""The losses as modules: open_clip's signatures where it has them. Only torch is needed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medfast import ops
from medfast.errors import unknown_name

# What open_clip's SigLipLoss takes as `dist_impl`.
_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """Contrastive loss of image-text pairs with open_clip's constructor and forward.

    Args:
        local_loss: Return this process's part of the loss, whose mean over processes it is; else
            that mean. Needs `gather_with_grad`. The gradient is the same.
        gather_with_grad: Accepted as in open_clip. Gradients always reach the features of every
            process: their mean over processes is the gradient of the loss of all pairs.
        cache_labels: Accepted and without effect: there are no label tensors to cache.
        rank: This process's number.
        world_size: Number of processes that `torch.distributed` runs. With several, text features
            travel from each to the next, and none ever holds all; small ones are gathered, as
            `medfast.distributed.Ring` says.
        use_horovod: Accepted for callers of older versions and ignored.
        impl: Implementation, as in `medfast.ops.clip_loss`.

    Raises:
        ValueError: `local_loss` without `gather_with_grad`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if local_loss and not gather_with_grad:
            raise ValueError(
                "ClipLoss: local_loss must be used with gather_with_grad=True; got False. Without "
                "the gradient through the gathered features the sum of the ranks' gradients points "
                "in another direction than the loss's."
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.impl = impl

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """Return the column of each row's pair, int64 [B]. `forward` does not need it."""
        return torch.arange(num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return all logits [B, B] by image and by text. `forward` does not need them."""
        logits = _logits(image_features, text_features, logit_scale, logit_bias)
        return logits, logits.T

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        positives: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss; see `medfast.ops.clip_loss`.

        Args:
            image_features: [B, D].
            text_features: [B, D].
            logit_scale: The scale itself, not its logarithm.
            logit_bias: Accepted as in open_clip; a softmax does not change with it, and its
                gradient is zero.
            output_dict: Return {"contrastive_loss": loss}.
            positives: Group ids, int64 [B], which mean the same on every process.

        Raises:
            ValueError: a feature has the wrong shape or dtype.
            RuntimeError: `torch.distributed` runs another number of processes.
        """
        features = (image_features, text_features)
        if self.world_size == 1:
            loss = ops.clip_loss(*features, logit_scale, positives=positives, impl=self.impl)
        else:
            _check_processes("ClipLoss", self.world_size)
            from medfast import distributed

            ring = distributed.Ring()
            loss = distributed.clip_loss(
                *features, logit_scale, ring, positives=positives, impl=self.impl
            )
            if not self.local_loss:
                loss = _with_value(loss, ring.mean(loss))
        if isinstance(logit_bias, Tensor):
            # A parameter without any gradient would stop DistributedDataParallel.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Sigmoid loss of image-text pairs with open_clip's constructor and forward.

    Args:
        cache_labels: Accepted and without effect: there are no label tensors to cache.
        rank: This process's number.
        world_size: Number of processes that `torch.distributed` runs; see `ClipLoss`.
        dist_impl: How processes exchange features: "bidir" (None stands for it), "shift", "reduce"
            or "gather"; accepted and without effect: text features travel around a ring.
        bidir: Accepted for callers of older versions and ignored.
        use_horovod: Accepted for callers of older versions and ignored.
        impl: Implementation, as in `medfast.ops.siglip_loss`.

    Raises:
        ValueError: `dist_impl` is unknown.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        bidir: bool = True,
        use_horovod: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _EXCHANGES:
            raise ValueError("SigLipLoss: " + unknown_name("dist_impl", self.dist_impl, _EXCHANGES))
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.impl = impl

    def get_ground_truth(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """Return 1 for pairs and -1 elsewhere, [B, B]. `forward` does not need it."""
        labels = torch.full((num_logits, num_logits), -1.0, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """Return all logits [B, B], images by texts. `forward` does not need them."""
        return _logits(image_features, text_features, logit_scale, logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss; see `medfast.ops.siglip_loss`.

        Args:
            image_features: [B, D].
            text_features: [B, D].
            logit_scale: The scale itself, not its logarithm.
            logit_bias: The bias; None stands for 0.
            output_dict: Return {"contrastive_loss": loss}.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        arguments = (image_features, text_features, logit_scale, bias)
        if self.world_size == 1:
            loss = ops.siglip_loss(*arguments, impl=self.impl)
        else:
            _check_processes("SigLipLoss", self.world_size)
            from medfast import distributed

            loss = distributed.siglip_loss(*arguments, distributed.Ring(), impl=self.impl)
        return {"contrastive_loss": loss} if output_dict else loss


class CyclipLoss(nn.Module):
    """The two consistency terms of CyCLIP, to be added to InfoNCE; see `medfast.ops.cyclip_loss`.

    Args:
        impl: Implementation.
    """

    def __init__(self, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-modal and the in-modal term, without weights, of features [B, D]."""
        return ops.cyclip_loss(image_features, text_features, impl=self.impl)


class LocalAlignmentLoss(nn.Module):
    """Contrastive loss of words and patches (GLoRIA); see `medfast.ops.local_alignment_loss`.

    Args:
        temp_attention: Sharpness of the attention of words over patches, a number or a tensor of
            one element; an `nn.Parameter` is learned. So are the others.
        temp_words: Sharpness of the sum over words.
        temp_pairs: Sharpness of the cross-entropy over pairs.
        impl: Implementation.
    """

    def __init__(
        self,
        temp_attention: float | Tensor = 4.0,
        temp_words: float | Tensor = 5.0,
        temp_pairs: float | Tensor = 10.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.temp_attention = temp_attention
        self.temp_words = temp_words
        self.temp_pairs = temp_pairs
        self.impl = impl

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of patches [B, P, D] and tokens [B, T, D] with their bool masks."""
        return ops.local_alignment_loss(
            patches,
            tokens,
            token_mask,
            patch_mask=patch_mask,
            temp_attention=self.temp_attention,
            temp_words=self.temp_words,
            temp_pairs=self.temp_pairs,
            impl=self.impl,
        )


class FilipLoss(nn.Module):
    """Contrastive loss of patches' and words' best matches; see `medfast.ops.filip_loss`.

    Args:
        impl: Implementation.
    """

    def __init__(self, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        logit_scale: float | Tensor,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of unit patches [B, P, D] and tokens [B, T, D] with their bool masks."""
        return ops.filip_loss(
            patches, tokens, token_mask, logit_scale, patch_mask=patch_mask, impl=self.impl
        )


class SparcLoss(nn.Module):
    """Loss of words against what they see in their own image; see `medfast.ops.sparc_loss`.

    Args:
        threshold: Least weight of a patch that counts; None is one over the number of patches.
        impl: Implementation.
    """

    def __init__(self, threshold: float | None = None, impl: str = "auto") -> None:
        super().__init__()
        self.threshold = threshold
        self.impl = impl

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        logit_scale: float | Tensor,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of patches [B, P, D] and tokens [B, T, D] with their bool masks."""
        return ops.sparc_loss(
            patches,
            tokens,
            token_mask,
            logit_scale,
            patch_mask=patch_mask,
            threshold=self.threshold,
            impl=self.impl,
        )


def _check_processes(loss: str, world_size: int) -> None:
    """Refuse a number of processes that is not that of torch.distributed."""
    running = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if running != world_size:
        raise RuntimeError(
            f"{loss}: world_size must be the number of processes that torch.distributed runs, "
            f"{running}; got {world_size}. Call torch.distributed.init_process_group before."
        )


def _with_value(loss: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `loss`."""
    return loss + (value - loss).detach()


def _logits(
    image: Tensor, text: Tensor, scale: float | Tensor, bias: float | Tensor | None
) -> Tensor:
    logits = scale * image @ text.T
    return logits if bias is None else logits + bias
