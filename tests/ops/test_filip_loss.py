import doctest

import pytest
import torch
import torch.nn.functional as F
from local_loss_checks import Batch, LocalLossChecks, batch

from medfast.ops import filip_loss, filip_scores
from medfast.ops.dispatch import why_not
from medfast.ops.filip import api, chunked, reference
from medfast.ops.packing import valid

IMPLS = ["torch", "cpu", "reference"]


class TestFilipLoss(LocalLossChecks):
    name = "filip_loss"
    function = staticmethod(filip_loss)
    reference = staticmethod(reference.filip_loss)
    scalars = {"logit_scale": 14.3}  # noqa: RUF012

    def prepare(self, inputs):
        units = (F.normalize(t.float(), dim=-1).to(t.dtype) for t in inputs[:2])
        return Batch(*units, *inputs[2:])

    def is_clear(self, inputs):
        """No maximum has a rival within rounding, or the batch has so many that few matter."""
        patches = valid(inputs.patches, inputs.patch_mask).double()
        similarity = torch.einsum(
            "jpd,itd->jipt", patches, valid(inputs.tokens, inputs.token_mask).double()
        )
        similarity.masked_fill_(~inputs.token_mask[:, None], -torch.inf)
        if inputs.patch_mask is not None:
            similarity.masked_fill_(~inputs.patch_mask[:, None, :, None], -torch.inf)
        gaps = []
        for dim in (2, 3):
            if similarity.shape[dim] > 1:
                first, second = similarity.topk(2, dim).values.unbind(dim)
                gaps.append((first - second)[second.isfinite()])
        gaps = torch.cat(gaps) if gaps else torch.ones(1)
        return (gaps < 1e-6).double().mean() < 1e-4 if len(gaps) > 10_000 else gaps.min() > 1e-6

    def test_memory_stays_within_the_workspace(self, loss, monkeypatch, largest_tensor):
        """All pairs' similarities would be 94 MB; no tensor comes near."""
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "4")
        inputs = Batch(*batch(128, 36, 40, 8))
        with largest_tensor() as largest:
            self.loss_and_grads(loss, inputs)
        assert largest.bytes <= 4 * 2**20

    def test_more_tokens_than_a_byte_can_number(self, loss):
        for sizes in ((2, 300, 3, 8), (2, 3, 300, 8)):
            inputs = self.inputs(*sizes, masked=True)
            self.assert_as_close_as_eager(loss, inputs, rounds=self.rounds)

    def test_an_image_without_patches_in_a_compiled_graph(self):
        """Nobody may look for it there: the loss is NaN, and no place is beyond the patches."""
        if why_not(self.name, "cpu") is not None:
            pytest.skip(why_not(self.name, "cpu"))
        torch.compiler.reset()
        inputs = self.inputs(3, 17, 5, 8, masked=True)
        inputs.patch_mask[1] = False
        inputs.token_mask.fill_(True)
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager")
        loss = lambda *a, **k: compiled(*a, impl="cpu", **k)  # noqa: E731
        assert self.call(loss, inputs, list(self.scalars.values())).isnan()
        places = torch.ops.medfast.filip_loss_fwd(*inputs, "cpu", True)[2]
        assert places.max() < 17

    @pytest.mark.usefixtures("bf16_products")
    def test_more_words_than_are_packed_at_a_time(self):
        """Of this width not many are."""
        if why_not(self.name, "cpu") is not None:
            pytest.skip(why_not(self.name, "cpu"))
        inputs = self.inputs(12, 2, 60, 12_000)
        loss = lambda *a, **k: self.function(*a, impl="cpu", **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize(
        "sizes", [(3, 20, 9, 33), (9, 33, 40, 8), (2, 300, 3, 8), (2, 200, 200, 8)]
    )
    def test_bf16_by_products_and_by_gathering(self, sizes):
        """With the last of the sizes maxima are so few that their features are gathered."""
        if why_not(self.name, "cpu") is not None:
            pytest.skip(why_not(self.name, "cpu"))
        inputs = self.inputs(*sizes, dtype=torch.bfloat16, masked=True)
        loss = lambda *a, **k: self.function(*a, impl="cpu", **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)
        want = self.loss_and_grads(loss, inputs)
        inputs.patches[~inputs.patch_mask] = torch.nan
        inputs.tokens[~inputs.token_mask] = torch.nan
        for found, a in zip(self.loss_and_grads(loss, inputs), want, strict=True):
            assert torch.equal(found, a)


def test_reference_is_the_published_loop():
    """One image and one caption at a time, and the mean of both cross-entropies."""
    patches, tokens, token_mask, patch_mask = batch(5, 9, 7, 6, masked=True)
    patches, tokens = (F.normalize(t.double(), dim=-1) for t in (patches, tokens))
    image_to_text, text_to_image = torch.zeros(2, 5, 5, dtype=torch.float64)
    for image in range(5):
        for caption in range(5):
            words, seen = tokens[caption, token_mask[caption]], patches[image, patch_mask[image]]
            similarity = seen @ words.T
            image_to_text[image, caption] = similarity.max(1).values.mean()
            text_to_image[caption, image] = similarity.max(0).values.mean()
    labels = torch.arange(5)
    want = (
        F.cross_entropy(9.0 * image_to_text, labels) + F.cross_entropy(9.0 * text_to_image, labels)
    ) / 2
    found = reference.filip_loss(patches, tokens, token_mask, 9.0, patch_mask=patch_mask)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equals_the_first_gets_the_gradient(impl):
    """Two equal patches, two equal words: only the first of each is anyone's maximum."""
    patches = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]], requires_grad=True)
    tokens = torch.tensor([[[0.6, 0, 0], [0, 0.5, 0], [0.6, 0, 0]]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    image_to_text, text_to_image = filip_scores(patches, tokens, mask, impl=impl)
    torch.testing.assert_close(image_to_text, torch.tensor([[1.7 / 3]]))
    torch.testing.assert_close(text_to_image, torch.tensor([[1.7 / 3]]))
    d_patches, d_tokens = torch.autograd.grad(text_to_image.sum(), (patches, tokens))
    torch.testing.assert_close(d_patches, torch.tensor([[[0.4, 0, 0], [0, 0, 0], [0, 0.5 / 3, 0]]]))
    image_to_text, _ = filip_scores(patches, tokens, mask, impl=impl)
    _, d_tokens = torch.autograd.grad(image_to_text.sum(), (patches, tokens))
    torch.testing.assert_close(d_tokens, torch.tensor([[[2 / 3, 0, 0], [0, 1 / 3, 0], [0, 0, 0]]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_first_of_equals_is_passed_over(impl):
    patches = torch.tensor([[[1.0, 0], [1, 0]]], requires_grad=True)
    tokens = torch.tensor([[[1.0, 0], [1, 0]]], requires_grad=True)
    second = torch.tensor([[False, True]])
    scores = filip_scores(patches, tokens, second, patch_mask=second, impl=impl)
    grads = torch.autograd.grad(sum(s.sum() for s in scores), (patches, tokens))
    for grad in grads:
        torch.testing.assert_close(grad, torch.tensor([[[0.0, 0], [2, 0]]]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("images", "captions"), [(1, 5), (7, 3), (20, 11)])
def test_images_of_one_rank_meet_captions_of_another(impl, images, captions):
    """Blocks of a larger batch give the blocks of its scores, and their gradients."""
    inputs = TestFilipLoss().prepare(batch(20, 9, 7, 16, masked=True))
    patches, tokens, token_mask, patch_mask = inputs
    whole = reference.filip_scores(
        patches.double(), tokens.double(), token_mask, patch_mask=patch_mask
    )
    leaves = [patches[:images].clone(), tokens[-captions:].clone()]
    masks = token_mask[-captions:], patch_mask[:images]
    for leaf in leaves:
        leaf.requires_grad_()
    found = filip_scores(*leaves, masks[0], patch_mask=masks[1], impl=impl)
    wants = whole[0][:images, -captions:], whole[1][-captions:, :images]
    for got, want in zip(found, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = reference.filip_scores(*twins, masks[0], patch_mask=masks[1])
    # Each direction has a gradient of its own, and each alone is enough.
    for part in range(2):
        weights = torch.randn(found[part].shape, generator=torch.Generator().manual_seed(part))
        grads, wants = (
            torch.autograd.grad((side[part] * weights).sum(), of, retain_graph=True)
            for side, of in ((found, leaves), (scores, twins))
        )
        for got, want in zip(grads, wants, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_registered_op_passes_opcheck(impl, masked, needs_grad):
    patches, tokens, token_mask, patch_mask = batch(5, 6, 5, 8, masked=masked)
    token_mask.fill_(True)  # the places of words that do not count are not written
    p, t = (leaf.requires_grad_(needs_grad) for leaf in (patches, tokens))
    args = (p, t, token_mask, patch_mask, impl, needs_grad)
    torch.library.opcheck(torch.ops.medfast.filip_loss_fwd.default, args)


def test_places_are_bytes_where_bytes_suffice():
    for P, dtype in ((256, torch.uint8), (257, torch.int16), (40_000, torch.int32)):
        patches, tokens = torch.empty(1, P, 1), torch.empty(2, 5, 1)
        best_patch, best_word = chunked.places(patches, tokens, needs_grad=True)
        assert best_patch.shape == (2, 1, 5)
        assert best_word.shape == (2, 1, P)
        assert best_patch.dtype == best_word.dtype == dtype
    assert chunked.places(patches, tokens, needs_grad=False)[0].numel() == 0


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
