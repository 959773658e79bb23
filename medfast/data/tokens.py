"""Captions to token ids: a tokenizer trained for the run, or a published one from a folder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.errors import UsageError

_PAD, _START, _MASK, _END = "<pad>", "<start>", "<mask>", "<end>"

# BERT's masked language model (Devlin 2019, arXiv 1810.04805, section 3.1): of a caption's tokens
# this share is to be predicted; of these, such shares become the mask token or a random one.
PREDICTED = 0.15
AS_MASK = 0.8
AS_RANDOM = 0.1
# What torch's cross_entropy leaves out unless told otherwise.
NOT_PREDICTED = -100


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


@dataclass(frozen=True)
class Masked:
    """Token ids of B captions, some of them hidden, for a masked language model.

    Attributes:
        ids: Token ids, int64 [B, T].
        labels: The hidden ids where they are to be predicted, else -100, int64 [B, T].
    """

    ids: Tensor
    labels: Tensor


class Tokenizer:
    """A fast transformers tokenizer with the few calls that training needs.

    Args:
        inner: The tokenizer of the transformers library.
        context_length: Most tokens of a caption, start and end included; longer ones are cut.
    """

    def __init__(self, inner: Any, context_length: int) -> None:
        self._inner = inner
        # Tokens that were added to those that were read or trained.
        self.added = 0
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
            # As above; transformers 4 would drop it where it loads what transformers 5 saved.
            add_prefix_space=True,
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
        if not captions:
            # transformers takes no empty batch.
            none = torch.empty(0, 0, dtype=torch.int64)
            return Tokens(none, none.bool(), none.bool())
        encoded = self._inner(
            list(captions),
            padding=True,
            # As the towers expect, whatever the tokenizer was published with.
            padding_side="right",
            truncation=True,
            max_length=self.context_length,
            return_special_tokens_mask=True,
        )
        mask = torch.tensor(encoded["attention_mask"], dtype=torch.bool)
        special = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
        return Tokens(torch.tensor(encoded["input_ids"]), mask, mask & ~special)

    def ensure_mask_token(self) -> None:
        """Add a mask token to a tokenizer that was published without one, as CLIP's."""
        if self._inner.mask_token is None:
            self.added += self._inner.add_special_tokens({"mask_token": _MASK})

    def masked(self, tokens: Tokens, rngs: Sequence[random.Random]) -> Masked:
        """Hide tokens of B captions for a masked language model, as BERT does.

        Args:
            tokens: The captions; special tokens, also those that a caption spells, stay.
            rngs: Of each caption.

        Raises:
            RuntimeError: the tokenizer has no mask token.
        """
        mask = self._inner.mask_token_id
        if mask is None:
            raise RuntimeError("masked: there is no mask token; call ensure_mask_token() before.")
        special = self._inner.all_special_ids
        ordinary = sorted(set(range(len(self))).difference(special))
        own = tokens.word_mask & ~torch.isin(tokens.ids, torch.tensor(special))
        ids, labels = tokens.ids.tolist(), torch.full_like(tokens.ids, NOT_PREDICTED).tolist()
        for row, label, words, rng in zip(ids, labels, own.tolist(), rngs, strict=True):
            places = [place for place, word in enumerate(words) if word]
            count = min(len(places), max(1, round(PREDICTED * len(places))))
            for place in rng.sample(places, count):
                label[place] = row[place]
                kind = rng.random()
                if kind < AS_MASK:
                    row[place] = mask
                elif kind < AS_MASK + AS_RANDOM:
                    row[place] = rng.choice(ordinary)
        # Lists of no captions do not tell their shape.
        return Masked(*(tokens.ids.new_tensor(part).view_as(own) for part in (ids, labels)))

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
