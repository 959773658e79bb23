import doctest

import pytest
import torch
import torch.nn.functional as F
from global_loss_checks import EPS, GlobalLossChecks, loss_and_grads, unit_features

from medfast.ops import siglip_loss
from medfast.ops.siglip import api, reference
from medfast.ops.siglip.autograd import sigmoid_sum


class TestSiglipLoss(GlobalLossChecks):
    name = "siglip_loss"
    function = staticmethod(siglip_loss)
    reference = staticmethod(reference.siglip_loss)
    scalars = (10.0, -10.0)
    extreme_scalars = ((1.0, 0.0), (100.0, -10.0), (100.0, 100.0), (10.0, -120.0))
    unnormalised_scalars = ((200.0, -10.0), (-20.0, 5.0), (0.0, -3.0))

    @staticmethod
    def eager(image, text, scale, bias):
        logits = scale * image @ text.T + bias
        labels = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
        return -F.logsigmoid(labels * logits).sum() / len(image)

    @staticmethod
    def bands(loss, image, text, scale, bias):
        size = len(image) ** 0.5
        image, text, scale = image.norm(dim=1).max(), text.norm(dim=1).max(), scale.abs()
        logit = scale * image * text + bias.abs()
        # Each row may sum up to B derivatives of 1 over B rows.
        terms = (loss, size * scale * text, size * scale * image, size**2 * image * text, size**2)
        return [(8 + logit) * EPS * term for term in terms]


def test_reference_is_the_published_formula():
    image, text = (t.double() for t in unit_features(20, 8))
    want = TestSiglipLoss.eager(image, text, 10.0, -10.0)
    torch.testing.assert_close(reference.siglip_loss(image, text, 10.0, -10.0), want)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("offset", [0, 2, -3, 40])
def test_a_rectangle_with_an_offset(impl, offset):
    rows, columns = unit_features(9, 16)[0], unit_features(14, 16)[1]

    def by_hand(rows, columns, scale, bias):
        logits = scale * rows @ columns.T + bias
        labels = -torch.ones_like(logits)
        labels.diagonal(offset).fill_(1)
        return -F.logsigmoid(labels * logits).sum()

    inputs = [rows, columns, torch.tensor(9.0), torch.tensor(-4.0)]
    found = loss_and_grads(lambda *a: sigmoid_sum(*a, offset=offset, impl=impl), inputs)
    for got, want in zip(found, loss_and_grads(by_hand, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False], [False] * 3])
def test_registered_op_passes_opcheck(impl, needs):
    leaves = (*unit_features(33, 16), torch.tensor(9.0))
    leaves = [t.requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
    arguments = (*leaves, torch.tensor(-4.0, requires_grad=True), 0, impl, needs)
    torch.library.opcheck(torch.ops.medfast.siglip_loss_fwd.default, arguments)


def test_a_wrong_bias_is_named():
    with pytest.raises(ValueError, match="siglip_loss: logit_bias must be a number"):
        siglip_loss(*unit_features(4, 8), 10.0, torch.ones(4))


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
