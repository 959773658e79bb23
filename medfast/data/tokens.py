"""Captions to token ids: a tokenizer trained for the run, or a published one from a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.errors import UsageError

_PAD, _START, _MASK, _END = "<pad>", "<start>", "<mask>", "<end>"


@dataclass(frozen=True)
class Tokens:
    """Token ids of B captions.

    Attributes:
        ids: Token ids, int64 [B, T].
        mask: True for every token but padding, bool [B, T].
        word_mask: True for the caption's own tokens: no padding, start or end, bool [B, T].
    """

    ids: Tensor
    mask: Tensor
    word_mask: Tensor


class Tokenizer:
    """A fast transformers tokenizer with the few calls that training needs.

    Args:
        inner: The tokenizer of the transformers library.
        context_length: Most tokens of a caption, start and end included; longer ones are cut.
    """

    def __init__(self, inner: Any, context_length: int) -> None:
        self._inner = inner
        self.context_length = min(context_length, inner.model_max_length)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
        """Return a lower-casing byte-level BPE tokenizer, which knows every alphabet."""
        import tokenizers
        from tokenizers import normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            # The end token must not have id 2, which transformers' CLIP reads as an old layout.
            special_tokens=[_PAD, _START, _MASK, _END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{_START} $A {_END}",
            special_tokens=[(t, backend.token_to_id(t)) for t in (_START, _END)],
        )
        inner = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=_PAD,
            bos_token=_START,
            eos_token=_END,
            mask_token=_MASK,
            model_max_length=context_length,
        )
        return cls(inner, context_length)

    @classmethod
    def load(cls, folder: Path, context_length: int) -> Tokenizer:
        """Return the tokenizer that lies in a local folder.

        Raises:
            UsageError: the folder is missing or holds no fast tokenizer.
        """
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise UsageError(
                f"--tokenizer {folder}: there is no such folder; it must hold a tokenizer.json as "
                "published with a model."
            )
        try:
            inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise UsageError(
                f"--tokenizer {folder} cannot be read ({reason}); it must hold the tokenizer.json "
                "and tokenizer_config.json of a published model."
            ) from None
        if not inner.is_fast:
            raise UsageError(f"--tokenizer {folder} holds no tokenizer.json (a fast tokenizer).")
        if inner.pad_token is None:
            inner.pad_token = inner.eos_token
        return cls(inner, context_length)

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, from where `load` and transformers read it."""
        self._inner.save_pretrained(str(folder))

    def __len__(self) -> int:
        return len(self._inner)

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids that a transformers configuration names, by their names there."""
        names = {
            "pad_token_id": self._inner.pad_token_id,
            "bos_token_id": self._inner.bos_token_id,
            "eos_token_id": self._inner.eos_token_id,
        }
        return {name: value for name, value in names.items() if value is not None}

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Return the ids of B captions, padded to the longest of them."""
        encoded = self._inner(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.context_length,
            return_special_tokens_mask=True,
        )
        mask = torch.tensor(encoded["attention_mask"], dtype=torch.bool)
        special = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
        return Tokens(torch.tensor(encoded["input_ids"]), mask, mask & ~special)

    def words(self, caption: str) -> list[tuple[str, list[int]]]:
        """Return the words of a caption as (text, positions of its tokens)."""
        encoded = self._inner(
            caption,
            truncation=True,
            max_length=self.context_length,
            return_offsets_mapping=True,
        )
        words: dict[int, tuple[int, int, list[int]]] = {}
        for position, word in enumerate(encoded.word_ids()):
            if word is None:
                continue
            start, end = encoded["offset_mapping"][position]
            first, last, positions = words.get(word, (start, end, []))
            words[word] = (min(first, start), max(last, end), [*positions, position])
        return [(caption[a:b].strip(), positions) for a, b, positions in words.values()]
