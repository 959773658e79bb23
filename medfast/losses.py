"""The losses as modules: open_clip's signatures where it has them. Only torch is needed."""

from __future__ import annotations

from torch import Tensor, nn

from medfast.ops import clip_loss, local_alignment_loss


class ClipLoss(nn.Module):
    """Contrastive loss of image-text pairs with open_clip's constructor and forward."""

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
        loss = clip_loss(
            image_features, text_features, logit_scale, positives=positives, impl=self.impl
        )
        return {"contrastive_loss": loss} if output_dict else loss


class LocalAlignmentLoss(nn.Module):
    """Contrastive loss of words and patches (GLoRIA); see `medfast.ops.local_alignment_loss`."""

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
