"""Word-to-patch attention maps of held-out pairs, for the eye."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medfast.data.loader import Batch, Loader
from medfast.data.records import Record
from medfast.device import autocast
from medfast.evals.encode import Encoder
from medfast.models.pair import Features

if TYPE_CHECKING:
    from medfast.report import AttentionExample


@torch.inference_mode()
def attention_examples(
    encoder: Encoder,
    records: Sequence[Record],
    size: int,
    word_maps: Callable[[Features, Batch], Tensor | None],
) -> list[AttentionExample]:
    """Return, for each readable pair, its image and each word's weights on the patches.

    A word of several tokens gets the mean of their maps.

    Args:
        encoder: The trained model.
        records: The pairs to show.
        size: Side of the model's square input in pixels.
        word_maps: Gives the weights [B, T, P] of a batch, or None if there are none to show.
    """
    from medfast.report import AttentionExample

    model, tokenizer = encoder.model, encoder.tokenizer
    model.eval()
    examples = []
    for batch in Loader(records, tokenizer, size, batch_size=max(1, len(records))).epoch(0):
        here = batch.to(encoder.device)
        with autocast(encoder.precision, encoder.device):
            features = model(here.images, here.ids, here.mask)
        maps = word_maps(features, here)
        if maps is None:
            break
        maps = maps.unflatten(-1, model.image_tower.grid).cpu()
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
