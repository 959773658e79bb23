import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from global_loss_checks import EPS, GlobalLossChecks, loss_and_grads, unit_features

from medfast.ops import simclr_loss, tiles
from medfast.ops.simclr import api, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# As of clip_loss, whose tiles these are, but for B = 1000 at a large D. With one feature in half
# precision the gradients of the three rectangles, each rounded to the features' dtype, cancel.
SIZES = [
    *((B, 64, dtype) for B in (1, 2, 3, 127, 128, 129, 500) for dtype in DTYPES),
    *((129, D, dtype) for D in (3, 512, 768) for dtype in DTYPES),
    *((B, 1, torch.float32) for B in (2, 129)),
]


class TestSimclrLoss(GlobalLossChecks):
    name = "simclr_loss"
    function = staticmethod(simclr_loss)
    reference = staticmethod(reference.simclr_loss)
    scalars = (10.0,)
    extreme_scalars = ((1.0,), (100.0,))
    unnormalised_scalars = ((200.0,), (-20.0,), (0.0,))

    @staticmethod
    def eager(first, second, scale):
        views = torch.cat([first, second])
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        logits = (scale * views @ views.T).masked_fill(itself, -torch.inf)
        return F.cross_entropy(
            logits, torch.arange(len(views), device=views.device).roll(len(first))
        )

    @staticmethod
    def bands(loss, first, second, scale):
        # Every view meets all views, so that the longest of either set counts for both.
        longest = torch.maximum(first.norm(dim=1).max(), second.norm(dim=1).max())
        logit = scale.abs() * longest**2
        terms = (logit + loss, scale.abs() * longest, scale.abs() * longest, longest**2)
        return [(8 + logit) * EPS * term for term in terms]

    # Inductor sees clip_loss's op alone, which test_clip_loss.py compiles.
    test_inductor_compiles_it = None

    @pytest.mark.parametrize(("B", "D", "dtype"), SIZES)
    def test_is_as_close_to_fp64_as_eager(self, loss, B, D, dtype):
        self.assert_as_close_as_eager(loss, self.inputs(B, D, dtype), self.rounds)

    # Smaller than elsewhere: three rectangles, each of hundreds of tiles.
    @pytest.mark.parametrize(("rows", "columns"), [(5, 7), (64, 3), (1, 33)])
    def test_tiles_of_any_shape(self, loss, monkeypatch, rows, columns):
        monkeypatch.setattr(tiles, "tile_shape", lambda x, y: (rows, columns))
        self.assert_as_close_as_eager(loss, self.inputs(33, 16), self.rounds)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    @pytest.mark.parametrize(("B", "D"), [(1, 3), (2, 3), (2, 64), (129, 64)])
    @pytest.mark.parametrize("workspace", ["256", "0.1"])
    def test_bf16_products_with_sums_in_fp32(self, monkeypatch, impl, B, D, workspace):
        super().test_bf16_products_with_sums_in_fp32(monkeypatch, impl, B, D, workspace)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda a, b, s: (a, b[:3], s), r"\[4, 8\] and \[3, 8\]"),
            (lambda a, b, s: (a[0], b, s), r"first must be \[B, D\].* got \[8\]"),
            (lambda a, b, s: (a, b[None], s), r"second must be \[B, D\].* got \[1, 4, 8\]"),
            (lambda a, b, s: (a, b.double(), s), "second must be torch.float32"),
            (lambda a, b, s: (a.long(), b.long(), s), "first must be floating point"),
            (lambda a, b, s: (a[:0], b[:0], s), "no size of 0"),
            (lambda a, b, s: (a, b, torch.ones(2)), "logit_scale must be a number"),
            (lambda a, b, s: (a, b, "10"), "logit_scale must be a number"),
            (lambda a, b, s: (a.tolist(), b, s), "first must be a tensor"),
            (lambda a, b, s: (a, b.to("meta"), s), "second must be on cpu"),
        ],
    )
    def test_a_wrong_argument_is_named(self, change, says):
        with pytest.raises(ValueError, match=f"simclr_loss: .*{says}"):
            simclr_loss(*change(*self.inputs(4, 8)))

    def test_the_views_may_change_places(self, loss):
        first, second, scale = self.inputs(33, 16)
        value, d_first, d_second, d_scale = loss_and_grads(loss, (first, second, scale))
        swapped = loss_and_grads(loss, (second, first, scale))
        for a, b in zip((value, d_second, d_first, d_scale), swapped, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_single_image_has_nothing_to_be_told_from(self, loss):
        assert not any(value.any() for value in loss_and_grads(loss, self.inputs(1, 8)))

    def test_a_saturated_batch_has_a_gradient_where_eager_has_none(self, loss):
        """At scale 100 and equal views eager in fp32 rounds the loss and its gradient to 0."""
        first, _, scale = self.inputs(16, 8, scalars=(100.0,))
        inputs = [first, first, scale]
        truth = loss_and_grads(self.reference, inputs, torch.float64)
        assert loss_and_grads(self.eager, inputs)[0] == 0
        found = loss_and_grads(loss, inputs)
        torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-4, atol=0)
        assert (found[1] - truth[1]).norm() < 1e-4 * truth[1].norm()


def nt_xent(first, second, scale):
    """Chen 2020, equation 1, anchor by anchor and view by view."""
    views, loss = torch.cat([first, second]), 0.0
    B = len(first)
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        others = sum((scale * views[i] @ views[k]).exp() for k in range(2 * B) if k != i)
        loss = loss - ((scale * views[i] @ views[partner]).exp() / others).log()
    return loss / (2 * B)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("B", [1, 2, 7])
def test_is_the_published_formula(B, impl):
    inputs = [t.double() for t in (*unit_features(B, 5), torch.tensor(10.0))]
    found = loss_and_grads(lambda *a: simclr_loss(*a, impl=impl), inputs)
    for got, want in zip(found, loss_and_grads(nt_xent, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_the_scale_is_the_inverse_of_the_temperature_and_ten_unless_given():
    views = unit_features(9, 4)
    torch.testing.assert_close(simclr_loss(*views), simclr_loss(*views, 1 / 0.1))


def test_the_least_of_opposite_pairs_is_known():
    """Two images at opposite ends: a partner at 1 and two others at -1."""
    views = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    want = math.log1p(2 * math.exp(-20.0))
    assert simclr_loss(views, views, 10.0).item() == pytest.approx(want, rel=1e-5)


def test_the_example_in_the_docstring():
    assert doctest.testmod(api).failed == 0
