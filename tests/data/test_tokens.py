import pytest

from medfast.data.tokens import Tokenizer
from medfast.errors import UsageError

ODD = "Опухоль слева, 胸部 (3 cm)"


def test_masks_tell_words_from_padding_start_and_end(tokenizer):
    tokens = tokenizer(["a nodule", "a"])
    assert tokens.ids.shape == (2, 4)
    assert tokens.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert tokens.word_mask.tolist() == [[False, True, True, False], [False, True, False, False]]


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
