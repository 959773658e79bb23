"""Word-to-patch attention maps of held-out pairs, for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from medfast.data.loader import Loader
from medfast.data.records import Record
from medfast.device import autocast
from medfast.evals.encode import Encoder
from medfast.ops import word_patch_attention

if TYPE_CHECKING:
    from medfast.report import AttentionExample


@torch.inference_mode()
def attention_examples(
    encoder: Encoder, records: Sequence[Record], size: int
) -> list[AttentionExample]:
    """Return, for each readable pair, its image and each word's attention over the patches.

    A word of several tokens gets the mean of their maps. Empty for a model without token features.

    Args:
        encoder: The trained model.
        records: The pairs to show.
        size: Side of the model's square input in pixels.
    """
    from medfast.report import AttentionExample

    model, tokenizer = encoder.model, encoder.tokenizer
    model.eval()
    examples = []
    for batch in Loader(records, tokenizer, size, batch_size=max(1, len(records))).epoch(0):
        here = batch.to(encoder.device)
        with autocast(encoder.precision, encoder.device):
            _, patches = model.encode_image(here.images)
            _, tokens = model.encode_text(here.ids, here.mask)
        if patches is None or tokens is None:
            break
        maps = word_patch_attention(patches.float(), tokens.float(), here.word_mask)
        grid = model.image_tower.grid
        maps = maps.unflatten(-1, grid).cpu()
        for row, index in enumerate(batch.index.tolist()):
            words = [w for w in tokenizer.words(records[index].caption) if w[0].isalnum()]
            examples.append(
                AttentionExample(
                    image=Image.fromarray(batch.images[row].permute(1, 2, 0).numpy()),
                    words=[text for text, _ in words],
                    weights=np.stack([maps[row, positions].mean(0) for _, positions in words]),
                )
            )
    return examples
