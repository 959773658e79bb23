import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from global_loss_checks import EPS, EXTREMES, GlobalLossChecks, loss_and_grads, unit_features
from torch.autograd import gradcheck

from medfast.ops import clip_loss
from medfast.ops.clip import api, reference
from medfast.ops.clip.autograd import log_sum_exps
from medfast.ops.clip.positives import agreement
from medfast.ops.dispatch import why_not


class TestClipLoss(GlobalLossChecks):
    name = "clip_loss"
    function = staticmethod(clip_loss)
    reference = staticmethod(reference.clip_loss)
    extreme_scalars = ((1.0,), (100.0,))
    unnormalised_scalars = ((200.0,), (-20.0,), (0.0,))

    @staticmethod
    def eager(image, text, scale):
        logits = scale * image @ text.T
        labels = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    @staticmethod
    def bands(loss, image, text, scale):
        image, text, scale = image.norm(dim=1).max(), text.norm(dim=1).max(), scale.abs()
        terms = (scale * image * text + loss, scale * text, scale * image, image * text)
        return [(8 + scale * image * text) * EPS * term for term in terms]

    @pytest.mark.parametrize(
        "ids",
        [torch.arange(33), torch.zeros(33).long(), torch.arange(33) // 2, -torch.arange(33) % 7],
    )
    def test_positives(self, loss, ids):
        ids = ids.to(self.device)
        checks = TestClipLoss()
        checks.device = self.device
        checks.reference = lambda *a: reference.clip_loss(*a, positives=ids)
        checks.assert_as_close_as_eager(
            lambda *a: loss(*a, positives=ids), self.inputs(33, 16), self.rounds
        )

    def test_different_ids_are_no_ids(self, loss):
        inputs, ids = self.inputs(33, 16), torch.arange(33, device=self.device)
        for a, b in zip(
            loss_and_grads(loss, inputs),
            loss_and_grads(lambda *x: loss(*x, positives=ids), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_a_saturated_batch_has_a_gradient_where_eager_has_none(self, loss):
        """At scale 100 and equal features eager in fp32 rounds the loss and its gradient to 0."""
        image, _, scale = self.inputs(16, 8, scalars=(100.0,))
        inputs = [image, image, scale]
        truth = loss_and_grads(self.reference, inputs, torch.float64)
        assert loss_and_grads(self.eager, inputs)[0] == 0
        found = loss_and_grads(loss, inputs)
        torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-4, atol=0)
        assert (found[1] - truth[1]).norm() < 1e-4 * truth[1].norm()

    def test_kept_and_recomputed_logits_agree(self, loss, monkeypatch):
        inputs = self.inputs(200, 32)
        kept = loss_and_grads(loss, inputs)
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.1")
        for a, b in zip(kept, loss_and_grads(loss, inputs), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    @pytest.mark.parametrize("workspace", ["256", "0.01"])
    @pytest.mark.parametrize("make", EXTREMES.values(), ids=EXTREMES)
    @pytest.mark.parametrize("scale", [1.0, 60.0, 100.0, 200.0])
    def test_bf16_products_of_extreme_batches(self, monkeypatch, impl, workspace, make, scale):
        if why_not(self.name, impl) is not None:
            pytest.skip(why_not(self.name, impl))
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
        image, text, scale = self.inputs(65, 32, torch.bfloat16, scalars=(scale,))
        loss = lambda *a: self.function(*a, impl=impl)  # noqa: E731
        self.assert_as_close_as_eager(loss, [*make(image, text), scale], rounds=True)


def test_reference_is_the_published_formula():
    image, text = (t.double() for t in unit_features(20, 8))
    want = TestClipLoss.eager(image, text, 14.3)
    torch.testing.assert_close(reference.clip_loss(image, text, 14.3), want)


def test_reference_gradient_with_positives_is_that_of_its_value():
    leaves = [t.double().requires_grad_() for t in (*unit_features(5, 4), torch.tensor(14.3))]
    ids = torch.tensor([0, 0, 1, 2, 1])
    assert gradcheck(lambda *a: reference.clip_loss(*a, positives=ids), leaves)


def test_positives_by_hand():
    image, text = (t.double() for t in unit_features(4, 8))
    ids = torch.tensor([5, 9, 5, 1])
    target = (ids[:, None] == ids).double()
    target /= target.sum(1, keepdim=True)
    logits = 14.3 * image @ text.T
    want = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(reference.clip_loss(image, text, 14.3, positives=ids), want)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("offset", [0, 2, -3, 40, -40])
def test_a_rectangle_with_an_offset(impl, offset):
    """Own entries are left out of the sums where they exist; all three outputs have gradients."""
    rows, columns = unit_features(9, 16)[0], unit_features(14, 16)[1]
    upstream = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9, 9, 14)]

    def by_hand(rows, columns, scale):
        logits = scale * rows @ columns.T
        is_own = torch.zeros_like(logits, dtype=torch.bool)
        is_own.diagonal(offset).fill_(True)
        others = logits.masked_fill(is_own, -torch.inf)
        own = torch.where(is_own, logits, 0).sum(1)
        return own, others.logsumexp(1), others.logsumexp(0)

    def total(outputs):
        own, row_lse, column_lse = outputs
        has_own = own != -torch.inf
        own = torch.where(has_own, own, 0)
        return sum((u * o).sum() for u, o in zip(upstream, (own, row_lse, column_lse), strict=True))

    inputs = [rows, columns, torch.tensor(9.0)]
    found = loss_and_grads(lambda *a: total(log_sum_exps(*a, offset=offset, impl=impl)), inputs)
    for got, want in zip(found, loss_and_grads(lambda *a: total(by_hand(*a)), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    own, _, _ = log_sum_exps(*inputs, offset=offset, impl=impl)
    exists = (torch.arange(9) + offset >= 0) & (torch.arange(9) + offset < 14)
    assert torch.equal(own == -torch.inf, ~exists)


def test_two_blocks_of_columns_merge_to_one():
    """What a ring over ranks does: log-sum-exps of blocks are merged, gradients flow through."""
    rows, columns = unit_features(12, 16)
    inputs = [rows, columns, torch.tensor(20.0)]

    def merged(rows, columns, scale):
        own, first, _ = log_sum_exps(rows, columns[:7], scale)
        more, second, _ = log_sum_exps(rows, columns[7:], scale, -7)
        own = torch.where(own == -torch.inf, more, own)
        return (torch.logaddexp(first, second) - own).sum()

    def whole(*inputs):
        own, row_lse, _ = log_sum_exps(*inputs)
        return (row_lse - own).sum()

    for got, want in zip(
        loss_and_grads(merged, inputs), loss_and_grads(whole, inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_registered_op_passes_opcheck(impl, needs_grad):
    rows, columns = (t.requires_grad_() for t in unit_features(33, 16))
    scale = torch.tensor(14.3, requires_grad=True)
    arguments = (rows, columns, scale, 0, impl, needs_grad)
    torch.library.opcheck(torch.ops.medfast.clip_loss_fwd.default, arguments)


def test_positives_op_passes_opcheck():
    image, text = (t.requires_grad_() for t in unit_features(33, 16))
    ids = torch.arange(33) // 2
    torch.library.opcheck(torch.ops.medfast.clip_loss_positives_fwd.default, (image, text, ids))


def test_agreement_is_zero_without_further_positives():
    image, text = unit_features(9, 16)
    assert agreement(image, text, torch.arange(9)) == 0


@pytest.mark.parametrize("ids", [torch.zeros(3).long(), torch.zeros(4), torch.zeros(4, 1).long()])
def test_wrong_positives_are_named(ids):
    with pytest.raises(ValueError, match=r"positives must be torch.int64 \[4\]"):
        clip_loss(*unit_features(4, 8), 14.3, positives=ids)


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan"])
def test_a_wrong_workspace_is_refused(monkeypatch, value):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", value)
    with pytest.raises(ValueError, match="MEDFAST_WORKSPACE_MB must be a positive number"):
        clip_loss(*unit_features(4, 8), 14.3, impl="torch")


@pytest.mark.parametrize("shape", [(1, 1), (300, 70), (64, 512)])
def test_the_largest_norm(kernels, shape):
    torch.manual_seed(0)
    features = torch.randn(shape).bfloat16()
    want = features.float().norm(dim=1).max().item()
    assert kernels.largest_norm(features.data_ptr(), *shape) == pytest.approx(want, rel=1e-6)
    features[shape[0] // 2, -1] = torch.nan
    assert math.isnan(kernels.largest_norm(features.data_ptr(), *shape))
