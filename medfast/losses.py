"""The losses as modules: open_clip's signatures where it has them. Only torch is needed."""

from __future__ import annotations

from torch import Tensor, nn

from medfast.ops import clip_loss, local_alignment_loss


class ClipLoss(nn.Module):
    """Contrastive loss of image-text pairs with open_clip's constructor and forward.

    Args:
        local_loss: Accepted as in open_clip; needs `gather_with_grad`.
        gather_with_grad: Accepted as in open_clip; without effect in a single process.
        cache_labels: Accepted and without effect: there are no label tensors to cache.
        rank: This process's number.
        world_size: Number of processes; only 1 so far.
        use_horovod: Accepted for callers of older versions and ignored.
        impl: Implementation, as in `medfast.ops.clip_loss`.

    Raises:
        ValueError: `local_loss` without `gather_with_grad`, or more than one process.
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
        if world_size != 1:
            raise ValueError(
                f"ClipLoss: world_size must be 1 so far; got {world_size}. Negatives from other "
                "processes are not supported yet; use open_clip's loss there."
            )
        self.impl = impl

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
            positives: Group ids, int64 [B].
        """
        loss = clip_loss(
            image_features, text_features, logit_scale, positives=positives, impl=self.impl
        )
        return {"contrastive_loss": loss} if output_dict else loss


class LocalAlignmentLoss(nn.Module):
    """Contrastive loss of words and patches (GLoRIA); see `medfast.ops.local_alignment_loss`.

    Args:
        temp_attention: Sharpness of the attention of words over patches.
        temp_words: Sharpness of the sum over words.
        temp_pairs: Sharpness of the cross-entropy over pairs.
        impl: Implementation.
    """

    def __init__(
        self,
        temp_attention: float = 4.0,
        temp_words: float = 5.0,
        temp_pairs: float = 10.0,
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
        return local_alignment_loss(
            patches,
            tokens,
            token_mask,
            patch_mask=patch_mask,
            temp_attention=self.temp_attention,
            temp_words=self.temp_words,
            temp_pairs=self.temp_pairs,
            impl=self.impl,
        )
