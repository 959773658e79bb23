import random

import pytest
import torch

from medfast.data.tokens import NOT_PREDICTED, Tokenizer
from medfast.errors import UsageError

LONG = "one large nodule in the left lung and two small cysts in the right kidney"
# Of tokenizers that medfast trains.
MASK = 2
ODD = "Опухоль слева, 胸部 (3 cm)"


@pytest.fixture
def published():
    """A tokenizer of seven entries without a mask token, whose end token also pads, as CLIP's."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<start>", "<end>", "a", "large", "nodule", "left", "lung"]
    backend = Backend(models.WordLevel({name: at for at, name in enumerate(names)}, "<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    roles = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<end>", **roles)
    return Tokenizer(inner, 16)


def _rngs(count, seed=0):
    return [random.Random(seed + i) for i in range(count)]


def test_masks_tell_words_from_padding_start_and_end(tokenizer):
    tokens = tokenizer(["a nodule", "a"])
    assert tokens.ids.shape == (2, 4)
    assert tokens.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert tokens.word_mask.tolist() == [[False, True, True, False], [False, True, False, False]]


def test_padding_comes_last_whatever_the_tokenizer_says(published):
    published._inner.padding_side = "left"
    assert published(["left lung", "a"]).mask.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_long_captions_are_cut_and_keep_their_end(tokenizer):
    tokens = tokenizer(["nodule " * 100])
    assert tokens.ids.shape == (1, 48)
    assert tokens.ids[0, -1] == tokenizer.special_ids["eos_token_id"]
    assert tokens.word_mask.sum() == 46


def test_every_alphabet_is_known(tokenizer):
    assert tokenizer([ODD]).word_mask.sum() > 0
    assert "".join(word for word, _ in tokenizer.words(ODD)) == ODD.replace(" ", "")


def test_words_point_at_their_tokens(tokenizer):
    words = tokenizer.words("A nodule, qqxjzv.")
    assert [word for word, _ in words] == ["A", "nodule", ",", "qqxjzv", "."]
    positions = [p for _, at in words for p in at]
    assert positions == list(range(1, len(positions) + 1))
    assert len(words[3][1]) > 1  # a word that was never seen is spelt


def test_a_saved_tokenizer_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path, 48)
    assert again(["two large cysts"]).ids.equal(tokenizer(["two large cysts"]).ids)
    assert again.special_ids == tokenizer.special_ids


def test_clip_does_not_mistake_the_end_token(tokenizer):
    assert tokenizer.special_ids["eos_token_id"] != 2


@pytest.mark.parametrize(("make", "says"), [(False, "no such folder"), (True, "cannot be read")])
def test_a_folder_without_tokenizer_is_refused(tmp_path, make, says):
    folder = tmp_path / "bert"
    if make:
        folder.mkdir()
    with pytest.raises(UsageError, match=says):
        Tokenizer.load(folder, 48)


def test_masked_captions_keep_the_shares_of_bert(tokenizer):
    captions = [" ".join([LONG] * repeats) for repeats in (1, 2, 3)] * 200
    tokens = tokenizer(captions)
    masked = tokenizer.masked(tokens, _rngs(len(captions)))
    hidden = masked.labels != NOT_PREDICTED
    counts = [max(1, round(0.15 * n)) for n in tokens.word_mask.sum(1).tolist()]
    assert hidden.sum(1).tolist() == counts
    found, labels = masked.ids[hidden], masked.labels[hidden]
    as_mask, kept = (found == MASK).float().mean(), (found == labels).float().mean()
    # Of about 2,700 tokens: four standard deviations. A random token is rarely the right one.
    assert len(found) > 2500
    assert abs(as_mask - 0.8) < 0.031
    assert abs(kept - 0.1) < 0.024
    assert abs(1 - as_mask - kept - 0.1) < 0.024
    # Every place is drawn.
    assert torch.equal(hidden.any(0), tokens.word_mask.any(0))


def test_labels_restore_what_masking_hides(tokenizer):
    tokens = tokenizer([LONG, "a nodule", "a", ODD])
    for seed in range(20):
        masked = tokenizer.masked(tokens, _rngs(4, seed))
        hidden = masked.labels != NOT_PREDICTED
        assert torch.equal(torch.where(hidden, masked.labels, masked.ids), tokens.ids)
        assert hidden.any(1).all()  # of one token too
        assert not (hidden & ~tokens.word_mask).any()


def test_special_tokens_are_neither_hidden_nor_drawn(published):
    published.ensure_mask_token()
    tokens = published(["a large nodule <end> <mask> <start> unknown", "lung", ""])
    special = torch.tensor([0, 1, 7])
    replaced = set()
    for seed in range(300):
        masked = published.masked(tokens, _rngs(3, 3 * seed))
        hidden = masked.labels != NOT_PREDICTED
        assert not torch.isin(masked.labels[hidden], special).any()
        assert hidden.sum(1).tolist() == [1, 1, 0]
        replaced |= set(masked.ids[hidden & (masked.ids != masked.labels)].tolist())
    # All that is no special token, and the mask token.
    assert replaced == {2, 3, 4, 5, 6, 7}


def test_masks_do_not_depend_on_the_neighbours(tokenizer):
    captions = ["a nodule", LONG, "one large cyst on the left"]
    together = tokenizer.masked(tokenizer(captions), _rngs(3))
    for row, caption in enumerate(captions):
        alone = tokenizer.masked(tokenizer([caption]), _rngs(1, row))
        length = alone.ids.shape[1]
        assert torch.equal(together.ids[row, :length], alone.ids[0])
        assert torch.equal(together.labels[row, :length], alone.labels[0])


def test_no_captions_have_no_tokens(tokenizer):
    tokens = tokenizer([])
    masked = tokenizer.masked(tokens, [])
    for part in (tokens.ids, masked.ids, masked.labels):
        assert (part.shape, part.dtype) == ((0, 0), torch.int64)
    assert tokens.mask.dtype == tokens.word_mask.dtype == torch.bool


def test_masking_without_a_mask_token_is_refused(published):
    with pytest.raises(RuntimeError, match=r"call ensure_mask_token\(\)"):
        published.masked(published(["a nodule"]), _rngs(1))


def test_a_mask_token_is_added_once_and_kept(published, tokenizer, tmp_path):
    before = published(["a large nodule"]).ids
    for _ in range(2):
        published.ensure_mask_token()
        assert len(published) == 8
    assert torch.equal(published(["a large nodule"]).ids, before)
    published.save(tmp_path)
    again = Tokenizer.load(tmp_path, 16)
    assert len(again) == 8
    tokens = again(["a large nodule"] * 20)
    assert torch.equal(tokens.ids[:1], before)
    assert (again.masked(tokens, _rngs(20)).ids == 7).any()
    size = len(tokenizer)
    tokenizer.ensure_mask_token()
    assert len(tokenizer) == size
